"""config.json of the shortened model: edited as JSON, so that every field the family or a server reads stays as it was.

Three kinds of field follow the blocks: the depth itself, lists with one entry per block, and numbers or sets of block
numbers. Families that store only a period or nothing at all, and derive the list when they are loaded, are resolved
through their own config class first and get the explicit list.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import DECODER_DEPTHS, EXTRA_HEADS, Anatomy, depth_fields, stack_config
from shortcut.family.fields import (
    CYCLES,
    INCLUSIVE_ENDS,
    INDEX_SETS,
    KEYED,
    PERIODS,
    PERIODS_WITH_OFFSET,
    PREFIX_COUNTS,
    SUFFIX_COUNTS,
    check_family,
    is_per_block,
    is_plain,
)

SEEN_AT = "vision_feature_layer"  # which states of a tower for images go to the decoder


def cut_config(
    config: Mapping[str, Any],
    anatomy: Anatomy,
    kept: Sequence[int],
    code: Path | None = None,
    *,
    keeps_heads: bool = False,
) -> dict[str, Any]:
    """The content of config.json after all blocks but `kept` are gone.

    kept: ascending block numbers of the base. code: as for `load_config`. keeps_heads: whether those that predict
    further tokens stay. Raises ShortcutError for a family that cannot be cut exactly.
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
    if config.get("is_encoder_decoder") and not any(field in text for field in DECODER_DEPTHS):
        anatomy = _name_both_depths(text, resolve_config(config, anatomy, code), anatomy)
    _check_providers(text, kept)
    _solve_periods(text, anatomy.depth, kept)
    if anatomy.stack == "vision" and SEEN_AT in result:
        result[SEEN_AT] = _move_states(SEEN_AT, result[SEEN_AT], anatomy.depth, kept)
    stages = _move_stages(text, anatomy.depth, kept)
    for field, value in text.items():
        if keeps_heads and field in EXTRA_HEADS:
            continue
        text[field] = _cut_field(field, value, anatomy, kept)
    if anatomy.stack == "encoder" and "num_decoder_layers" in text:
        text.setdefault("decoder_layers", text["num_decoder_layers"])  # else caches are as deep as the encoder (T5)
    text.update(stages)
    return result


def _name_both_depths(text: dict[str, Any], resolved: Mapping[str, Any], anatomy: Anatomy) -> Anatomy:
    """Of an encoder-decoder whose config names one depth, such as an old T5's: name the decoder's as well."""
    text.update({field: resolved[field] for field in DECODER_DEPTHS if field in resolved})
    return replace(anatomy, depth_fields=depth_fields(text, anatomy.stack))


def _move_stages(text: Mapping[str, Any], depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """What a backbone whose every block is a stage (DINOv2) says of them, after the cut."""
    if len(text.get("stage_names") or ()) != depth + 1:
        return {}
    found = {"stage_names": text["stage_names"][: len(kept) + 1]}
    if indices := text.get("out_indices"):
        moved = _move_states("out_indices", indices, depth, kept)
        found |= {"out_indices": moved, "out_features": [found["stage_names"][index] for index in moved]}
        if len(set(found["out_features"])) < len(moved):
            raise ShortcutError(f"states are handed on at {indices} (out_indices): a block between them has to stay")
    return found


def _move_states(field: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """The numbers of the states between blocks that are handed on, after the cut; negative ones count from the end.

    Raises ShortcutError where states within the stack would become those at its end, which a norm may have gone over.
    """
    if isinstance(value, list):
        return [_move_states(field, each, depth, kept) for each in value]
    if not isinstance(value, int):
        return value
    state = value if value >= 0 else depth + 1 + value
    moved = sum(block < state for block in kept)
    if state < depth and moved == len(kept):
        raise ShortcutError(
            f"states in front of block {state} are handed on ({field}): it or one behind it has to stay"
        )
    return moved if value >= 0 else moved - len(kept) - 1


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
    if field in EXTRA_HEADS and number:
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


def _derives_lists(config: Mapping[str, Any], anatomy: Anatomy) -> bool:
    """Whether the family's class may know per-block lists that this JSON lacks.

    Not for plain families, and not where transformers 5 wrote the whole text config (nested ones omit what equals the
    default) and no period is left in it.
    """
    _, text = stack_config(config, anatomy.stack)
    written = str(config.get("transformers_version", "")).split(".")[0]
    complete = not anatomy.config_path and written.isdigit() and int(written) >= 5
    complete = complete and not any(text.get(field) for field in PERIODS)
    return not is_plain(text) and not complete


def _write_lists(text: dict[str, Any], resolved: Mapping[str, Any], depth: int) -> None:
    derived = {field: value for field, value in resolved.items() if is_per_block(field, value, depth)}
    text.update({field: value for field, value in derived.items() if text.get(field) is None})
    if derived:
        for field in PERIODS:
            text.pop(field, None)


def resolve_config(config: Mapping[str, Any], anatomy: Anatomy, code: Path | None) -> dict[str, Any]:
    """What the family's own config class makes of the text config. Imports transformers, but builds no model."""
    from shortcut.live.load import load_config

    part: dict[str, Any] = load_config(config, code).to_dict()
    for key in anatomy.config_path:
        part = part[key]
    return part
