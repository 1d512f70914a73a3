"""Scores: how important every block (or span of blocks) of a model is under one or more metrics.

Higher is always more important. A metric holds either one number per block, or a triangle: row n - 1 has the score of
every span of n blocks, by its first block, so row 0 speaks of single blocks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_table
from shortcut.records.actions import MOVES, Action, Move
from shortcut.records.plan import FORMAT, Base, check_format, read_base

Triangle = tuple[tuple[float, ...], ...]
Average = Literal["tokens", "sequences"]  # what counts the same in a mean over text
Measured = dict[Action, dict[str, tuple[float, ...] | Triangle]]  # scores by action and metric


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one calibration set, with what a plan needs to know of the model.

    parameters: of the whole model; block_parameters: of each block. metrics: what whole blocks score. calibration and
    settings are plain data. orders: by metric, the moves in the order in which they were made, what was left being
    scored again each time. halves: what else may be done to a block, with the scores of what then goes, by metric;
    half_parameters: with the number of parameters that go.
    """

    base: Base
    parameters: int
    block_parameters: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...] | Triangle]
    calibration: Mapping[str, Any]
    settings: Mapping[str, Any]
    orders: Mapping[str, tuple[Move, ...]] = field(default_factory=dict)
    halves: Measured = field(default_factory=dict)
    half_parameters: Mapping[Action, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The metrics, in the order in which they were asked for."""
        return list(self.metrics or next(iter(self.halves.values()), {}))

    @property
    def columns(self) -> dict[str, tuple[float, ...]]:
        """What single blocks score, and halves of them, by metric and action: (blocks,) each."""
        whole = {name: self.of_blocks(name) for name in self.metrics}
        return whole | {f"{name} {half}": self.of_blocks(name, half) for half in self.halves for name in self.names}

    def size(self, block: int, action: Action) -> int:
        """How many parameters go when this is done to a block."""
        sizes = {"drop": self.block_parameters, "keep": (0,) * self.base.blocks, **self.half_parameters}
        if action not in sizes:
            raise ShortcutError(f"nothing is known of the size of {action} blocks: score with --allow {action}")
        return sizes[action][block]

    def describe_moves(self, metric: str, moves: Mapping[int, Action]) -> dict[str, dict[str, float | int]]:
        """What every move costs, by the score of what goes alone, and gains in parameters; where that was scored."""
        found: dict[str, dict[str, float | int]] = {}
        for block, action in sorted(moves.items()):
            if metric in (self.metrics if action == "drop" else self.halves.get(action, {})):
                score = self.of_blocks(metric, action)[block]
                found[str(Move(block, action))] = {"score": score, "parameters": self.size(block, action)}
        return found

    def of_blocks(self, metric: str, action: Action = "drop") -> tuple[float, ...]:
        """One score per block, for what goes by an action: (blocks,)."""
        values = self._of(metric, action)
        return values[0] if isinstance(values[0], tuple) else values

    def of_spans(self, metric: str, length: int, action: Action = "drop") -> tuple[float, ...]:
        """The score of every span of this many blocks, by its first block: (blocks - length + 1,).

        A metric that was measured for single blocks only counts for a span by its sum over the span.
        """
        values = self._of(metric, action)
        if isinstance(values[0], tuple):
            return values[length - 1]
        single = self.of_blocks(metric, action)
        return tuple(math.fsum(single[i : i + length]) for i in range(len(single) - length + 1))

    def _of(self, metric: str, action: Action) -> tuple[float, ...] | Triangle:
        if metric not in self.names:
            raise ShortcutError(f"no scores of metric {metric!r}: there are {', '.join(self.names)}")
        found = self.metrics if action == "drop" else self.halves.get(action, {})
        if metric not in found:
            raise ShortcutError(f"these scores say nothing of {action}: score with --allow {action}")
        return found[metric]

    def __str__(self) -> str:
        columns = self.columns
        rows = [[block, *(f"{column[block]:.4f}" for column in columns.values())] for block in range(self.base.blocks)]
        table = format_table(["block", *columns], rows, left=0)
        orders = [f"one by one, by {metric}: {', '.join(map(str, blocks))}" for metric, blocks in self.orders.items()]
        stable = self.settings.get("stability")
        if isinstance(stable, dict):
            agreed = ", ".join(f"{name} {value:.2f}" for name, value in stable.items() if name != "parts")
            orders.append(f"rank agreement of {stable.get('parts')} parts of the text (1 is full): {agreed}")
        return "\n".join([table, *([""] if orders else []), *orders])

    def to_dict(self) -> dict[str, Any]:
        """The scores as the plain data that their file holds."""
        orders = {metric: [str(move) for move in moves] for metric, moves in self.orders.items()}
        return {"shortcut": FORMAT, **asdict(self), "base": self.base.to_dict(), "orders": orders}


def format_scores(scores: Scores) -> str:
    """The text of a score file."""
    return json.dumps(scores.to_dict(), indent=1, ensure_ascii=False) + "\n"


def read_scores(path: Path) -> Scores:
    """Read scores from their JSON file. Raises ShortcutError for a file that does not hold scores."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShortcutError(f"no scores at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShortcutError(f"cannot read the scores {path}: {error}") from None
    fields = {"parameters", "block_parameters", "metrics", "calibration", "settings"}
    check_format(data, str(path), fields | {"base", "orders", "halves", "half_parameters"})
    base = read_base(data.get("base"), str(path))
    if missing := sorted(fields - set(data)):
        raise ShortcutError(f"{path} lacks the entry {missing[0]!r}")
    try:
        metrics = _read_metrics(data["metrics"], base.blocks)
        halves = {_half(name): _read_metrics(found, base.blocks) for name, found in data.get("halves", {}).items()}
        sizes = {_half(name): tuple(map(int, counts)) for name, counts in data.get("half_parameters", {}).items()}
        block_parameters = tuple(int(count) for count in data["block_parameters"])
        parameters = int(data["parameters"])
        orders = {str(name): _read_order(blocks, base.blocks) for name, blocks in data.get("orders", {}).items()}
        plain = isinstance(data["calibration"], dict) and isinstance(data["settings"], dict)
        known = [set(found) for found in (metrics, *halves.values()) if found]
        whole = (
            all(len(counts) == base.blocks for counts in (block_parameters, *sizes.values()))
            and sizes.keys() == halves.keys()
        )
        if not whole or not known or any(names != known[0] for names in known) or parameters < 1 or not plain:
            raise ValueError
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError):
        raise ShortcutError(f"{path} does not hold the scores of {base.blocks} blocks") from None
    return Scores(
        base, parameters, block_parameters, metrics, data["calibration"], data["settings"], orders, halves, sizes
    )


