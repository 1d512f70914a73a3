"""Progress and messages, on stderr: results alone go to stdout."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from shortcut.processes import is_writer

T = TypeVar("T")


def say(message: str, *, quiet: bool) -> None:
    """One line about what is going on."""
    if not quiet and is_writer():
        print(message, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, *, total: int | None = None, quiet: bool) -> Iterable[T]:
    """Go through items with a progress bar; none where stderr is not a terminal."""
    return tqdm(items, label, total=total, leave=False, disable=True if quiet or not is_writer() else None)


@contextmanager
def byte_bar(total: int, label: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes; gives the function that advances it."""
    with tqdm(
        total=total,
        desc=label,
        unit="B",
        unit_scale=True,
        leave=False,
        disable=True if quiet or not is_writer() else None,
    ) as bar:
        yield bar.update
