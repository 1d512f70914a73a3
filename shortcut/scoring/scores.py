"""All scores of a checkpoint, from a live model and its text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import identify
from shortcut.common.processes import own_part
from shortcut.common.progress import say
from shortcut.options.groups import Running
from shortcut.records.actions import Action
from shortcut.records.scores import Measured, Scores

if TYPE_CHECKING:
    from shortcut.live.batch import Batch
    from shortcut.live.decoder import Decoder
    from shortcut.material.examples import Material
    from shortcut.scoring.greedy import Removal
    from shortcut.scoring.metrics import Metric
    from shortcut.scoring.partial_sums import Partials


def make_scores(
    checkpoint: Checkpoint,
    live: Any,
    calibration: "Material",
    metrics: "Sequence[Metric]",
    how: Running,
    *,
    allow: Sequence[Action] = ("drop",),
    removal: "Removal | None" = None,
) -> Scores:
    """Score the blocks of a live model, and halves of them; goes on where an equal run was killed.

    removal: moves that are made one by one as well, by the first metric. Raises ShortcutError as `score_blocks` does.
    """
    from shortcut.live.blocks import device_of
    from shortcut.live.decoder import Decoder
    from shortcut.scoring.greedy import remove_greedily
    from shortcut.scoring.partial_sums import Partials

    device, scaled = device_of(live), removal is not None and removal.scaled
    settings: dict[str, Any] = {"device": str(device), "dtype": str(live.dtype).removeprefix("torch.")}
    settings |= {"batch_size": how.batch_size, "average": metrics[0].average, **({"scaled": True} if scaled else {})}
    partials = Partials({**settings, **identify(checkpoint), "calibration": calibration.hash, "part": own_part()})
    taken = calibration.batches(how.batch_size, device)
    decoder, sizes = Decoder.of(live, checkpoint.stack, taken[0]), checkpoint.block_parameters
    batches = [decoder.seen(batch) for batch in taken]
    _check(decoder, checkpoint.name, batches[0], scaled=scaled, quiet=how.quiet)
    hidden = _hide(decoder, checkpoint, batches)  # what metrics of predictions are about
    found = _score_all(decoder, batches, hidden, metrics, allow, partials, quiet=how.quiet)
    halves: Measured = {action: scores for action, scores in found.items() if action != "drop"}
    goes: dict[Action, tuple[int, ...]] = {action: _sizes(decoder, action, sizes) for action in halves}
    whole, record = found.get("drop", {}), calibration.record()
    scores = Scores(checkpoint.base, checkpoint.parameters, sizes, whole, record, settings, {}, halves, goes)
    if removal is not None:
        name, given = metrics[0].name, hidden if metrics[0].needs == "logits" else batches
        how_far: Any = {"allow": allow, "weights": scores.size, "partials": partials, "quiet": how.quiet}
        moves = remove_greedily(decoder, given, metrics[0], removal, **how_far)
        scores = replace(scores, orders={name: tuple(move for move, _ in moves)})
    partials.forget()
    return scores


def _score_all(
    decoder: "Decoder",
    batches: "list[Batch]",
    hidden: "list[Batch]",
    metrics: "Sequence[Metric]",
    allow: Sequence[Action],
    partials: "Partials",
    *,
    quiet: bool,
) -> Measured:
    """Scores by all metrics: those of predictions on text with tokens masked, where the model predicts these."""
    from shortcut.scoring.blocks import score_blocks

    of_logits = [metric for metric in metrics if metric.needs == "logits" and hidden is not batches]
    groups = ((batches, [metric for metric in metrics if metric not in of_logits]), (hidden, of_logits))
    parts = [score_blocks(decoder, b, own, allow=allow, partials=partials, quiet=quiet) for b, own in groups if own]
    names = [metric.name for metric in metrics]
    return {act: {name: part[act][name] for name in names for part in parts if name in part[act]} for act in allow}


def _hide(decoder: "Decoder", checkpoint: Checkpoint, batches: "list[Batch]") -> "list[Batch]":
    """The batches with some tokens masked, of a model that predicts these; else as they are."""
    from shortcut.live.load import load_tokenizer
    from shortcut.live.outcomes import masked

    if decoder.gives != "masked tokens":
        return batches
    mask = load_tokenizer(checkpoint.folder).mask_token_id
    return batches if mask is None else [masked(batch, mask) for batch in batches]


def _check(decoder: "Decoder", name: str, batch: "Batch", *, scaled: bool, quiet: bool) -> None:
    """Say what will be slow. Raise ShortcutError for what cannot be done with this decoder."""
    if scaled:
        decoder.check_alone("scaling")
    if decoder.fault is not None:
        slow = "the whole model runs for each of them, which is slow"
        say(f"the blocks of {name} cannot be run one by one ({decoder.fault}): {slow}", quiet=quiet)
    if batch.visual is not None and decoder.stack == "decoder":
        decoder.check_images(batch)


def _sizes(decoder: "Decoder", action: Action, whole: Sequence[int]) -> tuple[int, ...]:
    """How many parameters of every block go by an action; of packed weights the share that goes, of those there are."""
    sizes = []
    for block, parameters in enumerate(whole):
        going, all_of_it = (sum(w.numel() for w in decoder.weights(block, each)) for each in (action, "drop"))
        sizes.append(round(parameters * going / all_of_it))
    return tuple(sizes)
