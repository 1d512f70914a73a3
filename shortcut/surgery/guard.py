"""The static guard: would the shortened config build the same blocks? Asked before anything is written.

Base and result are built on the meta device from their configs, without weights. Every kept block must have the same
parameters and buffers, of the same shapes, and the same plain attributes in all its modules, but for its number.
Whatever depends on a block's position in a way that the rules of `config.py` do not make good shows up here, and is
refused. What code of a checkpoint's own does with the number is not to be seen in attributes: there the blocks run, on
random weights.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import fused_axis
from shortcut.family.halves import has_own_code
from shortcut.live.blocks import blocks_path
from shortcut.live.load import LOADING_ERRORS, Model, build_empty
from shortcut.surgery.numbered import first_unlike, tracking

NUMBERS = {"layer_idx", "layer_id", "layer_number", "layer_num", "idx"}  # of blocks, in families of transformers
_NAMES_BLOCKS = re.compile("layer|block")
# Attributes that enter no arithmetic (big_bird seeds the random attention of training;
# recurrent_gemma notes its running state).
HARMLESS = {"seed", "num_hidden_layers", "store_full_length_kv", "next_skip_topk"}


def guard(checkpoint: Checkpoint, config: Mapping[str, Any], kept: Sequence[int], code: Path | None) -> None:
    """Compare the kept blocks of the base with the blocks that the shortened config would build.

    code: a folder with code of the checkpoint's own, which is run. Raises ShortcutError naming the first block, module
    and attribute that would not be what it was.
    """
    base, short = (build_empty(content, code) for content in (checkpoint.config, config))
    blocks = blocks_path(base, checkpoint.stack)
    stacks = base.get_submodule(blocks), short.get_submodule(blocks)
    base_blocks, short_blocks = ([_describe(block) for block in stack] for stack in stacks)
    if len(short_blocks) != len(kept):
        raise ShortcutError(f"the shortened config builds {len(short_blocks)} blocks instead of {len(kept)}")
    family = checkpoint.config.get("model_type")
    numbers = {name for block in base_blocks for name in block if name.rpartition(".")[2] in NUMBERS}
    foreign = code is not None and not has_own_code(checkpoint.folder, checkpoint.config)
    if foreign:
        numbers |= tracking(base_blocks) & tracking(short_blocks)
    for new, old in enumerate(kept):
        if difference := _first_difference(base_blocks[old], short_blocks[new], apart=numbers):
            change = f"block {old} would become block {new} with {difference}"
            raise ShortcutError(f"cannot delete these blocks of {family} exactly: {change}")
    owner = blocks.rpartition(".")[0]
    _check_lists(base.get_submodule(owner), short.get_submodule(owner), len(base_blocks), kept)
    _check_shared(checkpoint, base.get_submodule(blocks), kept)
    if checkpoint.stack == "decoder":
        _check_images(base, kept)
    if _counts_tokens(base) and not _counts_tokens(short):
        raise ShortcutError(f"no block of {family} with attention would be left, and generation counts tokens in one")
    expected = {
        name: _with_parts(name, shape, checkpoint.anatomy.depth, len(kept))
        for name, shape in _shapes_outside(base, blocks).items()
    }
    if difference := _first_difference(expected, _shapes_outside(short, blocks)):
        raise ShortcutError(f"cannot delete these blocks of {family} exactly: outside the blocks it has {difference}")
    if numbers and foreign:
        _check_numbers(base, stacks, kept)


def _check_lists(base: nn.Module, short: nn.Module, depth: int, kept: Sequence[int]) -> None:
    """Refuse where the module around the blocks has other ones do something special than those that did it."""
    for name, value in vars(base).items():
        numbers = list(value) if isinstance(value, list | tuple | set) and _NAMES_BLOCKS.search(name) else []
        names_blocks = all(isinstance(number, int) and 0 <= number < depth for number in numbers)
        if not numbers or not names_blocks or len(set(numbers)) < len(numbers):
            continue
        expected = sorted(kept.index(number) for number in numbers if number in kept)
        if sorted(found := getattr(short, name, ())) != expected:
            fault = f"{name} of {type(base).__name__} would be {sorted(found)} instead of {expected}"
            raise ShortcutError(f"cannot delete these blocks exactly: {fault}")


def _check_numbers(base: Model, stacks: tuple[nn.ModuleList, nn.ModuleList], kept: Sequence[int]) -> None:
    """Refuse blocks of a model with code of its own that compute something else under another number."""
    try:
        unlike = first_unlike(base, stacks, kept)
    except LOADING_ERRORS as error:
        reason = f"whether their number matters cannot be tried: {' '.join(str(error).split())[:200]}"
    else:
        if unlike is None:
            return
        reason = f"block {unlike} computes something else as block {list(kept).index(unlike)}"
    raise ShortcutError(f"cannot delete these blocks of {base.config.model_type} exactly: {reason}")


def _check_shared(checkpoint: Checkpoint, blocks: nn.Module, kept: Sequence[int]) -> None:
    """Refuse to delete the one block under which weights that several blocks share are stored."""
    members: dict[int, set[tuple[int, str]]] = {}
    for number, block in enumerate(blocks.children()):
        for name, parameter in block.named_parameters(remove_duplicate=False):
            members.setdefault(id(parameter), set()).add((number, name))
    for shared in members.values():
        owners = {number for number, name in shared if checkpoint.anatomy.join(number, name) in checkpoint.tensors}
        sharing = {number for number, _ in shared}
        users = sharing & set(kept)
        if len(sharing) > 1 and users and owners.isdisjoint(kept):
            family, gone = checkpoint.config.get("model_type"), min(owners or sharing)
            fault = f"the weights that it shares with block {min(users)} are stored under it"
            raise ShortcutError(f"cannot delete block {gone} of {family}: {fault}")


def _check_images(base: Model, kept: Sequence[int]) -> None:
    """Refuse to delete blocks behind which image features are added by block number (Qwen3-VL, Granite Vision)."""

    def find(config: Any, name: str) -> Any:
        if not isinstance(config, dict):
            return None
        return config.get(name) or next((found for part in config.values() if (found := find(part, name))), None)

    config = base.config.to_dict()
    first = len(find(config, "deepstack_visual_indexes") or ())
    first = max([first, *(1 + place for _, place in find(config, "deepstack_layer_map") or ())])
    if gone := set(range(first)) - set(kept):
        family = config.get("model_type")
        raise ShortcutError(
            f"cannot delete block {min(gone)} of {family}: image features enter up to block {first - 1}"
        )


def _counts_tokens(model: Model) -> bool:
    """Whether a block has a cache that counts tokens."""
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    return not kinds or any(kind not in {"linear_attention", "conv", "moe", "mlp"} for kind in kinds)


def _describe(block: nn.Module) -> dict[str, Any]:
    """Shapes of a block's tensors, and classes and plain attributes of its modules, by name inside the block."""
    described: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    for name, module in block.named_modules():
        if _passes_on(module):
            continue
        described[f"class of {name or 'block'}"] = type(module).__name__
        for attribute, value in vars(module).items():
            if isinstance(value, int | float | bool | str | None) and attribute not in HARMLESS:
                described[f"{name}.{attribute}".lstrip(".")] = value
    return described


