"""Several processes that share the work, each on a device of its own:

    torchrun --standalone --nproc-per-node N -m shortcut score MODEL ...

Every process takes each N-th batch; sums are added up, so that all know the same scores. One of them writes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def are_several() -> bool:
    """Whether torchrun started more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_writer() -> bool:
    """Whether this process prints and writes results."""
    return int(os.environ.get("RANK", "0")) == 0 or not are_several()


def own_part() -> tuple[int, int]:
    """Which part of the work is this process's, of how many."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if are_several() else (0, 1)


def share(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the work."""
    first, step = own_part()
    return items[first::step]


def add_up(values: "Tensor") -> "Tensor":
    """The sum of every process's tensor, where it is; all must call this, in the same order."""
    if not are_several():
        return values
    import torch.distributed

    state = _state()
    moved = values.to(state.device)
    torch.distributed.all_reduce(moved)
    return moved.to(values.device)


@contextmanager
def writer_first() -> Iterator[None]:
    """Have the other processes wait until the one that writes is through a `with` block."""
    if are_several():
        with _state().main_process_first():
            yield
    else:
        yield


@cache
def _state() -> Any:
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
