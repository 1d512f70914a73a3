"""A checkpoint on disk, read without loading it: config.json, the headers of its weight files, its anatomy."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shortcut.checkpoint.remote import Mirror
from shortcut.checkpoint.tensors import Tensor, TensorFile, read_header
from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.family.anatomy import Anatomy, find_anatomy
from shortcut.family.fields import check_family, check_fields
from shortcut.records.plan import Base

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_NESTING = 64  # levels of objects and lists in a JSON file; real ones have fewer than ten


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint. `name` and `revision` say what the user called it; stack, whose blocks are meant."""

    folder: Path
    name: str
    revision: str | None
    config: Mapping[str, Any]
    files: tuple[TensorFile, ...]
    mirrors: tuple[Mirror, ...] = ()  # of weight files that are on the Hub, and here only in part
    stack: Stack = "decoder"

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where its blocks are. Raises ShortcutError where that cannot be told."""
        try:
            return find_anatomy(self.tensors, self.config, self.stack)
        except ShortcutError:
            check_family(self.config)  # knows more of families whose blocks are no plain list
            raise

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def base(self) -> Base:
        """How plans and scores name this checkpoint."""
        return Base(self.name, self.revision, self.anatomy.depth, self.stack)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors, as stored."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @cached_property
    def blocks(self) -> tuple[tuple[tuple[str, Tensor], ...], ...]:
        """The tensors of each block in order, each with its name inside the block."""
        blocks: list[list[tuple[str, Tensor]]] = [[] for _ in range(self.anatomy.depth)]
        for name, tensor in self.tensors.items():
            where = self.anatomy.split(name)
            if where and where[0] < self.anatomy.depth:  # behind them, some families predict further tokens
                blocks[where[0]].append((where[1], tensor))
        return tuple(map(tuple, blocks))

    @property
    def block_parameters(self) -> tuple[int, ...]:
        """Elements of each block, as stored: (blocks,)."""
        return tuple(sum(tensor.parameters for _, tensor in block) for block in self.blocks)


def read_checkpoint(folder: Path, name: str | None = None, revision: str | None = None) -> Checkpoint:
    """Read the headers of the checkpoint in a folder.

    Raises ShortcutError where the folder holds no safetensors checkpoint, or a damaged one.
    """
    config = read_config(folder)
    files = tuple(read_header(folder / file) for file in weight_files(folder, {path.name for path in folder.iterdir()}))
    check_index(folder, files)
    return Checkpoint(folder, name or str(folder), revision, config, files)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint. Raises ShortcutError where it holds what no family's does."""
    config = read_json(folder / "config.json")
    check_fields(config)
    return config


def weight_files(folder: Path, present: Collection[str]) -> list[str]:
    """Names of the weight files of a checkpoint: the single one, which wins as in transformers, or those of the index.

    present: names of all files that belong to it. Raises ShortcutError where it has no weights in safetensors.
    """
    if SINGLE in present:
        return [SINGLE]
    if INDEX not in present:
        weights = (".safetensors", ".bin", ".gguf", ".pth")
        found = ", ".join(sorted(name for name in present if name.endswith(weights))) or "none"
        raise ShortcutError(f"no {SINGLE} or {INDEX} in {folder}; its weight files are: {found}")
    names = sorted(set(read_weight_map(folder / INDEX).values()))
    if astray := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise ShortcutError(f"{folder / INDEX} names {astray[0]!r}, which is no safetensors file of its own folder")
    return names


def check_index(folder: Path, files: Sequence[TensorFile]) -> None:
    """Compare the index of a sharded checkpoint with the headers of its shards; ShortcutError where they disagree."""
    found = {tensor.name: file.path.name for file in files for tensor in file.tensors}
    if sum(len(file.tensors) for file in files) != len(found):
        raise ShortcutError(f"the shards in {folder} hold a tensor twice")
    if [file.path.name for file in files] == [SINGLE]:
        return
    index = read_weight_map(folder / INDEX)
    if wrong := sorted(name for name in index.keys() | found.keys() if index.get(name) != found.get(name)):
        raise ShortcutError(f"{folder / INDEX} and the shards disagree about {wrong[0]!r} and {len(wrong) - 1} more")


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor names and the files that hold them, from the index of a sharded checkpoint."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise ShortcutError(f"{path} is damaged: it has no weight_map of tensor names to file names")
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text)
        if "\\ud" in text.lower():  # JSON can spell half a character, and UTF-8 cannot
            json.dumps(data, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise ShortcutError(f"no {path.name} in {path.parent}: not a checkpoint that transformers loads") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShortcutError(f"cannot read {path}: {error}") from None
    if not isinstance(data, dict):
        raise ShortcutError(f"{path} does not hold a JSON object")
    level: list[Any] = [data]
    for _ in range(MAX_NESTING):
        level = [part for item in level for part in (item.values() if isinstance(item, dict) else item)]
        level = [part for part in level if isinstance(part, dict | list)]
    if level:
        raise ShortcutError(f"{path} is damaged: it is nested more than {MAX_NESTING} levels deep")
    return data
