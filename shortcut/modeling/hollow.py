"""Llama whose blocks may lack their attention or their MLP, or run for the last token of a prompt alone.

`per_layer_config` in config.json says which: {"3": {"skip": ["attention"]}, "5": {"prefill": "last"}}.
This file is part of a checkpoint made by shortcut, and needs nothing but transformers. Apache-2.0.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from shortcut.modeling.passing import (
    Whole,
    blocks_in,
    changed_class,
    check_passing,
    given_to,
    make_changed,
    run_last,
    store_nothing,
)

BLOCKS = "model.layers"
# The modules that only one half of a block uses, and how many values each of them returns; 0 is a tensor alone. Where
# blocks differ, by the class of the module.
HALVES = {
    "attention": {"self_attn": 2, "input_layernorm": 0},
    "mlp": {"mlp": 0, "post_attention_layernorm": 0},
}
WITHOUT_CACHE = "without a cache, tokens that were generated would pass by blocks as those of a prompt do"
NATIVE, OWN = ("llama", "LlamaForCausalLM"), ("hollow_llama", "HollowLlamaForCausalLM")
for native, own in zip(NATIVE, OWN, strict=True):
    if (mapping := get_checkpoint_conversion_mapping(native)) is not None:  # from stored to used
        register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


class Nothing(nn.Module):
    """Stands where a module was, and adds nothing to the stream."""

    def __init__(self, module: nn.Module, values: int | dict[str, int]) -> None:
        super().__init__()
        self.signature = inspect.signature(module.forward)
        self.values = values[type(module).__name__] if isinstance(values, dict) else values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = given_to(self.signature, *args, **kwargs)
        stream = given.get("residual")  # some modules add to it themselves
        output = torch.zeros_like(next(iter(given.values()))) if stream is None else stream
        return (output, *[None] * (self.values - 1)) if self.values else output


class LastToken:
    """A block that runs for the last token of a prompt alone, in front of its own class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run_last(self, super().forward, *args, **kwargs)  # type: ignore[arg-type, misc]

    def __reduce__(self) -> Any:
        return make_changed, type(self).__mro__[1:3], self.__dict__


class HollowLlamaConfig(LlamaConfig):
    """As the native one, but for the type: with that one, missing modules would be filled at random."""

    model_type = "hollow_llama"


class HollowLlamaForCausalLM(Whole, LlamaForCausalLM):
    """The native model as `per_layer_config` has it; blocks without attention store no keys and values."""

    config_class = HollowLlamaConfig

    def __init__(self, config: HollowLlamaConfig) -> None:
        super().__init__(config)
        text = config.get_text_config(decoder=True)
        layers = text.per_layer_config
        if isinstance(layers, dict):  # as it is in config.json, until transformers 5.14
            layers = [SimpleNamespace(**layers.get(str(number), {})) for number in range(text.num_hidden_layers)]
        skipped = [getattr(layer, "skip", None) or [] for layer in layers]
        if any("attention" in skip for skip in skipped):
            for fault in store_nothing(text, ["attention" in skip for skip in skipped]):
                raise TypeError(fault)
        for block, layer, skip in zip(blocks_in(self, BLOCKS), layers, skipped, strict=True):
            for name, values in [item for half in skip for item in HALVES[half].items()]:
                if hasattr(block, name):
                    setattr(block, name, Nothing(getattr(block, name), values))
            if getattr(layer, "prefill", None) == "last":
                check_passing(type(block))
                block.__class__ = changed_class(LastToken, type(block))  # type: ignore[arg-type]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the native one, but always with a cache where prompts pass by blocks: new tokens do not pass by them."""
        given = given_to(inspect.signature(super().generate), *args, **kwargs)
        settings = given.get("generation_config") or self.generation_config
        wanted = given.get("use_cache", getattr(settings, "use_cache", None))
        if wanted is False and any(isinstance(block, LastToken) for block in blocks_in(self, BLOCKS)):
            logging.get_logger(__name__).warning_once(f"use_cache=False is not followed: {WITHOUT_CACHE}")
            kwargs["use_cache"] = True
        return super().generate(*args, **kwargs)
