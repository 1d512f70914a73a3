"""The walk: one pass through the blocks that gives the hidden states around each of them, with and without it.

Once per batch, the decoder is run with every block replaced by a recorder, which notes what the block is called with
and returns its input at once. The blocks are then called one after the other, so that whoever walks sees the states
before and after each block, at the cost of one forward pass without the vocabulary projection. The states after the
last block are its own output, not the model's, which have gone through the final norm.

A block is taken out by not calling it: its ablation is a stream of states that starts with what the block was given,
and goes on through the blocks behind it. All L ablations cost L (L - 1) / 2 passes beyond the L of the walk itself, as
nothing in front of a missing block is computed twice; streams go through a block several at a time, as one batch.
"""

from collections.abc import Callable, Collection, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.errors import ShortcutError
from shortcut.live import (
    LOADING_ERRORS,
    Model,
    decode,
    find_blocks,
    forwards_replaced,
    hidden_input,
    hidden_output,
    output_forms,
)
from shortcut.offload import resident
from shortcut.scoring.calibration import Batch

TOKENS_PER_CALL = 4096  # of several streams together: more is no faster, and attention needs memory for all of them
TOLERANCE = 0.05  # of the largest log probability: far above what reordered sums do, also in bfloat16

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """One block of a walk: hidden states before and after it, (batch, tokens, width), in the model's type."""

    block: int
    before: Tensor
    after: Tensor


@dataclass(frozen=True)
class Decoder:
    """A live model taken apart: its blocks, how each wraps the hidden states that it returns, and its vocabulary."""

    model: Model
    blocks: nn.ModuleList
    forms: tuple[Callable[[Tensor], Any], ...]
    vocabulary: int

    @classmethod
    def of(cls, model: Model) -> "Decoder":
        """Take a model apart, and make sure on a few tokens that its parts make up the whole.

        Raises ShortcutError where its blocks cannot be told, and where they hand on more than hidden states, so that
        they cannot be run one by one.
        """
        family, ids = model.config.model_type, torch.arange(8, device=model.device)[None]
        try:
            forms, logits = output_forms(model, ids)
            decoder = cls(model, find_blocks(model), tuple(forms), logits.shape[-1])
            with torch.no_grad():
                *_, last = walk(decoder, Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
                walked, expected = decoder.predict(last.after[0]), torch.log_softmax(logits[0].float(), dim=-1)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise ShortcutError(f"the blocks of {family} cannot be run one by one on text: {reason}") from None
        if last.after.shape[:2] != ids.shape:
            shape = f"their states are {tuple(last.after.shape)}, not (batch, tokens, width)"
            raise ShortcutError(f"the blocks of {family} cannot be run one by one: {shape}")
        difference = (walked - expected).abs().max().item()
        if difference > TOLERANCE * expected.abs().max().item():
            fault = f"log probabilities differ by {difference:.3g}"
            raise ShortcutError(f"the blocks of {family} cannot be run one by one: {fault}")
        return decoder

    def calls(self, batch: Batch) -> list[Call]:
        """What every block is called with in a forward pass of this batch; the blocks themselves do not run."""
        noted: dict[int, Call] = {}

        def recorder(number: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                noted[number] = (args, kwargs)
                return self.forms[number](hidden_input(args, kwargs))

            return forward

        # A full mask is left out: attention then takes its fastest path, as it does for text without padding.
        mask = None if batch.mask.all() else batch.mask.long()
        with forwards_replaced({block: recorder(number) for number, block in enumerate(self.blocks)}):
            decode(self.model, batch.ids, mask)
        return [noted[number] for number in range(len(self.blocks))]

    def run(self, number: int, hidden: Tensor, call: Call) -> Tensor:
        """The states after a block, called as it was in a forward pass but for the states before it."""
        args, kwargs = call
        if args:
            return hidden_output(self.blocks[number](hidden, *args[1:], **kwargs))
        return hidden_output(self.blocks[number](**{**kwargs, "hidden_states": hidden}))

    def predict(self, states: Tensor) -> Tensor:
        """Log probabilities of the next token after the states of the last block: (n, width) -> (n, vocabulary).

        The model's own way from there on, final norm, vocabulary projection and all, in float32.
        """

        def stand_in(number: int) -> Callable[..., Any]:
            return lambda *_, **__: self.forms[number](states[:, None])

        ids = torch.zeros(len(states), 1, dtype=torch.long, device=self.model.device)
        with forwards_replaced({block: stand_in(number) for number, block in enumerate(self.blocks)}):
            logits = self.model(input_ids=ids, use_cache=False).logits
        return torch.log_softmax(logits[:, 0].float(), dim=-1)


def walk(
    decoder: Decoder, batch: Batch, ablated: MutableMapping[int, Tensor] | None = None, missing: Collection[int] = ()
) -> Iterator[Step]:
    """Yield every block's step in order, for one batch of tokens on the model's device.

    ablated: an empty mapping, which at the end holds for every block the states behind the last block without it.
    missing: blocks that are left out, and have no step.
    """
    room = max(1, TOKENS_PER_CALL // batch.ids.numel())
    calls = {1: decoder.calls(batch)}
    hidden = hidden_input(*calls[1][0])
    for number in (number for number in range(len(decoder.blocks)) if number not in missing):
        after = decoder.run(number, hidden, calls[1][number])
        if ablated is not None:
            for group in _groups(list(ablated), room):
                copies = len(group)
                if copies not in calls:
                    calls[copies] = decoder.calls(Batch(batch.ids.repeat(copies, 1), batch.mask.repeat(copies, 1)))
                streams = torch.cat([ablated[block] for block in group])
                behind = decoder.run(number, streams, calls[copies][number]).chunk(copies)
                ablated.update(zip(group, behind, strict=True))
            ablated[number] = hidden
        yield Step(number, hidden, after)
        hidden = after


def run_together(decoder: Decoder, walks: Sequence[Iterator[Any]], missing: Collection[int] = ()) -> None:
    """Take several iterators, each of which makes one step per block, through the blocks side by side.

    Weights that are on the disk are read once for all of them.
    """
    for number in (number for number in range(len(decoder.blocks)) if number not in missing):
        with resident(decoder.blocks[number]):
            for steps in walks:
                next(steps)
    for steps in walks:
        for _ in steps:  # what they do behind the last block
            raise ValueError("an iterator makes more steps than there are blocks")


def check_finite(values: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise ShortcutError for NaN or infinity in what a model of this type gives."""
    if not values.sum().isfinite():
        raise ShortcutError(f"{what} gives NaN or infinity in {dtype}: use --dtype float32 or bfloat16")


def _groups(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
