"""Folding: what a deleted span did to the stream, as far as a linear map can, merged into weights that are there.

The last projection in front of a span adds M to the stream x. A map T is fitted so that x - M + M T comes as close as
it can to what the base has behind the span, and is merged into that projection: no parameter is added, and the
architecture stays what it was (ReplaceMe, arXiv:2505.02819). A block that keeps one half is a span of its own, whose
map goes into the last projection of that half. T is had in closed form, by ridge regression towards the identity, from
states of base and shortened model that walk side by side; later spans are fitted on what earlier maps give. How strong
the ridge is, and whether there is to be a map at all, is decided on other text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.progress import track
from shortcut.healing.cosine import turn
from shortcut.healing.streams import Streams, check_plan, find_projection, perplexity_behind
from shortcut.live.decoder import Batch, Decoder
from shortcut.live.offload import resident
from shortcut.records.block_lists import format_blocks
from shortcut.records.methods import Objective
from shortcut.records.plan import Plan

RIDGES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of what the projection adds


@dataclass(frozen=True)
class Fold:
    """A map for one span, merged into a projection of the block in front of it. Blocks are those of the base.

    Where half of that block is gone, the span starts with it. change: T - 1, (width, width), float64. before, after:
    perplexity on the text that decided, without and with it.
    """

    span: tuple[int, ...]
    block: int
    module: str
    ridge: float
    change: Tensor
    before: float
    after: float
    objective: Objective = "least-squares"

    def weights(self, block: nn.Module) -> dict[str, Tensor]:
        """The new weights of the projection, by name inside the block, in float32."""
        projection: Any = block.get_submodule(self.module)
        change = self.change.to(projection.weight.device)
        old = {name: weight.detach().double() for name, weight in projection.named_parameters(recurse=False)}
        sideways = projection.weight.shape[0] != len(change) or type(projection).__name__ == "Conv1D"
        new = {"weight": old["weight"] @ change if sideways else change.T @ old["weight"]}
        if "bias" in old:
            new["bias"] = old["bias"] @ change
        return {f"{self.module}.{name}": (old[name] + added).float() for name, added in new.items()}

    def record(self) -> dict[str, Any]:
        """Plain data, for the record of a checkpoint."""
        where = {"span": list(self.span), "block": self.block, "module": self.module}
        how = {"ridge": self.ridge, "objective": self.objective}
        return {**where, **how, "perplexity_before": self.before, "perplexity_after": self.after}

    def __str__(self) -> str:
        whole = tuple(block for block in self.span if block != self.block)
        gone = [f"half of block {self.block}"] * (self.block in self.span)
        gone += [f"blocks {format_blocks(whole)}"] * bool(whole)
        how = f"ridge {self.ridge:g}" + (", by cosine" if self.objective == "cosine" else "")
        return (
            f"{' and '.join(gone)} into {self.module} of block {self.block}: {how},"
            f" perplexity {self.before:.2f} -> {self.after:.2f} on the text that decided"
        )


def new_weights(decoder: Decoder, folds: Sequence[Fold]) -> dict[int, dict[str, Tensor]]:
    """By block of the base, and by name inside the block, the weights that hold these maps, in float32."""
    changed = {}
    for fold in folds:
        with resident(decoder.blocks[fold.block]):
            changed[fold.block] = fold.weights(decoder.blocks[fold.block])
    return changed


@torch.inference_mode()
def fit_folds(
    decoder: Decoder,
    plan: Plan,
    batches: Sequence[Batch],
    deciding: Sequence[Batch],
    *,
    objective: Objective = "least-squares",
    quiet: bool = True,
) -> list[Fold]:
    """Fit a map for every span, and every half, that a plan deletes from a live base, where one helps.

    batches: what maps are fitted on; deciding: other text, whose perplexity decides on the ridge, and on whether there
    is a map. objective: what is made small between the streams, their squared distance or the angle between them.
    Raises ShortcutError for blocks that cannot be run one by one, for plans that do more than drop blocks and halves,
    and where no projection in front of a span adds straight to the stream.
    """
    check_plan(decoder, plan, batches[0], "folding")
    fitting, checking = ([Streams.start(decoder, batch) for batch in each] for each in (batches, deciding))
    folds: list[Fold] = []
    span: tuple[int, ...] = ()
    front, name = -1, ""  # the last block that is not dropped, and the projection in it that takes the map
    for number in track(range(len(plan.actions)), "folding", quiet=quiet):
        action, ends = plan.actions[number], number + 1 not in plan.dropped
        if action == "drop":
            span = (*span, number)
        else:
            front, span = number, (number,) if number in plan.hollow else ()
            name = find_projection(decoder, number, fitting[0], action) if span or not ends else ""
        with resident(decoder.blocks[number]):
            for streams in (*fitting, *checking):
                streams.step(decoder, number, action, name)
        if span and ends and front >= 0:
            changes = solve(fitting, objective)
            price = partial(_perplexity, decoder, plan, number, checking)
            before, prices = price(None), {ridge: price(change) for ridge, change in changes.items()}
            best = min(prices, key=prices.__getitem__)
            if prices[best] < before:
                folds.append(Fold(span, front, name, best, changes[best], before, prices[best], objective))
                for streams in (*fitting, *checking):
                    streams.short = folded(streams, changes[best])
    return folds


def solve(fitting: Sequence[Streams], objective: Objective = "least-squares") -> dict[float, Tensor]:
    """By ridge, the change D = T - 1 that minimises ‖x + M D - y‖² + ridge ‖D‖² over all real tokens, in float64.

    For the cosine, what `turn` makes of it.
    """
    gram: Any = 0.0
    cross: Any = 0.0
    for streams in fitting:
        assert streams.added is not None
        mask = streams.batch.mask
        added, missing = (
            each[mask].double() for each in (streams.added, streams.base.to(streams.short.device) - streams.short)
        )
        gram, cross = gram + added.T @ added, cross + added.T @ missing
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    changes = {ridge: torch.linalg.solve(gram + ridge * unit, cross) for ridge in RIDGES}
    return (
        changes if objective == "least-squares" else {ridge: turn(fitting, changes[ridge], ridge) for ridge in RIDGES}
    )


def folded(streams: Streams, change: Tensor | None) -> Tensor:
    """The states of the shortened model behind a span, with a map in the place of it, or without one."""
    if change is None or streams.added is None:
        return streams.short
    return streams.short + (streams.added.double() @ change).to(streams.short.dtype)


def _perplexity(decoder: Decoder, plan: Plan, number: int, checking: Sequence[Streams], change: Tensor | None) -> float:
    """Of the shortened model, with a map in the place of a span that ends with this block, or without one."""
    return perplexity_behind(decoder, plan, number, checking, lambda streams: folded(streams, change))
