"""Progress and messages, on stderr: results alone go to stdout."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from shortcut.common.processes import is_writer

T = TypeVar("T")


def say(message: str, *, quiet: bool) -> None:
    """One line about what is going on."""
    if not quiet and is_writer():
        print(message, file=sys.stderr, flush=True)


def track(items: Iterable[T], label: str, *, total: int | None = None, quiet: bool) -> Iterable[T]:
    """Go through items with a progress bar; none where stderr is not a terminal."""
    return tqdm(items, label, total=total, leave=False, disable=_silent(quiet=quiet))


@contextmanager
def byte_bar(total: int, label: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes; gives the function that advances it."""
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "leave": False, "disable": _silent(quiet=quiet)}
    with tqdm(total=total, desc=label, **options) as bar:
        yield bar.update


def _silent(*, quiet: bool) -> bool | None:
    """For tqdm: yes, or where stderr is no terminal."""
    return True if quiet or not is_writer() else None


@contextmanager
def gauge(label: str, *, quiet: bool) -> Iterator[Callable[[float, str], None]]:
    """A bar with the time left, for work of which only the done part is known; gives the function that shows it.

    That takes the done part, from 0 to 1, and a word on how it goes.
    """
    form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=label, leave=False, bar_format=form, disable=_silent(quiet=quiet)) as bar:

        def show(done: float, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield show
