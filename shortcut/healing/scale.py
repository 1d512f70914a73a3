"""Scaling: the length that a deleted span gave to the stream, won back by one number for every span.

The stream behind a span is longer than in front of it, by alpha on average (Prune&Comp, arXiv:2507.18212). What a
pre-norm block adds does not depend on how long its input is, so that a stream times alpha is the same to all later
blocks, and to the head, as a stream that they add to 1/alpha as much: the last projections of their halves are divided
by alpha, biases too, and embeddings stay as they are. No parameter is added. That a block really is so is tried, not
taken from its family's name. Whether a number stays is decided on other text.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import track
from shortcut.healing.projections import OUTPUT_TOLERANCE, find_projection
from shortcut.healing.streams import (
    Streams,
    check_plan,
    output_of,
    perplexities_behind,
)
from shortcut.live.batch import Batch
from shortcut.live.decoder import PROBE, Decoder
from shortcut.live.offload import resident
from shortcut.records.actions import GONE, Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan

TRIED = 2.0  # a number by which streams are shortened to see what depends on their length


@dataclass(frozen=True)
class Scale:
    """The number for one span, and by later block the projections that are divided by it. Blocks are those of the base.

    before, after: perplexity on the text that decided, without and with it.
    """

    span: tuple[int, ...]
    alpha: float
    before: float
    after: float
    projections: Mapping[int, tuple[str, ...]]

    def record(self) -> dict[str, Any]:
        """Plain data, for the record of a checkpoint."""
        prices = {"perplexity_before": self.before, "perplexity_after": self.after}
        return {"span": list(self.span), "alpha": self.alpha, **prices}

    def __str__(self) -> str:
        return (
            f"blocks {format_blocks(self.span)} as {self.alpha:.4f} times the stream:"
            f" perplexity {self.before:.2f} -> {self.after:.2f} on the text that decided"
        )


def new_weights(decoder: Decoder, scales: Sequence[Scale]) -> dict[int, dict[str, Tensor]]:
    """By block of the base, and by name inside the block, the weights that hold these numbers, in float32."""
    divisors: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(lambda: 1.0))
    for scale in scales:
        for number, names in scale.projections.items():
            for name in names:
                divisors[number][name] *= scale.alpha
    changed = {}
    for number, by_name in divisors.items():
        with resident(decoder.blocks[number]):
            changed[number] = {
                f"{name}.{weight}": (values.detach().double() / divisor).float()
                for name, divisor in by_name.items()
                for weight, values in decoder.blocks[number].get_submodule(name).named_parameters(recurse=False)
            }
    return changed


@torch.inference_mode()
def fit_scales(
    decoder: Decoder, plan: Plan, batches: Sequence[Batch], deciding: Sequence[Batch], *, quiet: bool = True
) -> list[Scale]:
    """Fit a number for every span that a plan drops from a live base, where one helps; none for halves.

    batches: what lengths are taken from; deciding: other text, whose perplexity decides. Raises ShortcutError for
    blocks that cannot be run one by one, for plans that do more than drop blocks and halves, and where what blocks
    behind a span add depends on the length of the stream.
    """
    check_plan(decoder, plan, batches[0], "scaling")
    projections = _find_projections(decoder, plan, batches[0])
    fitting, checking = ([Streams.start(decoder, batch) for batch in share(each)] for each in (batches, deciding))
    scales: list[Scale] = []
    for number in track(range(len(plan.actions)), "scaling", quiet=quiet):
        with resident(decoder.blocks[number]):
            for streams in (*fitting, *checking):
                streams.step(decoder, number, plan.actions[number])
        later = {block: names for block, names in projections.items() if block > number}
        if plan.actions[number] != "drop" or number + 1 not in later:
            continue
        front = max((block for block in plan.kept if block < number), default=-1)
        alpha = measure(fitting)
        tried = [[streams.short * each for streams in checking] for each in (1.0, alpha)]
        before, after = perplexities_behind(decoder, plan, number, checking, tried)
        if after < before:
            scales.append(Scale(tuple(range(front + 1, number + 1)), alpha, before, after, later))
            for streams in (*fitting, *checking):
                streams.short = streams.short * alpha
    return scales


def measure(fitting: Sequence[Streams]) -> float:
    """How many times as long the stream is behind a span as in front of it: mean of ‖y‖ / ‖x‖ over all real tokens.

    Tokens without any length count for nothing. The arithmetic is float32. Of several processes each has its own.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for streams in fitting:
        before, after = (
            each[streams.batch.mask].float().norm(dim=-1)
            for each in (streams.short, streams.base.to(streams.short.device))
        )
        ratios = (after / before)[before > 0].double()
        sums += torch.stack([ratios.sum(), torch.tensor(len(ratios)).to(ratios)]).cpu()
    total, count = add_up(sums).tolist()
    return total / count


def _find_projections(decoder: Decoder, plan: Plan, batch: Batch) -> dict[int, tuple[str, ...]]:
    """By block behind the first span, the last projection in each of its halves, or raise as `fit_scales` does."""
    behind = [number for number in plan.kept if number > min(plan.dropped, default=number)]
    if not behind:
        return {}
    streams = Streams.start(decoder, Batch(batch.ids[:1, :PROBE], batch.mask[:1, :PROBE]))
    streams.short = torch.randn(streams.short.shape, generator=torch.Generator().manual_seed(0)).to(streams.short)
    found = {}
    for number in behind:
        action = plan.actions[number]
        halves: Sequence[Action] = (action,) if GONE[action] else ("attention-only", "mlp-only")
        with resident(decoder.blocks[number]):
            found[number] = tuple(find_projection(decoder, number, streams, half) for half in halves)
            _check_block(decoder, number, action, found[number], streams)
    rows, family = streams.short[0], decoder.model.config.model_type
    if not _alike(decoder.predict(rows / TRIED), decoder.predict(rows)):
        raise ShortcutError(f"cannot scale {family}: what it predicts depends on the length of its last states")
    return found


def _check_block(decoder: Decoder, number: int, action: Action, names: Sequence[str], streams: Streams) -> None:
    """Raise ShortcutError where dividing what these projections give is not dividing the whole stream."""
    call, states = streams.calls[number], streams.short
    expected = decoder.run(number, states, call, action) / TRIED
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(output_of(decoder.blocks[number], name, lambda _, output: output / TRIED))
        found = decoder.run(number, states / TRIED, call, action)
    if not _alike(found, expected):
        family = decoder.model.config.model_type
        raise ShortcutError(f"cannot scale block {number} of {family}: what it adds depends on the stream's length")


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= OUTPUT_TOLERANCE * expected.abs().max())
