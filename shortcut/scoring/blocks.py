"""Scores of all blocks, and of all spans, from as few passes through the blocks as the metrics need."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from shortcut.errors import ShortcutError
from shortcut.live import Model
from shortcut.offload import free_memory, is_offloaded
from shortcut.processes import add_up, share
from shortcut.progress import track
from shortcut.records.scores import Triangle
from shortcut.scoring.calibration import Batch
from shortcut.scoring.gradients import score_weights
from shortcut.scoring.metrics import Metric, pairwise_cosines
from shortcut.scoring.pairs import score_pairs
from shortcut.scoring.partial import Partials
from shortcut.scoring.store import Budget, Store
from shortcut.scoring.walk import Decoder, check_finite, run_together, walk

TOKENS_AT_ONCE = 64  # for pairwise cosines: the stack of their states fits a processor's cache
STATES_IN_MEMORY = 1 << 28  # bytes of hidden states, where the blocks are on the disk; the others go there too
LOGITS_AT_ONCE = 1 << 22  # log probabilities of one stream in memory: 16 MB; more is slower on a CPU


def score_blocks(
    model: Model,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    *,
    partials: Partials | None = None,
    quiet: bool = True,
) -> dict[str, tuple[float, ...] | Triangle]:
    """Score every block, and every span for metrics that know spans.

    Returns per metric (blocks,) or the triangle of `Scores`: means over tokens or sequences, summed in float64. What
    needs states, spans or logits shares one walk over the batches, which goes on from `partials`. Raises ShortcutError
    where the model's activations are not finite, and where its blocks cannot be run one by one.
    """
    decoder = Decoder.of(model)
    of_weights = [metric for metric in metrics if metric.needs in ("gradients", "weights")]
    of_pairs = [metric for metric in metrics if metric.needs == "pairs"]
    walked = [metric for metric in metrics if metric not in (*of_weights, *of_pairs)]
    found = _score_walked(decoder, batches, walked, partials=partials, quiet=quiet) if walked else {}
    if of_pairs:
        found |= score_pairs(decoder, batches, of_pairs, quiet=quiet)
    if of_weights:
        found |= score_weights(decoder, batches, of_weights, quiet=quiet)
    return {metric.name: found[metric.name] for metric in metrics}


def check_greedy(metric: Metric, count: int, candidates: int, depth: int) -> None:
    """Raise ShortcutError where this many blocks cannot be left out one by one, of so many candidates."""
    if metric.needs not in ("states", "logits"):
        raise ShortcutError(f"{metric.name} cannot be scored again as blocks go: use a metric of states or logits")
    most = min(candidates, depth - 1)
    if not 0 < count <= most:
        raise ShortcutError(f"cannot leave out {count} blocks one by one: 1 to {most} can go")


def remove_greedily(
    model: Model,
    batches: Sequence[Batch],
    metric: Metric,
    count: int,
    candidates: Iterable[int],
    *,
    partials: Partials | None = None,
    quiet: bool = True,
) -> Iterator[tuple[int, float]]:
    """Remove the block that scores lowest, score what remains, and so on; yields each block and its score then (SLEB).

    Metrics of logits compare with the whole model all along. Ties go to the deeper block. Raises ShortcutError as
    `score_blocks` and `check_greedy` do.
    """
    decoder, left, missing = Decoder.of(model), set(candidates), set[int]()
    check_greedy(metric, count, len(left), len(decoder.blocks))
    for _ in track(range(count), "removing", quiet=quiet):
        scores: Any = _score_walked(decoder, batches, [metric], missing, partials=partials, quiet=True)[metric.name]
        lowest = min(left, key=lambda block: (scores[block], -block))
        yield lowest, scores[lowest]
        left.remove(lowest)
        missing.add(lowest)


@torch.inference_mode()
def _score_walked(
    decoder: Decoder,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    missing: Collection[int] = (),
    *,
    partials: Partials | None,
    quiet: bool,
) -> dict[str, tuple[float, ...] | Triangle]:
    """missing: blocks that are left out; their scores mean nothing."""
    depth = len(decoder.blocks)
    shapes = {metric.name: (depth + 1, depth + 1) if metric.needs == "spans" else (depth,) for metric in metrics}
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    together = is_offloaded(decoder.model)
    own = share(batches)
    groups = [own] if together else [[batch] for batch in own]
    kept = partials.of(metrics, missing) if partials else None
    done = kept.restore(sums) if kept else 0
    room = STATES_IN_MEMORY if together else free_memory(decoder.model.device) // 2
    for number, group in enumerate(track(groups[done:], "scoring", quiet=quiet), done + 1):
        with TemporaryDirectory(prefix="shortcut-") as folder:
            budget = Budget(room, Path(folder))
            run_together(decoder, [_measure(decoder, b, metrics, missing, sums, budget) for b in group], missing)
        if kept:
            kept.save(sums, number)
    scores: dict[str, tuple[float, ...] | Triangle] = {}
    for metric in metrics:
        mean = add_up(sums[metric.name]) / sum(weights(metric, batch).sum().item() for batch in batches)
        if metric.needs == "spans":
            scores[metric.name] = tuple(tuple(mean.diagonal(length).tolist()) for length in range(1, depth + 1))
        else:
            scores[metric.name] = tuple(map(metric.finish, mean.tolist()))
    return scores


def chosen(metric: Metric, batch: Batch) -> Tensor:
    """Which tokens a metric's mean runs over: (batch, tokens)."""
    if metric.tokens == "last":
        positions = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        return positions == (positions * batch.mask).amax(1, keepdim=True)
    if metric.tokens == "followed":
        return torch.cat([batch.mask[:, 1:], torch.zeros_like(batch.mask[:, :1])], dim=1)
    return batch.mask