def _half(name: str) -> Action:
    return {str(action): action for action in MOVES if action != "drop"}[name]


def _read_metrics(metrics: Any, depth: int) -> dict[str, tuple[float, ...] | Triangle]:
    return {str(name): _read_values(values, depth) for name, values in metrics.items()}


def _read_order(moves: Any, depth: int) -> tuple[Move, ...]:
    order = tuple(Move.read(move) for move in moves)
    if len(set(order)) != len(order) or not {move.block for move in order} <= set(range(depth)):
        raise ValueError
    return order


def _read_values(values: Any, depth: int) -> tuple[float, ...] | Triangle:
    def row(numbers: Any, length: int) -> tuple[float, ...]:
        scores = tuple(float(number) for number in numbers)
        if len(scores) != length or not all(math.isfinite(score) for score in scores):
            raise ValueError
        return scores

    if not isinstance(values, list):
        raise ValueError
    if isinstance(values[0], list):
        if len(values) != depth:
            raise ValueError
        return tuple(row(numbers, depth - n) for n, numbers in enumerate(values))
    return row(values, depth)


def perplexity_of(loss: float) -> float:
    """exp of a mean loss in nats; where that would be beyond what a number holds, the largest power of ten it holds."""
    return math.exp(loss) if loss < _LARGEST else 1e308


_LARGEST = math.log(1e308)
