"""config.json of the shortened model: edited as JSON, so that every field the family or a server reads stays as it was.

Three kinds of field follow the blocks: the depth itself, lists with one entry per block, and numbers or sets of block
numbers. Families that store only a period or nothing at all, and derive the list when they are loaded, are resolved
through their own config class first and get the explicit list.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shortcut.anatomy import EXTRA_HEADS, Anatomy, text_config
from shortcut.errors import ShortcutError

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


def cut_config(
    config: Mapping[str, Any], anatomy: Anatomy, kept: Sequence[int], code: Path | None = None
) -> dict[str, Any]:
    """The content of config.json after all blocks but `kept` are gone.

    kept: ascending block numbers of the base. code: as for `load_config`. Raises ShortcutError for a family that cannot
    be cut exactly.
    """
    if len(kept) == anatomy.depth:
        return copy.deepcopy(dict(config))
    check_family(config)
    result = copy.deepcopy(dict(config))
    text = result
    for key in anatomy.config_path:
        text = text[key]
    if _derives_lists(config, anatomy):
        _write_lists(text, resolve_config(config, anatomy, code), anatomy.depth)
    _check_providers(text, kept)
    _solve_periods(text, anatomy.depth, kept)
    for field, value in text.items():
        text[field] = _cut_field(field, value, anatomy, kept)
    return result


def _cut_field(field: str, value: Any, anatomy: Anatomy, kept: Sequence[int]) -> Any:
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    numbers = {old: new for new, old in enumerate(kept)}
    if field in anatomy.depth_fields and number is not None:
        return len(kept)
    if field in PREFIX_COUNTS and number is not None:
        return sum(block < number for block in kept)
    if field in INCLUSIVE_ENDS and number is not None and number >= 0:
        return sum(block <= number for block in kept) - 1
    if field in SUFFIX_COUNTS and number:
        return sum(block >= anatomy.depth - number for block in kept)
    if field in EXTRA_HEADS and number:  # they do not fit another stack of blocks
        return 0
    if field in INDEX_SETS and value:
        first = INDEX_SETS[field]
        return [numbers[block - first] + first for block in value if block - first in numbers]
    if field in KEYED and value:
        return {str(numbers[int(key)]): entry for key, entry in value.items() if int(key) in numbers}
    if field in CYCLES and value:
        cycled = [value[block % len(value)] for block in kept]
        return "".join(cycled) if isinstance(value, str) else cycled
    if field == "scale_depth" and value:  # minicpm3 divides it by the square root of the depth
        return value * math.sqrt(len(kept) / anatomy.depth)
    if field == "kv_source_layers" and is_per_block(field, value, anatomy.depth):
        return [numbers[value[block]] for block in kept]
    if is_per_block(field, value, anatomy.depth):
        return [value[block] for block in kept]
    return value


def _check_providers(text: Mapping[str, Any], kept: Sequence[int]) -> None:
    """Refuse to delete a block whose choice of tokens, or whose keys, a later one uses (GLM, Mistral Large)."""
    if kept[0] in _list(text, "cross_attention_layers"):  # the cache's length is read from the first block
        raise ShortcutError(f"block {kept[0]} of {text.get('model_type')} attends to images: it cannot come first")
    sources: dict[int, int] = {}
    for block, kind in enumerate(_list(text, "indexer_types")):
        sources[block] = block if kind == "full" else sources.get(block - 1, block)
    kinds, shared = _list(text, "layer_types"), text.get("num_kv_shared_layers") or 0
    own = max(0, len(kinds) - shared)  # the blocks behind take keys and values from the last of these of their kind
    borrowed = {b: max((o for o in range(own) if kinds[o] == kinds[b]), default=b) for b in range(own, len(kinds))}
    for block, source in [*borrowed.items(), *sources.items(), *enumerate(_list(text, "kv_source_layers"))]:
        if block in kept and source not in kept:
            raise ShortcutError(
                f"cannot delete block {source} of {text.get('model_type')}: block {block} depends on it"
            )


def _solve_periods(text: dict[str, Any], depth: int, kept: Sequence[int]) -> None:
    """Write periods that say of the kept blocks what the old ones said; where none does, the guard will refuse."""
    step = text.get("decoder_sparse_step")
    if step and step != 1:
        dense = _list(text, "mlp_only_layers")
        text["mlp_only_layers"] = [block for block in range(depth) if block in dense or (block + 1) % step]
        text["decoder_sparse_step"] = 1
    for period_field, offset_field in PERIODS_WITH_OFFSET.items():
        period, offset = text.get(period_field), text.get(offset_field)
        if not period or offset is None:
            continue
        wanted = [block % period == offset for block in kept]
        for length in range(1, len(kept) + 2):
            fits = [o for o in range(length) if [new % length == o for new in range(len(kept))] == wanted]
            if fits:
                text[period_field], text[offset_field] = length, fits[0]
                break


def _list(text: Mapping[str, Any], field: str) -> list[Any]:
    return text.get(field) or []


def is_per_block(field: str, value: Any, depth: int) -> bool:
    """Whether a config field is a list with one entry per block (and not, say, as many token ids by accident)."""
    return (
        isinstance(value, list) and len(value) == depth and not field.endswith(("_token_id", "_token_ids", "_section"))
    )


def _derives_lists(config: Mapping[str, Any], anatomy: Anatomy) -> bool:
    """Whether the family's class may know per-block lists that this JSON lacks: not for plain families, and not where
    transformers 5 wrote the whole text config (nested ones omit what equals the default)."""
    _, text = text_config(config)
    written = str(config.get("transformers_version", "")).split(".")[0]
    complete = not anatomy.config_path and written.isdigit() and int(written) >= 5
    return not is_plain(text) and not complete


def _write_lists(text: dict[str, Any], resolved: Mapping[str, Any], depth: int) -> None:
    derived = {field: value for field, value in resolved.items() if is_per_block(field, value, depth)}
    text.update({field: value for field, value in derived.items() if text.get(field) is None})
    if derived:
        for field in PERIODS:
            text.pop(field, None)


def resolve_config(config: Mapping[str, Any], anatomy: Anatomy, code: Path | None) -> dict[str, Any]:
    """What the family's own config class makes of the text config. Imports transformers, but builds no model."""
    from shortcut.live import load_config

    part: dict[str, Any] = load_config(config, code).to_dict()
    for key in anatomy.config_path:
        part = part[key]
    return part


def rope_apart(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json from which transformers 4 and servers read what `rope_parameters` says."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
