"""Tensors under keys that have an order, in memory up to a budget and in files beyond it."""

from collections.abc import Iterator, MutableMapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=tuple[Any, ...] | int)


class Budget:
    """Bytes that several stores may keep in memory together, and the folder for what is beyond."""

    def __init__(self, size: int, folder: Path) -> None:
        self.left, self.folder, self.names = size, folder, count()


class SpillDict(MutableMapping[Key, Tensor]):
    """A dict of tensors whose later entries go to files when the budget is used up."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.kept: dict[Key, Tensor] = {}
        self.files: dict[Key, tuple[Path, torch.dtype, torch.Size, torch.device]] = {}

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        self.pop(key, None)
        if tensor.nbytes <= self.budget.left:
            self.budget.left -= tensor.nbytes
            self.kept[key] = tensor
            return
        path = self.budget.folder / f"{next(self.budget.names)}.bin"
        tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
        self.files[key] = (path, tensor.dtype, tensor.shape, tensor.device)

    def __getitem__(self, key: Key) -> Tensor:
        if key in self.kept:
            return self.kept[key]
        path, dtype, shape, device = self.files[key]
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=dtype).view(shape).to(device)

    def __delitem__(self, key: Key) -> None:
        if key in self.kept:
            self.budget.left += self.kept.pop(key).nbytes
        else:
            self.files.pop(key)[0].unlink()

    def __iter__(self) -> Iterator[Key]:
        yield from sorted((*self.kept, *self.files))

    def __len__(self) -> int:
        return len(self.kept) + len(self.files)
