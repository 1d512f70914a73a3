"""Half-blocks in the layout of DeciLM (`model_type` nemotron-nas), which several servers run with code of their own.

What they make of config.json was read in their sources, and never run here (vLLM and SGLang: nemotron_nas.py;
TensorRT-LLM: modeling_nemotron_nas.py; llama.cpp: conversion/deci.py). `check_decilm` reads it as they do, before
anything is written.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.tensors import ROTARY_TABLE
from shortcut.common.errors import ShortcutError
from shortcut.family.fields import rope_apart
from shortcut.family.halves import decilm, hollowing_of
from shortcut.records.actions import GONE
from shortcut.records.plan import Plan
from shortcut.surgery.config import resolve_config

LLAMA_SHAPED = ("LlamaForCausalLM", "MistralForCausalLM")
# What has to be so where it is given at all: the servers know nothing else, or some of them do not look.
WANTED = {
    "hidden_act": "silu",
    **dict.fromkeys(("attention_bias", "mlp_bias", "bias", "qkv_bias"), False),
    **dict.fromkeys(("sliding_window", "layer_types", "quantization_config", "position_embedding_type"), None),
    "logit_scale": 1,
}
# What the config of another family may leave to its own defaults.
WRITTEN = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
)
ROPES = ("default", "linear", "llama3")
STEP = 256  # the servers round the width of an MLP up to a multiple of it


def llama_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The entries of config.json that DeciLM shares with Llama; ShortcutError where the model is shaped otherwise."""
    native, family = hollowing_of(checkpoint.config), checkpoint.config.get("model_type")
    if native.architecture not in LLAMA_SHAPED or family != native.family:
        known = " and ".join(LLAMA_SHAPED)
        raise ShortcutError(f"--format decilm is for {known}, not for {native.architecture} of {family}")
    resolved = resolve_config(checkpoint.config, checkpoint.anatomy, None)
    rope = resolved["rope_parameters"]
    found = {**checkpoint.config, **resolved}
    wrong = [f"{field} = {found[field]!r}" for field in WANTED if found.get(field, WANTED[field]) != WANTED[field]]
    if rope["rope_type"] not in ROPES or rope.get("partial_rotary_factor", 1) != 1:
        wrong.append(f"rope_parameters = {rope!r}")
    wrong += [f"{field} = {found[field]}" for field in ("hidden_size", "num_key_value_heads") if found[field] < 1]
    if found["intermediate_size"] % STEP:
        wrong.append(f"intermediate_size = {found['intermediate_size']}, no multiple of {STEP}")
    if wrong:
        raise ShortcutError(f"--format decilm cannot hold {wrong[0]}: use --format custom")
    return {field: resolved[field] for field in WRITTEN} | rope_apart(rope)


def decilm_config(config: Mapping[str, Any], checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The config of a shortened Llama as one of DeciLM. Raises ShortcutError as `llama_settings` does."""
    llama = llama_settings(checkpoint)
    group = llama["num_attention_heads"] // llama["num_key_value_heads"]
    multiplier = 3 * llama["intermediate_size"] / (2 * llama["hidden_size"])  # see `mlp_width`
    blocks = []
    for gone in (GONE[plan.actions[block]] for block in plan.kept):
        no_attention, no_mlp = "attention" in gone, "mlp" in gone
        attention = {"n_heads_in_group": None if no_attention else group, "no_op": no_attention}
        mlp = {"ffn_mult": None if no_mlp else multiplier, "no_op": no_mlp}
        blocks.append(
            {"attention": attention | {"replace_with_linear": False}, "ffn": mlp | {"replace_with_linear": False}}
        )
    return {**config, **llama, **decilm().settings, "block_configs": blocks}


def mlp_width(multiplier: float, width: int) -> int:
    """The width of an MLP as the servers have it: rounded down to a whole number, then up to a multiple of 256."""
    return -(-int(2 * multiplier * width / 3) // STEP) * STEP


def check_decilm(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise ShortcutError unless the tensors, by name and shape, are just those that servers look for by this config.

    The first block has to have its attention: the servers begin the stream with it.
    """
    blocks = config["block_configs"]
    if blocks[0]["attention"]["no_op"]:
        raise ShortcutError("the first block of a DeciLM has to keep its attention: leave it whole, as by --protect 0")
    expected = _expected_shapes(config)
    if len(blocks) != config["num_hidden_layers"]:
        raise ShortcutError(f"block_configs is for {len(blocks)} blocks of {config['num_hidden_layers']}")
    found = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(ROTARY_TABLE)}
    if config["tie_word_embeddings"]:
        found.setdefault("lm_head.weight", expected["lm_head.weight"])
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        is_so, wanted = (shapes.get(wrong[0], "absent") for shapes in (found, expected))
        raise ShortcutError(f"--format decilm cannot hold {wrong[0]}: it is {is_so}, and has to be {wanted}")


def _expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    width, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    ends = {"model.embed_tokens": (config["vocab_size"], width), "lm_head": (config["vocab_size"], width)}
    expected: dict[str, tuple[int, ...]] = {**ends, "model.norm": (width,)}
    for number, block in enumerate(config["block_configs"]):
        place = f"model.layers.{number}"
        if not block["attention"]["no_op"]:
            shared = heads // block["attention"]["n_heads_in_group"]
            sizes = {"q_proj": heads * size, "k_proj": shared * size, "v_proj": shared * size}
            expected |= {f"{place}.self_attn.{name}": (rows, width) for name, rows in sizes.items()}
            expected |= {f"{place}.self_attn.o_proj": (width, heads * size), f"{place}.input_layernorm": (width,)}
        if not block["ffn"]["no_op"]:
            inner = mlp_width(block["ffn"]["ffn_mult"], width)
            expected |= {f"{place}.mlp.{name}": (inner, width) for name in ("gate_proj", "up_proj")}
            expected |= {f"{place}.mlp.down_proj": (width, inner), f"{place}.post_attention_layernorm": (width,)}
    return {f"{name}.weight": shape for name, shape in expected.items()}
