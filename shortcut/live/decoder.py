"""A live model taken apart into its blocks, so that they can be run one by one, whole or in part.

What every block is called with is noted in a forward pass of the decoder in which recorders stand in for the blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.family.tasks import Gives
from shortcut.live.batch import Batch
from shortcut.live.blocks import (
    Form,
    call_block,
    decode,
    device_of,
    find_blocks,
    forwards_replaced,
    hidden_input,
    output_forms,
    run_model,
    text_inputs,
)
from shortcut.live.branches import Branches, find_branches
from shortcut.live.load import LOADING_ERRORS, Model, task_of
from shortcut.live.offload import is_on_disk, resident
from shortcut.records.actions import GONE, Action

PREDICTION_TOLERANCE = 0.05  # of the largest log probability: far above what reordered sums do, also in bfloat16
PROBE = 8  # tokens on which a model is tried

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Decoder:
    """A live model taken apart: the blocks of one of its stacks, what each returns, and what the model gives.

    vocabulary: how many values it gives for a token, or for a sequence; gives: what they are. probe: what it is tried
    on. fault: why its blocks cannot be run one by one.
    """

    model: Model
    blocks: nn.ModuleList
    forms: tuple[Form, ...]
    vocabulary: int
    probe: Batch
    gives: Gives = "next tokens"
    stack: Stack = "decoder"
    fault: str | None = None
    known: dict[str, Branches] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model, stack: Stack = "decoder", batch: Batch | None = None) -> "Decoder":
        """Take a model apart, and find out on a few tokens whether its parts make up the whole.

        batch: what it is tried on where it does not run on text alone. Raises ShortcutError where its blocks cannot be
        told, and where they do not run.
        """
        probe = text_probe(model)
        try:
            forms, result = output_forms(model, stack, probe.inputs)
        except ShortcutError:
            if batch is None:
                raise
            probe = batch
            forms, result = output_forms(model, stack, probe.inputs)
        gives, blocks = task_of(model).gives, find_blocks(model, stack)
        decoder = cls(model, blocks, tuple(forms), result.shape[-1], probe, gives, stack)
        decoder = replace(decoder, probe=decoder.seen(probe))
        return replace(decoder, fault=decoder._find_fault(result))

    @torch.no_grad()
    def seen(self, batch: Batch) -> Batch:
        """What these blocks see of a batch: itself, or the source of an encoder, or parts of images."""
        if self.stack == "decoder" and not batch.extra:
            return batch
        shape = hidden_input(*self.calls(batch)[0]).shape[:2]
        if shape == batch.ids.shape and self.stack == "decoder":
            return batch
        padded = batch.extra.get("attention_mask")
        mask = torch.ones(shape, dtype=torch.bool, device=batch.ids.device)
        if self.stack == "encoder" and padded is not None and padded.shape == shape:
            mask = padded.bool()
        return Batch(torch.zeros_like(mask, dtype=torch.long), mask, extra=batch.inputs, name="")

    def _find_fault(self, result: Tensor) -> str | None:
        """Why the blocks cannot be run one by one, given what the whole model makes of its probe."""
        batch = self.probe
        try:
            with torch.no_grad():
                last = self.states(batch)[-1]
                if self.predicts:
                    walked, expected = self.predict(last[0]), torch.log_softmax(result[0].float(), dim=-1)
                else:
                    walked, expected = self.finish(batch, last).float(), result.float()
        except LOADING_ERRORS as error:
            return " ".join(str(error).split())[:200]
        if last.shape[:2] != batch.ids.shape:
            return f"their states are {tuple(last.shape)}, not (batch, tokens, width)"
        difference = (walked - expected).abs().max().item()
        unknown = not result.isfinite().all()  # whoever runs the blocks finds which of them it is
        alike = unknown or difference <= PREDICTION_TOLERANCE * expected.abs().max().item()
        return None if alike else f"what they give differs by {difference:.3g}"

    @property
    def predicts(self) -> bool:
        """Whether the states behind the last block predict the next token."""
        return self.gives == "next tokens" and self.stack == "decoder"

    def check_alone(self, what: str) -> None:
        """Raise ShortcutError where blocks cannot be run one by one, for what needs that."""
        if self.fault is not None:
            family = self.model.config.model_type
            raise ShortcutError(f"{what} needs blocks that run one by one, and those of {family} do not: {self.fault}")

    def finish(self, batch: Batch, states: Tensor) -> Tensor:
        """What the model gives where these are the states behind its last block, (batch, tokens, width)."""

        def stand_in(number: int) -> Callable[..., Any]:
            return lambda *_, **__: self.forms[number](states)

        with forwards_replaced({block: stand_in(number) for number, block in enumerate(self.blocks)}):
            return run_model(self.model, batch.inputs, self.stack)

    def calls(self, batch: Batch) -> list[Call]:
        """What every block is called with in a forward pass of this batch; the blocks themselves do not run, but for
        those that make more than states for the others."""
        noted: dict[int, Call] = {}

        def recorder(number: int) -> Callable[..., Any]:
            own, form = self.blocks[number].forward, self.forms[number]

            def forward(*args: Any, **kwargs: Any) -> Any:
                noted[number] = (args, kwargs)
                hidden = hidden_input(args, kwargs)
                return (hidden, *own(*args, **kwargs)[1:]) if form.makes else form.hand_on(hidden, args, kwargs)

            return forward

        with forwards_replaced({block: recorder(number) for number, block in enumerate(self.blocks)}):
            decode(self.model, batch.inputs)
        return [noted[number] for number in range(len(self.blocks))]

    def run(self, number: int, hidden: Tensor, call: Call, action: Action = "keep") -> Tensor:
        """The states after a block, called as it was in a forward pass but for the states before it.

        action: what is left of the block. Raises ShortcutError as `find_branches` does for half a block.
        """
        if action == "drop":
            return hidden
        silent = {} if action == "keep" else self.branches(number).silent(GONE[action])
        with forwards_replaced(silent):
            return call_block(self.blocks[number], hidden, *call)

    @staticmethod
    def additions(calls: Sequence[Call]) -> list[Tensor | None]:
        """What the model itself adds to the states in front of every block, given its `calls`; None for nothing.

        Some families add features of images between the first blocks.
        """
        found: list[Tensor | None] = [None]
        for before, now in pairwise(hidden_input(*call) for call in calls):
            added = None if now is before else now - before.to(now.device)
            found.append(added if added is not None and added.any() else None)
        return found

    def check_images(self, batch: Batch) -> None:
        """Raise ShortcutError where blocks that run one by one do not make the whole of the model for this batch."""
        with torch.no_grad():
            states = self.states(batch)[-1][:, -1:]
            expected = torch.log_softmax(run_model(self.model, batch.inputs)[:, -1].float(), dim=-1)
            difference = (self.predict(states[:, 0]) - expected).abs().max().item()
        if not difference <= PREDICTION_TOLERANCE * expected.abs().max().item():
            family = self.model.config.model_type
            raise ShortcutError(f"blocks of {family} that see images do not run one by one: {difference:.3g} apart")

    def states(self, batch: Batch, *, recompute: bool = False) -> list[Tensor]:
        """The states before every block, and those after the last: (batch, tokens, width) each.

        recompute: what goes on within a block is forgotten, and run again when gradients are taken.
        """
        calls = self.calls(batch)
        states = [hidden_input(*calls[0])]
        for number, (call, added) in enumerate(zip(calls, self.additions(calls), strict=True)):
            states[-1] = states[-1] if added is None else states[-1] + added
            if recompute:
                states.append(checkpoint(self.run, number, states[-1], call, use_reentrant=False))
            else:
                states.append(self.run(number, states[-1], call))
        return states

    def branches(self, number: int) -> Branches:
        """The two halves of a block. Raises ShortcutError as `find_branches` and `check_alone` do."""
        self.check_alone("half a block")
        block = self.blocks[number]
        build = repr(block)  # what is built alike is tried once
        if build not in self.known:
            name = f"block {number} of {self.model.config.model_type}"
            with torch.no_grad(), resident(block):
                call = self.calls(self.probe)[number]
                hidden = hidden_input(*call)
                noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
                self.known[build] = find_branches(name, block, noise, *call)
        return self.known[build].of(block)

    def weights(self, number: int, action: Action) -> list[nn.Parameter]:
        """The weights of a block that go by an action."""
        if action == "drop":
            return list(self.blocks[number].parameters())
        return [weight for half in GONE[action] for weight in self.branches(number).parameters(half)]

    @property
    def head(self) -> nn.Module:
        """The module that is best kept resident while predictions are made."""
        return self.model.get_output_embeddings() or self.model

    def predict(self, states: Tensor) -> Tensor:
        """Log probabilities of the next token after the states of the last block: (n, width) -> (n, vocabulary).

        The model's own way from there on, final norm, vocabulary projection and all, in float32. Where blocks cannot be
        run one by one, the states are logits already.
        """
        if self.fault is not None:
            return torch.log_softmax(states.float(), dim=-1)

        def stand_in(number: int) -> Callable[..., Any]:
            return lambda *_, **__: self.forms[number](states[:, None])

        inputs = {"input_ids": torch.zeros(len(states), 1, dtype=torch.long, device=device_of(self.model))}
        if self.model.config.is_encoder_decoder:
            from transformers.modeling_outputs import BaseModelOutput

            inputs = {"decoder_input_ids": inputs["input_ids"], "encoder_outputs": BaseModelOutput(states[:, None])}
        stand_ins = {block: stand_in(number) for number, block in enumerate(self.blocks)}
        first = self.model.get_input_embeddings()
        if is_on_disk(first):  # what it gives goes no further than to the first block
            stand_ins[first] = lambda ids: states.new_zeros(*ids.shape, first.weight.shape[1])
        with forwards_replaced(stand_ins):
            logits = run_model(self.model, inputs)
        return torch.log_softmax(logits[:, 0].float(), dim=-1)


def text_probe(model: Model) -> Batch:
    """A few tokens of text, on which a model is tried."""
    inputs = text_inputs(model, PROBE)
    name: Literal["input_ids", "decoder_input_ids"]
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids = inputs.pop(name)
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), extra=inputs, name=name)


LOGITS_AT_ONCE = 1 << 22  # log probabilities of one stream in memory: 16 MB; more is slower on a CPU


def check_finite(values: Tensor, what: str, dtype: torch.dtype) -> None:
    """Raise ShortcutError for NaN or infinity in what a model of this type gives."""
    if not values.sum().isfinite():
        raise ShortcutError(f"{what} gives NaN or infinity in {dtype}: use --dtype float32 or bfloat16")
