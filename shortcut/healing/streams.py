"""Base and shortened model side by side: the states of both, block by block, and the projections that add to them.

What heals without training sees nothing else: where a block or half of it is missing, the states of the base are behind
it, those of the shortened model are in front of it, and a last projection is there to be changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up
from shortcut.live.batch import Batch
from shortcut.live.blocks import hidden_input
from shortcut.live.decoder import LOGITS_AT_ONCE, Call, Decoder, check_finite
from shortcut.live.offload import resident
from shortcut.records.actions import GONE, Action
from shortcut.records.plan import Plan
from shortcut.records.scores import perplexity_of

# By the name of a projection in a block, what is added to its weights: (inputs, outputs), float64, the bias last.
Changes = Mapping[str, Tensor]
UNCHANGED: Changes = {}
NOWHERE: Mapping[int, Changes] = {}


@dataclass
class Streams:
    """A batch on its way through the base and through the shortened model: the states of both, and the calls."""

    batch: Batch
    calls: list[Call]
    base: Tensor
    short: Tensor

    @classmethod
    def start(cls, decoder: Decoder, batch: Batch) -> "Streams":
        """In front of the first block."""
        calls = decoder.calls(batch)
        hidden = hidden_input(*calls[0])
        return cls(batch, calls, hidden, hidden)

    def step(self, decoder: Decoder, number: int, action: Action) -> None:
        """Take both streams through a block."""
        alike = self.base is self.short and action == "keep"
        self.base = decoder.run(number, self.base, self.calls[number])
        self.short = self.base if alike else self.behind(decoder, number, action)

    def behind(self, decoder: Decoder, number: int, action: Action, changes: Changes = UNCHANGED) -> Tensor:
        """What a block makes of the shorter stream, with these changes to its weights."""
        with with_changes(decoder.blocks[number], changes):
            return decoder.run(number, self.short, self.calls[number], action)


def check_plan(decoder: Decoder, plan: Plan, batch: Batch, what: str) -> None:
    """Raise ShortcutError for what cannot be healed without training. what: the way of healing, such as "folding"."""
    decoder.check_alone(what)
    if others := {action for action in plan.actions if action != "keep" and not GONE[action]}:
        raise ShortcutError(f"{what} is for plans that drop blocks, or halves of them, not for {min(others)} blocks")
    if batch.visual is not None:
        raise ShortcutError(f"{what} is fitted on text, not on questions about images")


@contextmanager
def output_of(block: nn.Module, name: str, look: Callable[[Tensor, Tensor], Tensor | None]) -> Iterator[None]:
    """See what a module of a block is given, and see or change what it gives; no module where there is no name."""
    if not name:
        yield
        return
    handle = block.get_submodule(name).register_forward_hook(lambda _, inputs, output: look(inputs[0], output))
    try:
        yield
    finally:
        handle.remove()


def noting(found: list[tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], None]:
    """For `output_of`: what notes what a module is given, and gives."""
    return lambda given, gives: found.append((given, gives))


@contextmanager
def with_changes(block: nn.Module, changes: Changes) -> Iterator[None]:
    """Have projections of a block give what they would with changed weights; the weights stay as they are."""
    with ExitStack() as stack:
        for name, change in changes.items():

            def add(projection: nn.Module, inputs: Any, output: Tensor, change: Tensor = change) -> Tensor:
                return output + _weighed(projection, inputs[0]) @ change.to(output)

            stack.callback(block.get_submodule(name).register_forward_hook(add).remove)
        yield


@contextmanager
def inputs_of(block: nn.Module, names: Sequence[str], found: dict[str, Tensor]) -> Iterator[None]:
    """Note all that projections of a block weigh: what goes in, and where they have a bias, a one."""
    with ExitStack() as stack:
        for name in names:

            def note(projection: nn.Module, inputs: Any, name: str = name) -> None:
                found[name] = _weighed(projection, inputs[0])

            stack.callback(block.get_submodule(name).register_forward_pre_hook(note).remove)
        yield


def _weighed(projection: Any, states: Tensor) -> Tensor:
    return states if projection.bias is None else torch.cat([states, torch.ones_like(states[..., :1])], dim=-1)


def perplexities_behind(
    decoder: Decoder,
    plan: Plan,
    number: int,
    checking: Sequence[Streams],
    tried: Sequence[Sequence[Tensor]],
    changed: Mapping[int, Changes] = NOWHERE,
) -> list[float]:
    """Of the shortened model, with each of these states behind a block of the base.

    tried: for every trial, the states of every batch. Trials go through the blocks side by side. changed: by block,
    changes to its weights. Of several processes each has batches of its own.
    """
    trials = [list(states) for states in tried]
    for later in (block for block in plan.kept if block > number):
        block = decoder.blocks[later]
        with resident(block), with_changes(block, changed.get(later, UNCHANGED)):
            for states in trials:
                for place, streams in enumerate(checking):
                    states[place] = decoder.run(later, states[place], streams.calls[later], plan.actions[later])
    with resident(decoder.head):
        sums = add_up(torch.stack([_likelihood(decoder, checking, states) for states in trials]))
    check_finite(sums, "the shortened model", trials[0][0].dtype if checking else torch.float32)
    return [perplexity_of(-total / count) for total, count in sums.tolist()]


def _likelihood(decoder: Decoder, checking: Sequence[Streams], states: Sequence[Tensor]) -> Tensor:
    """The log likelihood of the tokens behind these states, and how many they are: (2,), float64."""
    total, count, room = 0.0, 0, max(1, LOGITS_AT_ONCE // decoder.vocabulary)
    for streams, hidden in zip(checking, states, strict=True):
        real = streams.batch.mask[:, 1:]
        last, targets = hidden[:, :-1][real], streams.batch.ids[:, 1:][real]
        for first in range(0, len(targets), room):
            chunk = slice(first, first + room)
            total += decoder.predict(last[chunk]).gather(-1, targets[chunk, None]).double().sum().item()
        count += len(targets)
    return torch.tensor([total, count], dtype=torch.float64)
