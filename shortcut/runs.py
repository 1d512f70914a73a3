"""What every verb that runs a model does: take text, open the model, score it, and choose by what came out."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import __version__
from shortcut.anatomy import sees_images, visual_tokens
from shortcut.choose.rules import Select
from shortcut.commands import plan
from shortcut.errors import ShortcutError
from shortcut.processes import own_part
from shortcut.progress import say
from shortcut.records.actions import Action, Move
from shortcut.records.plan import Plan
from shortcut.records.scores import Measured, Scores
from shortcut.scoring.documents import Source
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.stage import check_file

if TYPE_CHECKING:
    from shortcut.decoder import Decoder
    from shortcut.scoring.metrics import Metric
    from shortcut.scoring.pictures import Material


# When a result is checked: sequences of text, or questions about images; and tokens of a sequence at most.
HELDOUT_SAMPLES, HELDOUT_LENGTH = {"text": 16, "images": 64}, 512


def check_files(out: Path | None, plot: Path | None) -> None:
    """Raise ShortcutError, before the long work, for files that could not be written after it."""
    if out is not None:
        check_file(out)
    if plot is not None:
        from shortcut.publish.plots import check_picture

        check_picture(plot)


def take_text(
    checkpoint: Checkpoint,
    source: Source,
    samples: int,
    *,
    trust_remote_code: bool,
    seed: int,
    images: bool = False,
    fewer: bool = False,
    **how: Any,
) -> "Material":
    """Tokenise text for a checkpoint, or questions about images, where the source has images and the model sees them.

    images: whether there have to be any; fewer: whether fewer samples will do, where there are no more. how: the other
    options of `make_calibration`, which says what can go wrong, as does `make_pictures`.
    """
    from shortcut.live import load_processor, load_tokenizer
    from shortcut.scoring.calibration import make_calibration
    from shortcut.scoring.pictures import holds_images, make_pictures

    if images or (sees_images(checkpoint.config) and holds_images(source)):
        visual = visual_tokens(checkpoint.config)
        processor = load_processor(checkpoint.folder, trust_remote_code=trust_remote_code)
        return make_pictures(processor, visual, source, samples=samples, seed=seed, fewer=fewer)
    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code)
    return make_calibration(tokenizer, source, samples=samples, seed=seed, fewer=fewer, **how)


def take_unseen(
    checkpoint: Checkpoint, source: Source, *, length: int, images: bool, trust_remote_code: bool
) -> "Material":
    """The text, or the questions about images, that a result is compared with its base on: always the same."""
    samples = HELDOUT_SAMPLES["images" if images else "text"]
    trust = {"trust_remote_code": trust_remote_code}
    return take_text(checkpoint, source, samples, seed=0, length=min(length, HELDOUT_LENGTH), images=images, **trust)


def open_base(plan: Plan, base: str | None, revision: str | None, *, quiet: bool) -> Checkpoint:
    """What a plan says was cut, or another copy of it; of that, the plan's revision says nothing."""
    known = plan.base.revision if base is None else None
    return open_model(base or plan.base.model, revision or known, quiet=quiet)


def start(checkpoint: Checkpoint, **how: Any) -> AbstractContextManager[Any]:
    """The live model of a checkpoint, for the length of a `with` block. how: the options of `open_live`."""
    from shortcut.offload import open_live

    return open_live(checkpoint.folder, checkpoint.config, checkpoint.parameters, **how)


def check_scaled(scaled: bool, greedy: int) -> None:
    """Raise ShortcutError where there is no second scoring to scale anything for."""
    if scaled and not greedy:
        raise ShortcutError("--scaled is for blocks that go one by one: score --greedy N, or --select greedy")


def make_scores(
    checkpoint: Checkpoint,
    live: Any,
    calibration: "Material",
    metrics: "Sequence[Metric]",
    batch_size: int,
    *,
    allow: Sequence[Action] = ("drop",),
    greedy: int = 0,
    share: float = 1,
    scaled: bool = False,
    may_go: Sequence[int] = (),
    quiet: bool = False,
) -> Scores:
    """Score the blocks of a live model, and halves of them; goes on where an equal run was killed.

    greedy: moves made one by one by the first metric, until this share of the parameters has gone; scaled: as
    for `remove_greedily`. Raises ShortcutError as `score_blocks` does.
    """
    from shortcut.decoder import Decoder
    from shortcut.live import device_of
    from shortcut.scoring.blocks import score_blocks
    from shortcut.scoring.greedy import remove_greedily
    from shortcut.scoring.partial import Partials

    device = device_of(live)
    batches = calibration.batches(batch_size, device)
    settings: dict[str, Any] = {"device": str(device), "dtype": str(live.dtype).removeprefix("torch.")}
    settings |= {"batch_size": batch_size, "average": metrics[0].average, **({"scaled": True} if scaled else {})}
    partials = Partials({**settings, **identify(checkpoint), "calibration": calibration.hash, "part": own_part()})
    decoder, sizes, total = Decoder.of(live), checkpoint.block_parameters, checkpoint.parameters
    if scaled:
        decoder.check_alone("scaling")
    if decoder.fault is not None:
        slow = "the whole model runs for each of them, which is slow"
        say(f"the blocks of {checkpoint.name} cannot be run one by one ({decoder.fault}): {slow}", quiet=quiet)
    if batches[0].visual is not None:
        decoder.check_images(batches[0])
    how: dict[str, Any] = {"allow": allow, "partials": partials, "quiet": quiet}
    found = score_blocks(decoder, batches, metrics, **how)
    halves: Measured = {action: scores for action, scores in found.items() if action != "drop"}
    goes: dict[Action, tuple[int, ...]] = {action: _sizes(decoder, action, sizes) for action in halves}
    order: list[Move] = []
    if greedy:
        how["weights"] = lambda block, action: {**goes, "drop": sizes}[action][block] if action != "keep" else 0
        how |= {"enough": share * total, "scaled": scaled}
        order = [move for move, _ in remove_greedily(decoder, batches, metrics[0], greedy, may_go, **how)]
    partials.forget()
    return Scores(
        base=checkpoint.base,
        parameters=total,
        block_parameters=sizes,
        metrics=found.get("drop", {}),
        calibration=calibration.record(),
        settings=settings,
        orders={metrics[0].name: tuple(order)} if greedy else {},
        halves=halves,
        half_parameters=goes,
    )


def _sizes(decoder: "Decoder", action: Action, whole: Sequence[int]) -> tuple[int, ...]:
    """How many parameters of every block go by an action; of packed weights the share that goes, of those there are."""
    sizes = []
    for block, parameters in enumerate(whole):
        going, all_of_it = (sum(w.numel() for w in decoder.weights(block, each)) for each in (action, "drop"))
        sizes.append(round(parameters * going / all_of_it))
    return tuple(sizes)


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
        known = {"deepest": scores.names[:1], "greedy": list(scores.orders)}.get(rule, scores.names)
        plans += [plan(scores, select=rule, metric=metric, **how) for metric in known]
    return plans
