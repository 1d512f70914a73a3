"""The walk: one pass through the blocks that gives the hidden states around each of them, with and without it.

Blocks are called one after the other, as they were in a forward pass, so that whoever walks sees the states before and
after each, at the cost of one forward pass without the vocabulary projection. The states after the last block are its
own output, not the model's, which have gone through the final norm.

A block, or half of it, is taken out by not calling it: its ablation is a stream of states that starts with what is left
of the block, and goes on through the blocks behind it. All L ablations of whole blocks cost L (L - 1) / 2 passes beyond
the L of the walk itself, as nothing in front of a missing block is computed twice; streams go through a block several
at a time, as one batch.

In the few families whose blocks cannot be run one by one, the whole model runs once, and once more for every ablation;
what comes out at the end of a stream are its logits then.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.live.batch import Batch
from shortcut.live.blocks import hidden_input, hidden_output, run_model
from shortcut.live.decoder import Call, Decoder
from shortcut.live.offload import is_offloaded, resident
from shortcut.records.actions import FREEZING, Action, Move, join

TOKENS_PER_CALL = 4096  # of several streams together: more is no faster, and attention needs memory for all of them
TOKENS_WHEN_SCARCE = 512  # where memory is too small for the model
NOTHING: Mapping[int, Action] = {}
UNSCALED: Mapping[int, float] = {}
AS_IT_IS = Move(0, "keep")
WHOLE: tuple[Action, ...] = ("drop",)


@dataclass(frozen=True)
class Step:
    """One block of a walk: hidden states before and after it, (batch, tokens, width), in the model's type.

    between: those behind its attention alone, where halves of blocks may go.
    """

    block: int
    before: Tensor
    after: Tensor
    between: Tensor | None = None


def walk(
    decoder: Decoder,
    batch: Batch,
    *,
    ablated: MutableMapping[Move, Tensor] | None = None,
    allow: Collection[Action] = WHOLE,
    done: Mapping[int, Action] = NOTHING,
    scales: Mapping[int, float] = UNSCALED,
) -> Iterator[Step]:
    """Yield every block's step in order, for one batch of tokens on the model's device.

    ablated: an empty mapping, which at the end holds for every move what `Decoder.predict` takes, and under AS_IT_IS
    the same with no move made. allow: the actions of these moves; what a move names is all that is then done to its
    block. done: what has been done to blocks already; dropped ones have no step. scales: by dropped block, what
    the stream is multiplied by in its place.
    """
    if decoder.fault is not None:
        yield from _walk_as_a_whole(decoder, batch, ablated, allow, done)
        return
    calls = {1: decoder.calls(batch)}  # by how many streams run at once
    additions = decoder.additions(calls[1])
    hidden = hidden_input(*calls[1][0])
    for number in range(len(decoder.blocks)):
        own, call, added = done.get(number, "keep"), calls[1][number], additions[number]
        if own == "drop":
            if (scale := scales.get(number)) is not None:
                hidden = hidden * scale
                if ablated is not None:
                    _lengthen(ablated, scale)
            continue
        if added is not None:
            hidden = hidden + added
        after = _run(decoder, batch, number, hidden, call, own)
        hidden = hidden.to(after.device)  # a model may be spread over several
        if ablated is not None:
            _run_streams(decoder, batch, number, ablated, added, own, calls)
            for action in outcomes(own, allow):
                known = after if action in FREEZING and own == "keep" else None
                ablated[Move(number, action)] = _run(decoder, batch, number, hidden, call, action, known)
        halved = own == "keep" and bool({"attention-only", "mlp-only"} & set(allow))
        yield Step(number, hidden, after, decoder.run(number, hidden, call, "attention-only") if halved else None)
        hidden = after
    if ablated is not None:
        ablated[AS_IT_IS] = hidden


def _run_streams(
    decoder: Decoder,
    batch: Batch,
    number: int,
    streams: MutableMapping[Move, Tensor],
    added: Tensor | None,
    own: Action,
    calls: dict[int, list[Call]],
) -> None:
    """Send every stream through a block, several at once where they are small. calls: is filled as they are needed."""
    tokens = TOKENS_WHEN_SCARCE if is_offloaded(decoder.model) else TOKENS_PER_CALL
    room = max(1, tokens // batch.ids.numel()) if not batch.extra else 1
    for group in _groups(list(streams), room):
        copies = len(group)
        if copies not in calls:
            calls[copies] = decoder.calls(batch.repeat(copies))
        together = torch.cat([streams[move] if added is None else streams[move] + added for move in group])
        behind = _run(decoder, batch, number, together, calls[copies][number], own).chunk(copies)
        streams.update(zip(group, behind, strict=True))


def _lengthen(streams: MutableMapping[Move, Tensor], scale: float) -> None:
    """Multiply every stream by a number, one after the other: they may be on the disk."""
    for move in list(streams):
        streams[move] = streams[move] * scale


def _run(
    decoder: Decoder,
    batch: Batch,
    number: int,
    hidden: Tensor,
    call: Call,
    action: Action,
    after: Tensor | None = None,
) -> Tensor:
    """As `Decoder.run`, also for actions that freeze tokens. after: what the whole block makes of them, if known.

    Frozen tokens change nothing for the others within the block: its output for all, with these as they were, is it.
    """
    if action not in FREEZING:
        return decoder.run(number, hidden, call, action)
    after = decoder.run(number, hidden, call) if after is None else after
    return torch.where(batch.frozen(action).to(after.device)[..., None], hidden.to(after.device), after)


def _walk_as_a_whole(
    decoder: Decoder,
    batch: Batch,
    ablated: MutableMapping[Move, Tensor] | None,
    allow: Collection[Action],
    done: Mapping[int, Action],
) -> Iterator[Step]:
    if set(allow) - set(WHOLE):
        decoder.check_alone("half a block, or one that is frozen,")
    blocks = decoder.blocks
    states: dict[int, tuple[Tensor, Tensor]] = {}

    def note(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            states[number] = (hidden_input(args, kwargs), hidden_output(output))

        return hook

    def hand_on(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = hidden_input(args, kwargs)  # later blocks may need what else a block gives: it runs all the same
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    def logits(hooks: Mapping[int, Callable[..., Any]]) -> Tensor:
        with ExitStack() as stack:
            for number, hook in hooks.items():
                stack.callback(blocks[number].register_forward_hook(hook, with_kwargs=True).remove)
            return run_model(decoder.model, batch.inputs, decoder.stack)

    left = running(decoder, done)
    gone = {number: hand_on for number in range(len(blocks)) if number not in left}
    whole = logits({**gone, **{number: note(number) for number in left}})
    for number in left:
        if ablated is not None:
            ablated[Move(number)] = logits({**gone, number: hand_on})
        yield Step(number, *states.pop(number))
    if ablated is not None:
        ablated[AS_IT_IS] = whole


def outcomes(own: Action, allow: Collection[Action]) -> list[Action]:
    """What a block can become by these actions, when this has been done to it already."""
    found = dict.fromkeys(join(own, action) for action in allow)
    return [action for action in found if action != own]


def running(decoder: Decoder, done: Mapping[int, Action]) -> list[int]:
    """The blocks that have not been dropped."""
    return [number for number in range(len(decoder.blocks)) if done.get(number) != "drop"]


def run_together(decoder: Decoder, walks: Sequence[Iterator[Any]], done: Mapping[int, Action] = NOTHING) -> None:
    """Take several iterators, each of which makes one step per block, through the blocks side by side.

    Weights that are on the disk are read once for all of them.
    """
    for number in running(decoder, done):
        with resident(decoder.blocks[number]):
            for steps in walks:
                next(steps)
    for steps in walks:
        for _ in steps:  # what they do behind the last block
            raise ValueError("an iterator makes more steps than there are blocks")


def _groups(items: list[Move], size: int) -> list[list[Move]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
