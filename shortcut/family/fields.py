"""The fields of config.json that follow the blocks, and the families whose blocks cannot be deleted."""

from collections.abc import Callable, Mapping
from typing import Any

from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import text_config

# Families whose config class derives nothing per block, so that the JSON alone says everything. (mistral has to be
# here: with a layer_types of its own it would be loaded as another family.)
PLAIN = {
    *("bloom", "codegen", "falcon", "gemma", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "granite", "llama", "mistral"),
    *("mixtral", "mpt", "nemotron", "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "stablelm", "starcoder2"),
}


# Families whose arithmetic depends on the block number in a way that no config field can make good.
REFUSED = {
    "blt": "it runs several stacks of blocks, over bytes and over patches",
    "beam": "its residual scales depend on the block number",
    "dory": "its blocks are run in recurrent loops",
    "diffllama": "its attention scales depend on the block number",
    "evolla": "its cross-attention adapters are placed by a period",
    "hrm_text": "its blocks are run in recurrent loops",
    "idefics": "its cross-attention blocks are placed by a period",
    "inkling2": "its residuals cross block boundaries by block number",
    "inkling2_loop": "its blocks are run in loops, and its residuals cross block boundaries by block number",
    "inkling2_loop_text": "its blocks are run in loops, and its residuals cross block boundaries by block number",
    "inkling2_text": "its residuals cross block boundaries by block number",
    "reformer": "its blocks are reversible pairs of streams",
    "xlm": "its blocks are spread over four lists of modules",
    "zamba2": "its blocks share weights and adapters by block number",
}


# Numbers of the blocks at the front of the model that are special; order is kept, so recounting is exact.
PREFIX_COUNTS = {
    *("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index", "num_hash_layers"),
    "dense_mlp_idx",
}


# The number of the last block that is special, and the number of blocks at the end of the model that are.
INCLUSIVE_ENDS = {"moe_layer_end_index"}


SUFFIX_COUNTS = {"num_kv_shared_layers"}


# Sets of block numbers, with the number of the first block; and maps from block number to something.
INDEX_SETS = {
    **dict.fromkeys(("moe_layers", "full_attn_idxs", "mlp_only_layers", "cross_attention_layers"), 0),
    **dict.fromkeys(("attn_layer_indices", "local_layer_ids", "hybrid_layer_ids", "rope_scaling_layers"), 0),
    "ple_layer_ids": 1,
}


KEYED = {"per_layer_config"}


# A pattern that the blocks repeat, or that names each of them by a character.
CYCLES = {"block_types", "hybrid_override_pattern"}


# Every period-th block, from an offset on, is special.
PERIODS_WITH_OFFSET = {"attn_layer_period": "attn_layer_offset", "expert_layer_period": "expert_layer_offset"}


# What a class makes a per-block list of when the JSON has none; once the list is written they would mislead.
PERIODS = (
    *("sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval"),
    *("interleave_moe_layer_step", "global_attn_every_n_layers", "layer_group_size", "moe_layer_freq"),
)


# Fields that bring the block number into the arithmetic when they have another value than the one named.
UNSOLVED = {"scale_attn_by_inverse_layer_idx": False, "cross_layer_interval": None}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 1 << 31


def _are_blocks(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


# What a field has to be for the rules below to mean anything; None always may be.
_FITS: dict[str, Callable[[Any], bool]] = {
    "model_type": lambda value: isinstance(value, str),
    **dict.fromkeys(("num_kv_shared_layers", "decoder_sparse_step"), _is_count),
    **dict.fromkeys((*PERIODS_WITH_OFFSET, *PERIODS_WITH_OFFSET.values()), _is_count),
    **dict.fromkeys(("layer_types", "indexer_types"), lambda value: isinstance(value, list)),
    **dict.fromkeys((*INDEX_SETS, "kv_source_layers"), _are_blocks),
    **dict.fromkeys(KEYED, lambda value: isinstance(value, dict) and all(map(str.isdecimal, value))),
    **dict.fromkeys(CYCLES, lambda value: isinstance(value, list | str)),
    "scale_depth": lambda value: isinstance(value, int | float) and abs(value) < 1 << 31,
}


def rope_apart(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json from which transformers 4 and servers read what `rope_parameters` says."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise ShortcutError for a config with a value that no family has, such as a text for a number."""
    for part in (config, text_config(config)[1]):
        for field, fits in _FITS.items():
            if part.get(field) is not None and not fits(part[field]):
                raise ShortcutError(f"config.json has {field} = {str(part[field])[:80]!r}: no family has such a value")


def refusal(config: Mapping[str, Any]) -> str | None:
    """Why blocks of this family cannot be deleted exactly; None where they can."""
    _, text = text_config(config)
    for family in (config.get("model_type"), text.get("model_type")):
        if family in REFUSED:
            return f"{family}: {REFUSED[family]}"
    for field, harmless in UNSOLVED.items():
        if field in text and text[field] not in (harmless, None):
            return f"{text.get('model_type')}: {field} = {text[field]!r} depends on the block number"
    return None


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether every block of this model is built alike, by a family whose config speaks of no single block."""
    return config.get("model_type") in PLAIN and "auto_map" not in config


def check_family(config: Mapping[str, Any]) -> None:
    """Raise ShortcutError for a family whose blocks cannot be deleted exactly, whichever they are."""
    if reason := refusal(config):
        raise ShortcutError(f"cannot delete blocks of {reason}")


def is_per_block(field: str, value: Any, depth: int) -> bool:
    """Whether a config field is a list with one entry per block (and not, say, as many token ids by accident)."""
    return (
        isinstance(value, list) and len(value) == depth and not field.endswith(("_token_id", "_token_ids", "_section"))
    )
