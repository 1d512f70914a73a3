"""Folding: what a deleted span did to the stream, as far as a linear map can, merged into weights that are there.

The MLP of the last block in front of a span adds M to the stream x. A map T is fitted so that x - M + M T comes as
close as it can to what the base has behind the span, and is merged into the projection that gives M: no parameter is
added, and the architecture stays what it was (ReplaceMe, arXiv:2505.02819). T is had in closed form, by ridge
regression towards the identity, from states of base and shortened model that walk side by side; later spans are fitted
on what earlier maps give. How strong the ridge is, and whether there is to be a map at all, is decided on other text.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.decoder import Batch, Call, Decoder
from shortcut.errors import ShortcutError
from shortcut.live import call_block, hidden_input
from shortcut.offload import resident
from shortcut.progress import track
from shortcut.records.blocks import format_blocks
from shortcut.records.plan import Plan
from shortcut.scoring.sums import LOGITS_AT_ONCE
from shortcut.scoring.walk import check_finite

RIDGES = (1e-5, 1e-3, 1e-2, 1e-1, 1.0)  # times the mean square of what the MLP adds
TOLERANCE = 1e-3  # of what is added to a projection's output, and has to come out of its block


@dataclass(frozen=True)
class Fold:
    """A map for one span, merged into a projection of the block in front of it. Blocks are those of the base.

    change: T - 1, (width, width), float64. before, after: perplexity on the text that decided, without and with it.
    """

    span: tuple[int, ...]
    block: int
    module: str
    ridge: float
    change: Tensor
    before: float
    after: float

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

    def __str__(self) -> str:
        where = f"blocks {format_blocks(self.span)} into {self.module} of block {self.block}"
        return (
            f"{where}: ridge {self.ridge:g}, perplexity {self.before:.2f} -> {self.after:.2f} on the text that decided"
        )


@dataclass
class Streams:
    """A batch on its way through the base and through the shortened model: the states of both, and the calls.

    added: what the projection in front of a span adds to the states of the shortened model.
    """

    batch: Batch
    calls: list[Call]
    base: Tensor
    short: Tensor
    added: Tensor | None = None

    @classmethod
    def start(cls, decoder: Decoder, batch: Batch) -> "Streams":
        """In front of the first block."""
        calls = decoder.calls(batch)
        hidden = hidden_input(*calls[0])
        return cls(batch, calls, hidden, hidden)

    def folded(self, change: Tensor | None) -> Tensor:
        """The states of the shortened model behind a span, with a map in the place of it, or without one."""
        if change is None or self.added is None:
            return self.short
        return self.short + (self.added.double() @ change).to(self.short.dtype)


@torch.inference_mode()
def fit_folds(
    decoder: Decoder, plan: Plan, batches: Sequence[Batch], deciding: Sequence[Batch], *, quiet: bool = True
) -> list[Fold]:
    """Fit a map for every span that a plan deletes from a live base, where one helps.

    batches: what maps are fitted on; deciding: other text, whose perplexity decides on the ridge, and on whether there
    is a map. Raises ShortcutError for a plan that leaves halves, for blocks that cannot be run one by one, and where no
    projection in front of a span adds straight to the stream.
    """
    decoder.check_alone("folding")
    if plan.changes and set(plan.actions) - {"keep", "drop"}:
        raise ShortcutError("folding is for plans that drop whole blocks, and nothing else")
    if batches[0].visual is not None:
        raise ShortcutError("folding is fitted on text, not on questions about images")
    fitting, checking = ([Streams.start(decoder, batch) for batch in each] for each in (batches, deciding))
    folds: list[Fold] = []
    front, name = -1, ""  # the last kept block, and the projection in it that takes the map
    for number in track(range(len(plan.actions)), "folding", quiet=quiet):
        dropped, ends = (place in plan.dropped for place in (number, number + 1))
        if not dropped:
            front = number
            name = find_projection(decoder, number, fitting[0]) if ends else ""
        with resident(decoder.blocks[number]):
            for streams in (*fitting, *checking):
                _step(decoder, number, streams, dropped=dropped, name=name)
        if dropped and not ends and front >= 0:
            span = tuple(range(front + 1, number + 1))
            if fold := _choose(decoder, plan, span, name, fitting, checking):
                folds.append(fold)
                for streams in (*fitting, *checking):
                    streams.short = streams.folded(fold.change)
    return folds


def _step(decoder: Decoder, number: int, streams: Streams, *, dropped: bool, name: str) -> None:
    """Take both streams through a block, and note what its projection adds to the shorter one."""
    call = streams.calls[number]
    same = streams.base is streams.short
    if not dropped:
        found: list[Tensor] = []
        with _output_of(decoder.blocks[number], name, found.append):
            streams.short = decoder.run(number, streams.short, call)
        streams.added = found[0].reshape(streams.short.shape) if found else None
    streams.base = streams.short if same and not dropped else decoder.run(number, streams.base, call)


@contextmanager
def _output_of(block: nn.Module, name: str, look: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """See, or change, what a module of a block gives; no module where there is no name."""
    if not name:
        yield
        return
    handle = block.get_submodule(name).register_forward_hook(lambda _, __, output: look(output))
    try:
        yield
    finally:
        handle.remove()


def find_projection(decoder: Decoder, number: int, streams: Streams) -> str:
    """The last projection of a block whose output goes straight into the stream, by its name in the block.

    Tried by adding something to it, which has to come out of the block as it went in. Raises ShortcutError where there
    is none, as where a norm follows the MLP, or experts share it.
    """
    block, call, states = decoder.blocks[number], streams.calls[number], streams.short
    width, called = states.shape[-1], dict[str, int]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.update({name: called.pop(name, 0) + 1}))
        for name, module in block.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    ]
    after = call_block(block, states, *call)
    for handle in handles:
        handle.remove()

    def raised(output: Any) -> Tensor | None:
        fits = isinstance(output, Tensor) and output.shape[-1] == width and output.numel() == states.numel()
        return output + bump if fits else None

    bump = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(states) * after.float().std()
    for name in [name for name, times in reversed(called.items()) if times == 1]:
        with _output_of(block, name, raised):
            change = call_block(block, states, *call) - after
        if (change - bump).abs().max() <= TOLERANCE * max(bump.abs().max(), after.abs().max()):
            return name
    raise ShortcutError(
        f"cannot fold into block {number} of {decoder.model.config.model_type}:"
        " no projection in it adds straight to the stream"
    )


def _choose(
    decoder: Decoder,
    plan: Plan,
    span: tuple[int, ...],
    name: str,
    fitting: Sequence[Streams],
    checking: Sequence[Streams],
) -> Fold | None:
    """The map by which the deciding text is predicted best, if it is so better than without one."""
    price = partial(_perplexity, decoder, plan, span[-1] + 1, checking)
    before, changes = price(None), solve(fitting)
    prices = {ridge: price(change) for ridge, change in changes.items()}
    best = min(prices, key=prices.__getitem__)
    if not prices[best] < before:
        return None
    return Fold(span, span[0] - 1, name, best, changes[best], before, prices[best])


def solve(fitting: Sequence[Streams]) -> dict[float, Tensor]:
    """By ridge, the change D = T - 1 that minimises ‖x + M D - y‖² + ridge ‖D‖² over all real tokens, in float64."""
    gram: Any = 0.0
    cross: Any = 0.0
    for streams in fitting:
        assert streams.added is not None
        mask = streams.batch.mask
        added, missing = (each[mask].double() for each in (streams.added, streams.base - streams.short))
        gram, cross = gram + added.T @ added, cross + added.T @ missing
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return {ridge: torch.linalg.solve(gram + ridge * unit, cross) for ridge in RIDGES}


def _perplexity(decoder: Decoder, plan: Plan, start: int, checking: Sequence[Streams], change: Tensor | None) -> float:
    """Of the shortened model, from this block on, with a map in front of it or without."""
    total, count = 0.0, 0
    for streams in checking:
        hidden, batch = streams.folded(change), streams.batch
        for number in range(start, len(plan.actions)):
            if plan.actions[number] == "keep":
                hidden = decoder.run(number, hidden, streams.calls[number])
        real = batch.mask[:, 1:]
        states, targets = hidden[:, :-1][real], batch.ids[:, 1:][real]
        room = max(1, LOGITS_AT_ONCE // decoder.vocabulary)
        for first in range(0, len(targets), room):
            chunk = slice(first, first + room)
            total -= decoder.predict(states[chunk]).gather(-1, targets[chunk, None]).double().sum().item()
        count += len(targets)
    check_finite(torch.tensor(total), "the shortened model", hidden.dtype)
    return math.exp(min(total / count, 700.0))
