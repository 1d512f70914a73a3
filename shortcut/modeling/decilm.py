"""Llama whose blocks may lack their attention or their MLP, in the layout of DeciLM.

`block_configs` in config.json says which: one entry per block, {"attention": {"no_op": true, ...}, "ffn": {...}}.
This file is part of a checkpoint made by shortcut, and needs nothing but transformers. Apache-2.0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


class Entries(dict[str, Any]):
    """A part of config.json whose entries are attributes as well: servers read `block.ffn.no_op`."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciLMConfig(LlamaConfig):
    """As that of Llama, and what each block has."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        blocks = block_configs or []
        self.block_configs = [Entries({half: Entries(part) for half, part in block.items()}) for block in blocks]


class NoAttention(nn.Module):
    """Stands where an attention was, and adds nothing to the stream."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Stands where an MLP was, and adds nothing to the stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DeciLMForCausalLM(LlamaForCausalLM):
    """Llama without what `block_configs` calls no_op; blocks without attention store no keys and values."""

    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        config.kv_sharing_modes = ["reuse" if block.attention.no_op else None for block in config.block_configs]
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            if block.attention.no_op:
                layer.input_layernorm, layer.self_attn = nn.Identity(), NoAttention()
            if block.ffn.no_op:
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), NoMLP()
