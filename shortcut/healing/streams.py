"""Base and shortened model side by side: the states of both, block by block, and the projections that add to them.

What heals without training sees nothing else: where a block or half of it is missing, the states of the base are behind
it, those of the shortened model are in front of it, and a last projection is there to be changed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.live.blocks import hidden_input
from shortcut.live.decoder import LOGITS_AT_ONCE, Batch, Call, Decoder, check_finite
from shortcut.records.actions import GONE, Action
from shortcut.records.plan import Plan

OUTPUT_TOLERANCE = 1e-3  # of what is added to a projection's output, and has to come out of its block


@dataclass
class Streams:
    """A batch on its way through the base and through the shortened model: the states of both, and the calls.

    added: what the projection that may take a map adds to the states of the shortened model.
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

    def step(self, decoder: Decoder, number: int, action: Action, name: str = "") -> None:
        """Take both streams through a block, and note what the module of this name adds to the shorter one."""
        call, alike = self.calls[number], self.base is self.short and action == "keep"
        if action != "drop":
            found: list[Tensor] = []
            with output_of(decoder.blocks[number], name, found.append):
                short = decoder.run(number, self.short, call, action)
            self.short, self.added = short, found[0].reshape(short.shape) if found else None
        self.base = self.short if alike else decoder.run(number, self.base, call)


def check_plan(decoder: Decoder, plan: Plan, batch: Batch, what: str) -> None:
    """Raise ShortcutError for what cannot be healed without training. what: the way of healing, such as "folding"."""
    decoder.check_alone(what)
    if others := {action for action in plan.actions if action != "keep" and not GONE[action]}:
        raise ShortcutError(f"{what} is for plans that drop blocks, or halves of them, not for {min(others)} blocks")
    if batch.visual is not None:
        raise ShortcutError(f"{what} is fitted on text, not on questions about images")


@contextmanager
def output_of(block: nn.Module, name: str, look: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """See, or change, what a module of a block gives; no module where there is no name."""
    if not name:
        yield
        return
    handle = block.get_submodule(name).register_forward_hook(lambda _, __, output: look(output))
    try:
        yield
    finally:
        handle.remove()


def find_projection(decoder: Decoder, number: int, streams: Streams, action: Action = "keep") -> str:
    """The last projection in what an action leaves of a block whose output goes straight into the stream, by its name.

    Tried by adding something to it, which has to come out of the block as it went in. Raises ShortcutError where there
    is none, as where a norm follows the MLP, or experts share it.
    """
    block, call, states = decoder.blocks[number], streams.calls[number], streams.short
    silent = {} if action == "keep" else decoder.branches(number).silent(GONE[action])
    width, called = states.shape[-1], dict[str, int]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.update({name: called.pop(name, 0) + 1}))
        for name, module in block.named_modules()
        if module not in silent and isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2
    ]
    after = decoder.run(number, states, call, action)
    for handle in handles:
        handle.remove()

    def raised(output: Any) -> Tensor | None:
        fits = isinstance(output, Tensor) and output.shape[-1] == width and output.numel() == states.numel()
        return output + bump if fits else None

    bump = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(states) * after.float().std()
    sizes = torch.maximum(states.abs(), after.abs()) + bump.abs().max()  # each value is rounded by its own
    tolerance = max(OUTPUT_TOLERANCE, 4 * torch.finfo(states.dtype).eps) * sizes
    for name in [name for name, times in reversed(called.items()) if times == 1]:
        with output_of(block, name, raised):
            change = decoder.run(number, states, call, action) - after
        if ((change - bump).abs() <= tolerance).all():
            return name
    family = decoder.model.config.model_type
    raise ShortcutError(f"cannot heal in block {number} of {family}: no projection in it adds straight to the stream")


def perplexity_behind(
    decoder: Decoder, plan: Plan, number: int, checking: Sequence[Streams], states: Callable[[Streams], Tensor]
) -> float:
    """Of the shortened model, with these states behind a block of the base."""
    total, count = 0.0, 0
    for streams in checking:
        hidden, batch = states(streams), streams.batch
        for later in range(number + 1, len(plan.actions)):
            hidden = decoder.run(later, hidden, streams.calls[later], plan.actions[later])
        real = batch.mask[:, 1:]
        last, targets = hidden[:, :-1][real], batch.ids[:, 1:][real]
        room = max(1, LOGITS_AT_ONCE // decoder.vocabulary)
        for first in range(0, len(targets), room):
            chunk = slice(first, first + room)
            total -= decoder.predict(last[chunk]).gather(-1, targets[chunk, None]).double().sum().item()
        count += len(targets)
    check_finite(torch.tensor(total), "the shortened model", hidden.dtype)
    return math.exp(min(total / count, 700.0))
