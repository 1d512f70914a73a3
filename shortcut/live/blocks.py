"""The blocks of a live model: finding them, and standing in for their forward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.family.anatomy import find_anatomy
from shortcut.live.load import LOADING_ERRORS, Model

# Under what name models of two towers return what each of them makes.
EMBEDDINGS: Mapping[Stack, str] = {"decoder": "text_embeds", "vision": "image_embeds", "audio": "audio_embeds"}


def find_blocks(model: Model, stack: Stack = "decoder") -> nn.ModuleList:
    """The blocks of a stack of a live transformers model, in order. Raises ShortcutError as `blocks_path` does."""
    return model.get_submodule(blocks_path(model, stack))


def device_of(model: Model) -> torch.device:
    """Where token ids go in; weights that are on the disk do not count."""
    return next(weight.device for weight in model.parameters() if not weight.is_meta)


def blocks_path(model: Model, stack: Stack = "decoder") -> str:
    """The name of the list of blocks of a stack inside a live transformers model.

    Raises ShortcutError, as `find_anatomy` does, where they cannot be told.
    """
    anatomy = find_anatomy((name for name, _ in model.named_parameters()), model.config.to_dict(), stack)
    return anatomy.container.removesuffix(".")


def find_decoder(model: Model) -> nn.Module:
    """The part of the model that turns token ids into hidden states: all but the vocabulary projection."""
    decoder, blocks = model.get_decoder(), find_blocks(model)
    holds_blocks = decoder is not None and any(module is blocks for module in decoder.modules())
    return decoder if holds_blocks else model.base_model


def decode(model: Model, inputs: Mapping[str, Any]) -> Any:
    """Run the decoder without a cache; where images are among the inputs, with the towers that see them."""
    decoder = model.base_model if set(inputs) - {"input_ids", "attention_mask"} else find_decoder(model)
    return decoder(**inputs, **_without_cache(model, decoder))


def run_model(model: Model, inputs: Mapping[str, Any], stack: Stack = "decoder") -> Tensor:
    """What a model gives, without a cache, as `result_of` finds it."""
    return result_of(model(**inputs, **_without_cache(model, model)), stack)


def result_of(output: Any, stack: Stack = "decoder") -> Tensor:
    """The logits in what a model returns, or the last states, or of two towers the embeddings that this one makes.

    Raises ShortcutError where there is nothing of these.
    """
    found = (getattr(output, name, None) for name in ("logits", "last_hidden_state", EMBEDDINGS.get(stack, "")))
    result = next((each for each in found if each is not None), None)
    if result is None:
        raise ShortcutError(f"a {type(output).__name__} holds neither logits nor states nor embeddings")
    return result


def _without_cache(model: Model, part: nn.Module) -> dict[str, bool]:
    """What a part of a model is told that could keep a cache; encoders have none."""
    keeps = model.can_generate() or "use_cache" in signature(part.forward).parameters
    return {"use_cache": False} if keeps else {}


@contextmanager
def forwards_replaced(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another forward for the length of a `with` block; they get back exactly what they had."""
    with ExitStack() as stack:
        for module, forward in replacements.items():
            if "forward" in vars(module):  # an earlier stand-in, or accelerate's own
                stack.callback(setattr, module, "forward", module.forward)
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a block."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or a row of values that starts with it."""
    return output[0] if isinstance(output, tuple | list) else output


def call_block(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The states after a block that is called as it was before, but for the states that go in."""
    if args:
        return hidden_output(block(hidden, *args[1:], **kwargs))
    return hidden_output(block(**{**kwargs, "hidden_states": hidden}))


@dataclass(frozen=True)
class Form:
    """What a block returns: its states alone, or a row of values that starts with them.

    handed: for every other value of the row, where among the block's arguments the value stands that a block which is
    left out hands on, as some families hand biases of attention from block to block; None where there is none. makes:
    whether the block makes such a value itself, for those behind it.
    """

    handed: tuple[int | str | None, ...] | None
    makes: bool = False

    def __call__(self, hidden: Tensor) -> Any:
        """States as the block returns them, the other values empty."""
        return hidden if self.handed is None else (hidden, *[None] * len(self.handed))

    def hand_on(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """States as the block returns them, the other values as it was given them."""
        if self.handed is None:
            return hidden
        given = _by_place(args, kwargs)
        return (hidden, *(None if place is None else given.get(place) for place in self.handed))


@torch.no_grad()
def output_forms(
    model: Model, stack: Stack = "decoder", inputs: Mapping[str, Any] | None = None
) -> tuple[list[Form], Tensor]:
    """For every block, what it returns; and what the pass gave that showed it.

    inputs: what the model is called with for that; some text where nothing is given. Raises ShortcutError where it does
    not run on that.
    """
    inputs, noted = text_inputs(model, 1) if inputs is None else inputs, dict[nn.Module, tuple[Any, Any, Any]]()
    blocks = find_blocks(model, stack)
    with ExitStack() as hooks:
        for block in blocks:
            hook = block.register_forward_hook(lambda block, *row: noted.update({block: row}), with_kwargs=True)
            hooks.callback(hook.remove)
        try:
            result = run_model(model, inputs, stack)
        except LOADING_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise ShortcutError(f"{model.config.model_type} cannot be run on text alone: {reason}") from None
    if missing := [number for number, block in enumerate(blocks) if block not in noted]:
        raise ShortcutError(f"block {missing[0]} of the {stack} of {model.config.model_type} does not run on that")
    return _forms([noted[block] for block in blocks]), result


def _forms(rows: Sequence[tuple[Any, Any, Any]]) -> list[Form]:
    """What blocks return, given arguments, keyword arguments and output of each."""
    others = [output[1:] if isinstance(output, tuple | list) else () for *_, output in rows]
    places = [[_place(value, *row[:2]) for value in values] for row, values in zip(rows, others, strict=True)]
    # one place for all: the first block makes what the others are given
    common = [next((p for p in column if p is not None), None) for column in zip_longest(*places)]
    forms = []
    for (*_, output), values, own in zip(rows, others, places, strict=True):
        makes = any(
            value is not None and place is None and shared is not None
            for value, place, shared in zip(values, own, common, strict=False)
        )
        alone = not isinstance(output, tuple | list)
        forms.append(Form(None if alone else tuple(common[: len(values)]), makes))
    return forms


def _place(value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where among the arguments a value stands, if it is a tensor and one of them."""
    given = _by_place(args, kwargs) if isinstance(value, Tensor) else {}
    return next((place for place, argument in given.items() if argument is value), None)


def _by_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int | str, Any]:
    """Arguments of a call by their number or name."""
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(kwargs)
    return given


def text_inputs(model: Model, tokens: int) -> dict[str, Tensor]:
    """A few different tokens of text, as this model is called with them."""
    ids = torch.arange(tokens, device=device_of(model))[None]
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
