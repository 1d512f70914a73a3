"""A checkpoint with some of its tensors changed: all others are copied as they are."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.tensors import read_header
from shortcut.common.errors import ShortcutError
from shortcut.live.blocks import find_blocks
from shortcut.live.load import Model
from shortcut.records.plan import Plan

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def with_tensors(checkpoint: Checkpoint, changed: Mapping[str, Tensor], scratch: Path) -> Checkpoint:
    """The checkpoint with other values in these tensors, by name, in the type that they have there.

    scratch: a file that holds them. Raises ShortcutError for a tensor that is not there, or is quantised.
    """
    check_changes(checkpoint, {name: tuple(values.shape) for name, values in changed.items()})
    dtypes = {name: STORED_DTYPES[checkpoint.tensors[name].dtype] for name in changed}
    stored = {name: values.to(dtypes[name]).contiguous().cpu() for name, values in changed.items()}
    try:
        save_file(stored, scratch)
    except (OSError, SafetensorError) as error:
        raise ShortcutError(f"cannot write {scratch}: {' '.join(str(error).split())[:120]}") from None
    new = {tensor.name: tensor for tensor in read_header(scratch).tensors}
    files = tuple(
        replace(file, tensors=tuple(new.get(tensor.name, tensor) for tensor in file.tensors))
        for file in checkpoint.files
    )
    return replace(checkpoint, files=files)


def check_changes(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShortcutError for a tensor that is not there in this shape, or is quantised."""
    for name, shape in shapes.items():
        old = checkpoint.tensors.get(name)
        if old is None or old.dtype not in STORED_DTYPES or old.shape != shape:
            what = "has no tensor" if old is None else f"stores as {old.dtype} {old.shape}"
            raise ShortcutError(f"{checkpoint.name} {what} {name}, which is to be changed")


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor of a checkpoint, as it is stored."""
    with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
        return file.get_tensor(name)


def put_tensors(model: Model, checkpoint: Checkpoint, changed: Mapping[str, Tensor]) -> None:
    """Give a live model of a checkpoint other values for some tensors of its blocks, by their names there."""
    for name, values in changed.items():
        where = checkpoint.anatomy.split(name)
        assert where is not None
        find_blocks(model)[where[0]].get_parameter(where[1]).data.copy_(values)


def names_in(checkpoint: Checkpoint, plan: Plan, changed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What was found by block of the base, and name inside the block, by the names of the shortened checkpoint."""
    return {
        checkpoint.anatomy.join(plan.kept.index(block), name): values
        for block, weights in changed.items()
        for name, values in weights.items()
    }
