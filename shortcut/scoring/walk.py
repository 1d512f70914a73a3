"""The walk: one pass through the blocks that gives the hidden states around each of them.

Once per batch, the decoder is run with every block replaced by a recorder, which notes what the block is called with
and returns its input at once. The blocks are then called one after the other, so that whoever walks sees the states
before and after each block, at the cost of one forward pass without the vocabulary projection. The states after the
last block are its own output, not the model's, which have gone through the final norm.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.errors import ShortcutError
from shortcut.live import Model, decode, find_blocks, forwards_replaced, hidden_input, hidden_output, output_forms
from shortcut.records.scores import Triangle
from shortcut.scoring.calibration import Batch
from shortcut.scoring.metrics import Metric, pairwise_cosines

TOKENS_AT_ONCE = 64  # for pairwise cosines: the stack of their states fits a processor's cache


@dataclass(frozen=True)
class Step:
    """One block of a walk: hidden states before and after it, (batch, tokens, width), in the model's type."""

    block: int
    before: Tensor
    after: Tensor


def walk(model: Model, batch: Batch) -> Iterator[Step]:
    """Yield every block's step in order, for one batch of tokens on the model's device."""
    blocks = find_blocks(model)
    calls = _record_calls(model, blocks, batch)
    hidden = hidden_input(*calls[0])
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        args, kwargs = _with_hidden(call, hidden)
        after = hidden_output(block(*args, **kwargs))
        yield Step(number, hidden, after)
        hidden = after


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _record_calls(model: Model, blocks: nn.ModuleList, batch: Batch) -> list[Call]:
    """What every block is called with in a forward pass of this batch; the blocks themselves do not run."""
    forms = output_forms(model)
    calls: dict[int, Call] = {}

    def recorder(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls[number] = (args, kwargs)
            return forms[number](hidden_input(args, kwargs))

        return forward

    # A full mask is left out: attention then takes its fastest path, as it does for text without padding.
    mask = None if batch.mask.all() else batch.mask.long()
    with forwards_replaced({block: recorder(number) for number, block in enumerate(blocks)}):
        decode(model, batch.ids, mask)
    return [calls[number] for number in range(len(blocks))]


def _with_hidden(call: Call, hidden: Tensor) -> Call:
    args, kwargs = call
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


@torch.inference_mode()
def score_blocks(
    model: Model, batches: Iterable[Batch], metrics: Sequence[Metric]
) -> dict[str, tuple[float, ...] | Triangle]:
    """Score every block, and every span for metrics that know spans, by one walk over the batches.

    Returns per metric (blocks,) or the triangle of `Scores`: means over all real tokens, or over sequences for metrics
    of the last token, summed in float64. Raises ShortcutError where the model's activations are not finite.
    """
    depth = len(find_blocks(model))
    shapes = {metric.name: (depth + 1, depth + 1) if metric.spans else (depth,) for metric in metrics}
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    counts = {"all": 0, "last": 0}
    for batch in batches:
        counts["all"] += int(batch.mask.sum())
        counts["last"] += len(batch.mask)
        _add_batch(model, batch, metrics, sums)
    scores: dict[str, tuple[float, ...] | Triangle] = {}
    for metric in metrics:
        mean = sums[metric.name] / counts[metric.tokens]
        spans = (tuple(mean.diagonal(length).tolist()) for length in range(1, depth + 1))
        scores[metric.name] = tuple(spans) if metric.spans else tuple(mean.tolist())
    return scores


def _add_batch(model: Model, batch: Batch, metrics: Sequence[Metric], sums: dict[str, Tensor]) -> None:
    of_spans = [metric for metric in metrics if metric.spans]
    rows = batch.mask if any(metric.tokens == "all" for metric in of_spans) else _last_token(batch.mask)
    points: list[Tensor] = []
    for step in walk(model, batch):
        before, after = step.before[batch.mask].float(), step.after[batch.mask].float()
        if not after.sum().isfinite():
            raise ShortcutError(
                f"block {step.block} gives NaN or infinity in {step.after.dtype}: use --dtype float32 or bfloat16"
            )
        for metric in metrics:
            if not metric.spans:
                sums[metric.name][step.block] += metric.measure(before, after).double().sum().cpu()
        if of_spans:
            points += [state[rows].float() for state in ([] if points else [step.before]) + [step.after]]
    if of_spans:
        _add_spans(points, _last_token(batch.mask)[rows], of_spans, sums)


def _add_spans(points: Sequence[Tensor], last: Tensor, metrics: Sequence[Metric], sums: dict[str, Tensor]) -> None:
    """points: the states between the blocks, each (tokens, width); last: (tokens,), True where a sequence ends."""
    for start in range(0, len(last), TOKENS_AT_ONCE):
        chunk = slice(start, start + TOKENS_AT_ONCE)
        cosines = pairwise_cosines(torch.stack([point[chunk] for point in points], dim=1))
        for metric in metrics:
            values = metric.measure(cosines if metric.tokens == "all" else cosines[last[chunk]])
            sums[metric.name] += values.sum(0).double().cpu()


def _last_token(mask: Tensor) -> Tensor:
    """True on the last unmasked position of every sequence: (batch, tokens)."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return positions == (positions * mask).amax(1, keepdim=True)
