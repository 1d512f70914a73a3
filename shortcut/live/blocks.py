"""The blocks of a live model: finding them, and standing in for their forward."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.family.anatomy import find_anatomy
from shortcut.live.load import Model


def find_blocks(model: Model) -> nn.ModuleList:
    """The list of decoder blocks of a live transformers model, in order. Raises ShortcutError as `blocks_path` does."""
    return model.get_submodule(blocks_path(model))


def device_of(model: Model) -> torch.device:
    """Where token ids go in; weights that are on the disk do not count."""
    return next(weight.device for weight in model.parameters() if not weight.is_meta)


def blocks_path(model: Model) -> str:
    """The name of the list of decoder blocks inside a live transformers model.

    Raises ShortcutError, as `find_anatomy` does, where they cannot be told.
    """
    anatomy = find_anatomy((name for name, _ in model.named_parameters()), model.config.to_dict())
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


def run_model(model: Model, inputs: Mapping[str, Any]) -> Tensor:
    """What a model gives, without a cache: its logits, or the last states where it has no head."""
    return result_of(model(**inputs, **_without_cache(model, model)))


def result_of(output: Any) -> Tensor:
    """The logits in what a model returns, or the last states where there are none."""
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


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


def output_forms(model: Model, ids: Tensor | None = None) -> tuple[list[Callable[[Tensor], Any]], Tensor]:
    """For every block, how it wraps the hidden states it returns; and what the pass gave that showed it.

    ids: what that pass is over, (1, tokens); a single token where none are given.
    """
    forms: dict[nn.Module, Callable[[Tensor], Any]] = {}

    def learn(block: nn.Module, _: Any, output: Any) -> None:
        extra = len(output) - 1 if isinstance(output, tuple | list) else None
        forms[block] = lambda hidden: hidden if extra is None else (hidden, *[None] * extra)

    blocks = find_blocks(model)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model)) if ids is None else ids
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(learn).remove)
        with torch.no_grad():
            result = run_model(model, {"input_ids": ids})
    return [forms[block] for block in blocks], result