def _passes_on(module: nn.Module) -> bool:
    """Whether a module gives what it is given, as those that drop paths in training do outside it."""
    given = torch.empty(1, 1, device="meta")
    try:
        return not any(module.children()) and not any(module.parameters()) and module.eval()(given) is given
    except LOADING_ERRORS:
        return False


def _shapes_outside(model: Model, blocks: str) -> dict[str, tuple[int, ...]]:
    inside = {id(tensor) for tensor in model.get_submodule(blocks).state_dict(keep_vars=True).values()}
    tensors = model.state_dict(keep_vars=True).items()
    return {name: tuple(tensor.shape) for name, tensor in tensors if id(tensor) not in inside}


def _with_parts(name: str, shape: tuple[int, ...], depth: int, kept: int) -> tuple[int, ...]:
    """The shape that a tensor outside the blocks has after the cut."""
    axis = fused_axis(name)
    return shape if axis is None else (*shape[:axis], shape[axis] // depth * kept, *shape[axis + 1 :])


def _is_rounding(was: Any, would_be: Any) -> bool:
    return isinstance(was, float) and isinstance(would_be, float) and math.isclose(was, would_be, rel_tol=1e-12)


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any], apart: Collection[str] = ()) -> str | None:
    for what in sorted((before.keys() | after.keys()) - set(apart)):
        was, would_be = before.get(what, "absent"), after.get(what, "absent")
        if was != would_be and not _is_rounding(was, would_be):
            return f"{what} = {would_be} instead of {was}"
    return None
