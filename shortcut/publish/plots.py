"""Pictures: of scores, bars for every metric of single blocks and a heat map for every metric of spans; of trials."""

import io
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from shortcut.checkpoint.stage import check_file
from shortcut.common.errors import ShortcutError
from shortcut.records.actions import FREEZING, GONE, Action
from shortcut.records.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from shortcut.checking.trials import Trial, Trials

WIDTH, BARS_HEIGHT, MAP_HEIGHT = 6.4, 2.9, 5.4  # inches of one panel
KEPT, DROPPED, INK, PALE = "#5b8db8", "#d55e00", "#333333", "#e2e2e2"  # blue and vermilion differ to every eye
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")  # told apart by every eye
SMALL = 9  # points
TITLES = {"attention-only": "MLPs", "mlp-only": "attentions", "freeze-visual": "images", "freeze-text": "text"}
RUINED = 20  # times the whole model's perplexity, beyond which differences are of no interest
LOG_FROM = 10  # the largest score over the smallest, from which on a linear axis would hide the small ones


def draw_scores(scores: Scores, path: Path, actions: Sequence[Action] = ()) -> None:
    """Write one PNG with a panel per metric and what may go; raises ShortcutError where it cannot.

    actions: what is done to every block; those that lose what a panel scores are marked.
    """
    rows = _arrange(scores)
    columns = max(map(len, rows))
    heights = [MAP_HEIGHT if _is_map(scores, *row[0]) else BARS_HEIGHT for row in rows]
    figure = _start_figure(path, WIDTH * columns, sum(heights) + 0.4, _describe(scores))
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for place, row in enumerate(rows):
        for column, (name, action) in enumerate(row):
            axes = figure.add_subplot(grid[place, column if len(row) == columns else slice(None)])
            gone = {block for block, own in enumerate(actions) if goes(action, own)}
            if _is_map(scores, name, action):
                _draw_map(axes, scores, name, gone)
            else:
                _draw_bars(axes, scores, name, action, gone)
    _save(figure, path)


def goes(part: Action, own: Action) -> bool:
    """Whether what goes by the first action goes by the second as well."""
    return own == part or bool(GONE[part] and GONE[part] <= GONE[own])


