"""What every verb that runs a model does: take text, open the model, score it, and choose by what came out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import __version__
from shortcut.choose.rules import Select
from shortcut.commands import plan
from shortcut.processes import own_part
from shortcut.records.plan import Plan
from shortcut.records.scores import Scores
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.stage import check_file

if TYPE_CHECKING:
    from shortcut.scoring.calibration import Calibration
    from shortcut.scoring.metrics import Metric


def check_files(out: Path | None, plot: Path | None) -> None:
    """Raise ShortcutError, before the long work, for files that could not be written after it."""
    if out is not None:
        check_file(out)
    if plot is not None:
        from shortcut.publish.plots import check_picture

        check_picture(plot)


def take_text(
    checkpoint: Checkpoint, source: tuple[str, str, str | None], samples: int, *, trust_remote_code: bool, **how: Any
) -> "Calibration":
    """Tokenise text for a checkpoint. source: data, split and column; how: the other options of `make_calibration`."""
    from shortcut.live import load_tokenizer
    from shortcut.scoring.calibration import Source, make_calibration

    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    return make_calibration(tokenizer, Source(*source), samples=samples, **how)


def start(checkpoint: Checkpoint, **how: Any) -> AbstractContextManager[Any]:
    """The live model of a checkpoint, for the length of a `with` block. how: the options of `open_live`."""
    from shortcut.offload import open_live

    return open_live(checkpoint.folder, checkpoint.config, checkpoint.parameters, **how)


def make_scores(
    checkpoint: Checkpoint,
    live: Any,
    calibration: "Calibration",
    metrics: "Sequence[Metric]",
    batch_size: int,
    greedy: int = 0,
    may_go: Sequence[int] = (),
    *,
    quiet: bool = False,
) -> Scores:
    """Score the blocks of a live model, and leave some out one by one; goes on where an equal run was killed.

    Raises ShortcutError as `score_blocks` does.
    """
    from shortcut.scoring.blocks import remove_greedily, score_blocks
    from shortcut.scoring.calibration import make_batches
    from shortcut.scoring.partial import Partials

    batches = make_batches(calibration, batch_size, live.device)
    settings = {"device": str(live.device), "dtype": str(live.dtype).removeprefix("torch."), "batch_size": batch_size}
    settings["average"] = metrics[0].average
    partials = Partials({**settings, **identify(checkpoint), "calibration": calibration.hash, "part": own_part()})
    how: dict[str, Any] = {"partials": partials, "quiet": quiet}
    found = score_blocks(live, batches, metrics, **how)
    order = dict(remove_greedily(live, batches, metrics[0], greedy, may_go, **how)) if greedy else {}
    partials.forget()
    return Scores(
        base=checkpoint.base,
        parameters=checkpoint.parameters,
        block_parameters=checkpoint.block_parameters,
        metrics=found,
        calibration=calibration.record(),
        settings=settings,
        orders={metrics[0].name: tuple(order)} if greedy else {},
    )


def identify(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells the weights of a checkpoint from others, and this program from others."""
    import torch
    import transformers

    states = {file.path: file.path.stat() for file in checkpoint.files}
    return {
        "files": [(str(path), state.st_size, state.st_mtime_ns) for path, state in states.items()],
        "config": dict(checkpoint.config),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }


def plans_by_rules(scores: Scores, rules: Sequence[Select], **how: Any) -> list[Plan]:
    """What every rule chooses by every metric. how: the other options of `plan`, which says what can go wrong."""
    plans = []
    for rule in rules:
        known = {"deepest": list(scores.metrics)[:1], "greedy": list(scores.orders)}.get(rule, list(scores.metrics))
        plans += [plan(scores, select=rule, metric=metric, **how) for metric in known]
    return plans
