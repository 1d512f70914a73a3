"""Llama whose blocks may lack their attention or their MLP, or run for the last token of a prompt alone.

`per_layer_config` in config.json says which: {"3": {"skip": ["attention"]}, "5": {"prefill": "last"}}.
This file is part of a checkpoint made by shortcut, and needs nothing but transformers 5. Apache-2.0.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

BLOCKS = "model.layers"
# The modules that only one half of a block uses, and how many values each of them returns; 0 is a tensor alone. Where
# blocks differ, by the class of the module.
HALVES = {
    "attention": {"self_attn": 2, "input_layernorm": 0},
    "mlp": {"mlp": 0, "post_attention_layernorm": 0},
}
# Arguments of a block that have an entry for every token, and in which dimension.
TOKENS = {"hidden_states": 1, "attention_mask": -2, "position_ids": -1, "position_embeddings": -2, "cache_position": -1}
for name, native in (("hollow_llama", "llama"), ("HollowLlamaForCausalLM", "LlamaForCausalLM")):
    if (mapping := get_checkpoint_conversion_mapping(native)) is not None:  # from stored to used
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)


class Nothing(nn.Module):
    """Stands where a module was, and adds nothing to the stream."""

    def __init__(self, module: nn.Module, values: int | dict[str, int]) -> None:
        super().__init__()
        self.signature = inspect.signature(module.forward)
        self.values = values[type(module).__name__] if isinstance(values, dict) else values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        stream = self.signature.bind(*args, **kwargs).arguments.get("residual")  # some modules add to it themselves
        output = torch.zeros_like(states) if stream is None else stream
        return (output, *[None] * (self.values - 1)) if self.values else output


class Stored(Exception):  # noqa: N818  (it is no error)
    """Ends a block as soon as its keys and values are known."""


class Catcher:
    """In place of a cache: takes the keys and values of the tokens that go no further."""

    def __init__(self, cache: Any) -> None:
        self.cache = DynamicCache() if cache is None else cache

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        raise Stored(keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class Merger(Catcher):
    """In place of a cache: puts these keys and values in front of those of the last token, and stores all."""

    def __init__(self, cache: Any, earlier: tuple[Tensor, Tensor]) -> None:
        super().__init__(cache)
        self.earlier = earlier

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = (torch.cat(pair, dim=-2) for pair in zip(self.earlier, (keys, values), strict=True))
        return self.cache.update(keys, values, *args, **kwargs)


def last_token_only(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block whose prompt passes by: all tokens give it keys and values, and only the last is changed by it."""
    states = args[0] if args else kwargs["hidden_states"]
    if states.shape[1] == 1:
        return forward(*args, **kwargs)
    signature = inspect.signature(forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    place = "layer_past" if "layer_past" in signature.parameters else "past_key_values"
    cache = given.get(place)
    try:
        forward(**of_tokens(given, slice(-1)) | {place: Catcher(cache)})
    except Stored as stored:
        earlier = stored.args
    output = forward(**of_tokens(given, slice(-1, None)) | {place: Merger(cache, earlier)})
    alone = isinstance(output, Tensor)
    changed = torch.cat([states[:, :-1], output if alone else output[0]], dim=1)
    return changed if alone else (changed, *output[1:])


def of_tokens(given: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The arguments of a block for some of its tokens."""

    def cut(value: Any, dimension: int) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(each, dimension) for each in value)
        fits = isinstance(value, Tensor) and (dimension != -2 or value.dim() > 2)  # a mask of (batch, keys) stays
        return value.movedim(dimension, 0)[tokens].movedim(0, dimension) if fits else value

    return {name: cut(value, TOKENS[name]) if name in TOKENS else value for name, value in given.items()}


class LastToken:
    """A block that runs for the last token of a prompt alone, in front of its own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return last_token_only(super().forward, *args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        return make_last_token, (type(self).__mro__[2],), self.__dict__


@functools.cache
def last_token_class(stock: Any) -> Any:
    """The class of such a block, under the name of its own class, as policies go by names."""
    return type(stock.__name__, (LastToken, stock), {})


def make_last_token(stock: Any) -> Any:
    """An empty block, for copies and pickles."""
    return object.__new__(last_token_class(stock))


class HollowLlamaConfig(LlamaConfig):
    """As the native one, but for the type: with that one, missing modules would be filled at random."""

    model_type = "hollow_llama"


class HollowLlamaForCausalLM(LlamaForCausalLM):
    """The native model as `per_layer_config` has it; blocks without attention store no keys and values."""

    config_class = HollowLlamaConfig

    def __init__(self, config: HollowLlamaConfig) -> None:
        super().__init__(config)
        text = config.get_text_config(decoder=True)
        skipped = [getattr(layer, "skip", None) or [] for layer in text.per_layer_config]
        text.kv_sharing_modes = ["reuse" if "attention" in skip else None for skip in skipped]
        for block, layer, skip in zip(self.get_submodule(BLOCKS), text.per_layer_config, skipped, strict=True):
            for name, values in [item for half in skip for item in HALVES[half].items()]:
                if hasattr(block, name):
                    setattr(block, name, Nothing(getattr(block, name), values))
            if getattr(layer, "prefill", None) == "last":
                block.__class__ = last_token_class(type(block))  # type: ignore[arg-type]