def draw_trials(trials: "Trials", path: Path) -> None:
    """Write one PNG of perplexity against parameters, a line per rule and metric; raises ShortcutError as above."""
    figure = _start_figure(path, 1.4 * WIDTH, 1.1 * MAP_HEIGHT, Path(trials.model).name or trials.model)
    from matplotlib.ticker import LogLocator

    axes = figure.add_subplot()
    lines: dict[str, list[Trial]] = {}
    for trial in trials.trials:
        lines.setdefault(" ".join(filter(None, (trial.select, trial.metric))), []).append(trial)
    for place, (label, line) in enumerate(lines.items()):
        sizes = [size / 1e6 for size in (trials.parameters, *(trial.parameters for trial in line))]
        values = [trials.perplexity, *(trial.perplexity for trial in line)]
        color, marker = LINES[place % len(LINES)], "osD^v<>P"[place // len(LINES) % 8]
        axes.plot(sizes, values, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
    values = [trials.perplexity, *(trial.perplexity for trial in trials.trials)]
    highest, lowest = max(values), min(values)
    top = min(highest, RUINED * trials.perplexity)
    left_out = f", up to {RUINED} times the whole model's" if top < highest else ""
    _style(axes, "quality against size", "million parameters", f"perplexity (log scale{left_out})")
    axes.text(0, -0.12, f"perplexity on {trials.text}", transform=axes.transAxes, fontsize=SMALL, color=INK)
    axes.invert_xaxis()
    axes.set_yscale("log", subs=())
    axes.set_ylim(lowest / 1.15, top * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(color=PALE, linewidth=0.8)
    axes.legend(loc="upper left", frameon=False, fontsize=SMALL, labelcolor=INK)
    _save(figure, path)


def check_picture(path: Path) -> None:
    """Raise ShortcutError, before any work, for a picture that could not be written."""
    if path.suffix.lower() != ".png":
        raise ShortcutError(f"cannot draw {path}: the picture has to be a .png file")
    if not path.parent.is_dir():
        raise ShortcutError(f"cannot draw {path}: there is no folder {path.parent}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ShortcutError('drawing needs matplotlib: pip install "shortcut[plot]"') from None


def draw_curves(counts: Sequence[int], right: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write one PNG of accuracy against the number of frozen blocks: a line per order, pale for random ones.

    right: shares of right answers with so many blocks frozen. Raises ShortcutError as above.
    """
    figure = _start_figure(path, 1.2 * WIDTH, MAP_HEIGHT, "right answers with images frozen in some blocks")
    axes = figure.add_subplot()
    colours, drawn = iter(LINES), "random orders"
    for name, values in sorted(right.items(), key=lambda item: not item[0].startswith("random")):
        by_chance = name.startswith("random")
        label, drawn = (drawn, "_") if by_chance else (name, drawn)
        colour, width = ("#bbbbbb", 1) if by_chance else (next(colours), 2)
        percent = [100 * value for value in values]
        axes.plot(counts, percent, marker="o", markersize=3, label=label, color=colour, linewidth=width)
    _style(axes, "", "frozen blocks", "right answers, percent")
    _count_on(axes.xaxis)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    _add_legend(axes)
    _save(figure, path)


def _start_figure(path: Path, width: float, height: float, title: str) -> "Figure":
    check_picture(path)
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK, parse_math=False)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    figure.draw_without_rendering()  # which arranges it; drawing it would do so again
    figure.set_layout_engine("none")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    try:
        path.write_bytes(picture.getvalue())
    except OSError as error:
        raise ShortcutError(f"cannot write {path}: {error.strerror}") from None


def _is_map(scores: Scores, name: str, action: Action) -> bool:
    return action == "drop" and isinstance(scores.metrics[name][0], tuple)


def _arrange(scores: Scores) -> list[list[tuple[str, Action]]]:
    """Metrics in rows of at most two, bar charts before heat maps; one in a row has its whole width."""
    panels: list[tuple[str, Action]] = [(name, "drop") for name in scores.metrics]
    panels += [(name, action) for action in scores.halves for name in scores.names]
    groups = [[panel for panel in panels if _is_map(scores, *panel) is kind] for kind in (False, True)]
    columns = min(2, max(map(len, groups)))
    return [group[i : i + columns] for group in groups for i in range(0, len(group), columns)]


def _describe(scores: Scores) -> str:
    """The model and what it was calibrated on, in one line."""
    record = scores.calibration
    model = Path(scores.base.model).name or scores.base.model
    source = ", ".join(Path(name).name for name in str(record.get("data", "")).split(","))
    size = f"{record['samples']} × {record['length']} tokens" if {"samples", "length"} <= set(record) else ""
    calibration = ", ".join(filter(None, (source, size)))
    return f"{model}  ·  calibration: {calibration}" if calibration else model


def _draw_bars(axes: "Axes", scores: Scores, name: str, action: Action, gone: set[int]) -> None:
    import numpy as np
    from matplotlib.ticker import LogLocator

    from shortcut.scoring.metrics import METRICS

    values = np.array(scores.of_blocks(name, action))

    label = f"score: {METRICS[name].formula}" if name in METRICS else "score"
    positive = values[values > 0]
    ratio = positive.max() / positive.min() if positive.size else 1
    if ratio >= LOG_FROM:
        label += " (log scale)"
        axes.set_yscale("log", subs=())
        axes.set_ylim(positive.min() / 1.5, positive.max() * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
    title = ", ".join([name, *([TITLES[action]] if action in TITLES else [])])
    _style(axes, title, "block", label)
    _count_on(axes.xaxis)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    for legend, color, chosen in (
        ("kept", KEPT, False),
        ("frozen" if action in FREEZING else "dropped", DROPPED, True),
    ):
        blocks = [block for block in range(len(values)) if (block in gone) is chosen]
        axes.bar(blocks, values[blocks], 0.8, color=color, label=legend)
    axes.set_xlim(-0.7, len(values) - 0.3)
    if gone:
        _add_legend(axes)


def _draw_map(axes: "Axes", scores: Scores, name: str, dropped: set[int]) -> None:
    import numpy as np
    from matplotlib.colors import PowerNorm

    depth = scores.base.blocks
    _style(axes, name, "first block of the span", "blocks in the span")
    _count_on(axes.xaxis)
    _count_on(axes.yaxis)
    shades = np.full((depth, depth), np.nan)
    for number in range(depth):
        row = np.array(scores.of_spans(name, number + 1))
        shades[number, : len(row)] = (row - row.min()) / (np.ptp(row) or 1)
    corners = (-0.5, depth - 0.5, depth + 0.5, 0.5)
    scale = PowerNorm(0.5, 0, 1)  # a linear one shows little but the first block, which is far above all others
    image = axes.imshow(shades, "viridis", scale, aspect="auto", interpolation="nearest", extent=corners)
    dot = min(36, (240 / depth) ** 2)
    best = np.nanargmin(shades, axis=1)
    axes.scatter(best, range(1, depth + 1), dot, "white", edgecolors=INK, linewidths=0.5, label="lowest of its row")
    if firsts := [block for block in sorted(dropped) if block - 1 not in dropped]:
        lengths = [next(n for n in count(1) if first + n not in dropped) for first in firsts]
        axes.scatter(firsts, lengths, 90, "none", marker="s", edgecolors=DROPPED, linewidths=2, label="dropped span")
    bar = axes.figure.colorbar(image, ax=axes, aspect=40, pad=0.02, ticks=[0, 0.05, 0.2, 0.4, 0.6, 0.8, 1])
    bar.ax.yaxis.set_major_formatter("{x:g}")
    _style(bar.ax, "", "", "score within its row, lowest 0 to highest 1 (square-root scale)")
    _add_legend(axes)


def _add_legend(axes: "Axes") -> None:
    """Above the panel on the right, where it hides nothing."""
    style = {"frameon": False, "fontsize": SMALL, "labelcolor": INK, "borderaxespad": 0.1}
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, **style)


def _style(axes: "Axes", title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    axes.set_xlabel(x, fontsize=SMALL, color=INK)
    axes.set_ylabel(y, fontsize=SMALL, color=INK)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)


def _count_on(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def check_files(out: Path | None, plot: Path | None) -> None:
    """Raise ShortcutError, before the long work, for files that could not be written after it."""
    if out is not None:
        check_file(out)
    if plot is not None:
        from shortcut.publish.plots import check_picture

        check_picture(plot)
