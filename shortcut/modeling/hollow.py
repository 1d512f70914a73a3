"""Llama whose blocks may lack their attention or their MLP: `per_layer_config` in config.json says which.

This file is part of a checkpoint made by shortcut, and needs nothing but transformers 5. Apache-2.0.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

BLOCKS = "model.layers"
# The modules that only one half of a block uses, and how many values each of them returns; 0 is a tensor alone. Where
# blocks differ, by the class of the module.
HALVES = {
    "attention": {"self_attn": 2, "input_layernorm": 0},
    "mlp": {"mlp": 0, "post_attention_layernorm": 0},
}
for name, native in (("hollow_llama", "llama"), ("HollowLlamaForCausalLM", "LlamaForCausalLM")):
    if (
        mapping := get_checkpoint_conversion_mapping(native)
    ) is not None:  # how weights are stored and how they are used
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


class HollowLlamaConfig(LlamaConfig):
    """As the native one, but for the type: with that one, missing modules would be filled at random."""

    model_type = "hollow_llama"


class HollowLlamaForCausalLM(LlamaForCausalLM):
    """The native model without the modules that `per_layer_config` skips; these blocks store no keys and values."""

    config_class = HollowLlamaConfig

    def __init__(self, config: HollowLlamaConfig) -> None:
        super().__init__(config)
        text = config.get_text_config(decoder=True)
        skipped = [getattr(layer, "skip", None) or [] for layer in text.per_layer_config]
        text.kv_sharing_modes = ["reuse" if "attention" in skip else None for skip in skipped]
        for block, skip in zip(self.get_submodule(BLOCKS), skipped, strict=True):
            for name, values in [item for half in skip for item in HALVES[half].items()]:
                if hasattr(block, name):
                    setattr(block, name, Nothing(getattr(block, name), values))