def weights(metric: Metric, batch: Batch) -> Tensor:
    """How much every token counts in a metric's mean: (batch, tokens), float64, 0 where it does not."""
    counted = chosen(metric, batch).double()
    return counted if metric.average == "tokens" else counted / counted.sum(1, keepdim=True).clamp_min(1)


def _measure(
    decoder: Decoder,
    batch: Batch,
    metrics: Sequence[Metric],
    missing: Collection[int],
    sums: dict[str, Tensor],
    budget: Budget,
) -> Iterator[None]:
    """Walk with one batch, a block at a time, and add what the metrics measure."""
    of_steps, of_spans, of_logits = (
        [metric for metric in metrics if metric.needs == needs] for needs in ("states", "spans", "logits")
    )
    ablated = Store(budget) if of_logits else None
    points = Store(budget)  # between the blocks
    rows = _union(of_spans, batch)
    counts = {metric.name: weights(metric, batch)[batch.mask] for metric in of_steps}
    for step in walk(decoder, batch, ablated, missing):
        before, after = step.before[batch.mask].float(), step.after[batch.mask].float()
        check_finite(after, f"block {step.block}", step.after.dtype)
        for metric in of_steps:
            values = metric.measure(before, after).double()
            sums[metric.name][step.block] += (values @ counts[metric.name]).cpu()
        if of_spans:
            points.setdefault(0, step.before[rows])
            points[len(points)] = step.after[rows]
        yield
    if of_spans:
        _add_spans(
            [*points.values()], {metric.name: weights(metric, batch)[rows] for metric in of_spans}, of_spans, sums
        )
    if ablated is not None:
        final = step.after
        if missing:
            *_, last = walk(decoder, batch)
            final = last.after
        _add_ablations(decoder, batch, final, ablated, of_logits, sums)


def _union(metrics: Sequence[Metric], batch: Batch) -> Tensor:
    """The tokens that any of these metrics looks at: (batch, tokens)."""
    return torch.stack([torch.zeros_like(batch.mask), *(chosen(metric, batch) for metric in metrics)]).any(0)


def _add_spans(
    points: Sequence[Tensor], counts: dict[str, Tensor], metrics: Sequence[Metric], sums: dict[str, Tensor]
) -> None:
    """points: the states between the blocks, each (tokens, width); counts: per metric, what each token counts."""
    for start in range(0, len(points[0]), TOKENS_AT_ONCE):
        chunk = slice(start, start + TOKENS_AT_ONCE)
        cosines = pairwise_cosines(torch.stack([point[chunk].float() for point in points], dim=1))
        for metric in metrics:
            which = counts[metric.name][chunk]
            values = metric.measure(cosines[which > 0]).double()
            sums[metric.name] += torch.tensordot(which[which > 0], values, dims=1).cpu()


def _add_ablations(
    decoder: Decoder,
    batch: Batch,
    final: Tensor,
    ablated: Mapping[int, Tensor],
    metrics: Sequence[Metric],
    sums: dict[str, Tensor],
) -> None:
    """final: the whole model's states behind the last block, (batch, tokens, width); ablated: those without a block."""
    rows = _union(metrics, batch)
    targets = batch.ids.roll(-1, dims=1)[rows]
    counts = {metric.name: weights(metric, batch)[rows] for metric in metrics}
    room = max(1, LOGITS_AT_ONCE // decoder.vocabulary)
    for start in range(0, len(targets), room):
        chunk = slice(start, start + room)
        base = decoder.predict(final[rows][chunk])
        for block, states in ablated.items():
            without = decoder.predict(states[rows][chunk])
            check_finite(without, f"the model without block {block}", states.dtype)
            for metric in metrics:
                count = counts[metric.name][chunk]
                which = count > 0
                values = metric.measure(base[which], without[which], targets[chunk][which]).double()
                sums[metric.name][block] += (values @ count[which]).cpu()
