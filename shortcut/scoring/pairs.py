"""Scores of spans that look at the states before and after them over all tokens together, such as a fitted map."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import track
from shortcut.live.batch import Batch
from shortcut.live.blocks import device_of
from shortcut.live.decoder import Decoder, check_finite
from shortcut.live.offload import free_memory, is_offloaded
from shortcut.records.scores import Triangle
from shortcut.scoring.metrics import Metric
from shortcut.scoring.partial_sums import Partials
from shortcut.scoring.spill import Budget, SpillDict
from shortcut.scoring.walk import NOTHING, WHOLE, run_together, walk

ENOUGH = 2  # times as many tokens as the states are wide: with fewer, a map fits anything


@torch.inference_mode()
def score_pairs(
    decoder: Decoder, batches: Sequence[Batch], metrics: Sequence[Metric], *, partials: Partials | None, quiet: bool
) -> dict[str, Triangle]:
    """Score every span of every length by what goes into it and comes out, over all tokens at once.

    The states between all blocks are kept, in memory or in files; fits go on from `partials`. Raises ShortcutError for
    too few tokens, and where the states are not finite.
    """
    decoder.check_alone(metrics[0].name)
    depth, tokens = len(decoder.blocks), sum(int(batch.mask.sum()) for batch in batches)
    with TemporaryDirectory(prefix="shortcut-") as folder:
        budget = Budget(free_memory(device_of(decoder.model)) // 4, Path(folder))
        points: list[SpillDict[int]] = [SpillDict(budget) for _ in range(depth + 1)]
        runs = [_keep(decoder, batch, points, number) for number, batch in enumerate(batches)]
        for group in [runs] if is_offloaded(decoder.model) else [[run] for run in runs]:
            run_together(decoder, group)
        width = points[0][0].shape[1]
        if tokens < ENOUGH * width:
            enough = f"{ENOUGH * width} tokens at least, {ENOUGH} times the width of the states"
            raise ShortcutError(f"{metrics[0].name} needs {enough}, and there are {tokens}: use more --samples")
        sums = {metric.name: torch.zeros(depth + 1, depth + 1, dtype=torch.float64) for metric in metrics}
        kept = partials.of(metrics, WHOLE, NOTHING) if partials else None
        done, own = kept.restore(sums) if kept else 0, share(range(depth))
        for count, start in enumerate(track(own[done:], "fitting", quiet=quiet), done + 1):
            before = _together(points[start])
            for stop in range(start + 1, depth + 1):
                after = _together(points[stop])
                for metric in metrics:
                    sums[metric.name][start, stop] = metric.measure(before, after).item()
            if kept:
                kept.save(sums, count)
    found = {}
    for metric in metrics:
        values = add_up(sums[metric.name])
        if not values.isfinite().all():
            raise ShortcutError(f"{metric.name} is not finite: use --dtype float32 or bfloat16")
        found[metric.name] = tuple(tuple(values.diagonal(length).tolist()) for length in range(1, depth + 1))
    return found


def _keep(decoder: Decoder, batch: Batch, points: Sequence[SpillDict[int]], number: int) -> Iterator[None]:
    """Walk with one batch and keep the states of its real tokens before and after every block."""
    for step in walk(decoder, batch):
        if step.block == 0:
            points[0][number] = step.before[batch.mask.to(step.before.device)].to(batch.ids.device)
        after = step.after[batch.mask.to(step.after.device)].to(batch.ids.device)
        check_finite(after.float(), f"block {step.block}", after.dtype)
        points[step.block + 1][number] = after
        yield


def _together(point: SpillDict[int]) -> Tensor:
    return torch.cat([*point.values()]).float()
