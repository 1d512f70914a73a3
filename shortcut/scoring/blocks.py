"""Scores of all blocks, of halves of them, and of all spans, from as few passes through the blocks as metrics need."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import track
from shortcut.live.batch import Batch
from shortcut.live.blocks import device_of
from shortcut.live.decoder import Decoder
from shortcut.live.offload import free_memory, is_offloaded
from shortcut.records.actions import FREEZING, GONE, Action
from shortcut.records.scores import Measured
from shortcut.scoring.accumulate import Sums, add_batch, key, rows_key, weights
from shortcut.scoring.gradients import score_weights
from shortcut.scoring.metrics import Metric
from shortcut.scoring.pairs import score_pairs
from shortcut.scoring.partial_sums import Partials
from shortcut.scoring.spill import Budget
from shortcut.scoring.walk import NOTHING, UNSCALED, run_together

STATES_IN_MEMORY = 1 << 26  # bytes of hidden states, where the blocks are on the disk; the others go there too
TOKENS_PER_READING = 1 << 12  # for which a block is read from the disk once: a processor needs far longer for them
TOKENS_PER_READING_ON_GPU = 1 << 16


def score_blocks(
    decoder: Decoder,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    *,
    allow: Sequence[Action] = ("drop",),
    partials: Partials | None = None,
    quiet: bool = True,
) -> Measured:
    """Score every block, and every span for metrics that know spans; or halves of blocks.

    allow: what may be done to a block; a score says how much what then goes matters. Returns scores by action and
    metric: (blocks,), or the triangle of `Scores`: means over tokens or sequences, summed in float64. What needs
    states, spans or logits shares one walk over the batches, which goes on from `partials`. Raises ShortcutError where
    the model's activations are not finite, its blocks cannot be run one by one, or halves cannot be told.
    """
    of_weights = [metric for metric in metrics if metric.needs in ("gradients", "weights")]
    of_pairs = [metric for metric in metrics if metric.needs == "pairs"]
    walked = [metric for metric in metrics if metric not in (*of_weights, *of_pairs)]
    if (of_weights or of_pairs) and (batches[0].visual is not None or set(allow) & set(FREEZING)):
        raise ShortcutError(f"{(of_weights + of_pairs)[0].name} is for text, and says nothing of images")
    if of_pairs and list(allow) != ["drop"]:
        raise ShortcutError(f"{of_pairs[0].name} scores whole blocks only, not {', '.join(allow)}")
    parts: list[Measured] = []
    if walked:
        parts.append(score_walked(decoder, batches, walked, allow, partials=partials, quiet=quiet))
    if of_pairs:
        parts.append({"drop": dict(score_pairs(decoder, batches, of_pairs, partials=partials, quiet=quiet))})
    if of_weights:
        parts.append(score_weights(decoder, batches, of_weights, allow, partials=partials, quiet=quiet))
    return {
        action: {m.name: part[action][m.name] for m in metrics for part in parts if m.name in part[action]}
        for action in allow
    }


@torch.inference_mode()
def score_walked(
    decoder: Decoder,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    allow: Sequence[Action],
    done: Mapping[int, Action] = NOTHING,
    scales: Mapping[int, float] = UNSCALED,
    *,
    partials: Partials | None,
    quiet: bool,
) -> Measured:
    """done: what has been done to blocks already; "keep" gives metrics of logits of the model as it is then.

    scales: as for `walk`.
    """
    depth = len(decoder.blocks)
    sums = {
        key(metric, action): torch.zeros(
            (depth + 1, depth + 1) if metric.needs == "spans" and action == "drop" else (depth,), dtype=torch.float64
        )
        for metric in metrics
        for action in GONE
    }
    sums |= {} if decoder.predicts else {rows_key(metric): torch.zeros(1, dtype=torch.float64) for metric in metrics}
    together = is_offloaded(decoder.model)
    own = share(batches)
    device = device_of(decoder.model)
    per_reading = TOKENS_PER_READING if device.type == "cpu" else TOKENS_PER_READING_ON_GPU
    kept = partials.of(metrics, allow, done, scales) if partials else None
    through = kept.restore(sums) if kept else 0
    groups = _groups(own[through:], per_reading if together else 1)
    room = STATES_IN_MEMORY if together else free_memory(device) // 2
    for group in track(groups, "scoring", quiet=quiet):
        with TemporaryDirectory(prefix="shortcut-") as folder:
            budget = Budget(room, Path(folder))
            walks = [add_batch(decoder, b, metrics, allow, done, sums, budget, scales) for b in group]
            run_together(decoder, walks, done)
        through += len(group)
        if kept:
            kept.save(sums, through)
    return _means(sums, metrics, allow, batches, depth)


def _means(
    sums: Sums, metrics: Sequence[Metric], allow: Sequence[Action], batches: Sequence[Batch], depth: int
) -> Measured:
    """Scores from sums over all batches: by action and metric."""
    scores: Measured = {action: {} for action in GONE}
    for metric in metrics:
        for action in GONE:
            if action in FREEZING and action not in allow:
                continue
            rows = add_up(sums[rows_key(metric)]).item() if rows_key(metric) in sums else 0
            count = rows or sum(weights(metric, batch, action).sum().item() for batch in batches)
            mean = add_up(sums[key(metric, action)]) / count
            scores[action][metric.name] = (
                tuple(map(metric.finish, mean.tolist()))
                if mean.dim() == 1
                else tuple(tuple(mean.diagonal(length).tolist()) for length in range(1, depth + 1))
            )
    return scores


def _groups(batches: Sequence[Batch], at_least: int) -> list[list[Batch]]:
    """Split batches into groups of at least so many tokens each, but for the last."""
    groups: list[list[Batch]] = []
    tokens = at_least
    for batch in batches:
        if tokens >= at_least:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += batch.ids.numel()
    return groups
