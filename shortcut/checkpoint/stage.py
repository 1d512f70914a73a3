"""Writing a folder so that it is there whole or not at all."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_size

RECORD = "shortcut.json"  # the record that every folder written here carries
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}


def check_target(out: Path, *, overwrite: bool, base: Path | None = None) -> None:
    """Refuse, before any work, an output folder that cannot be written without losing something.

    Raises ShortcutError where `out` lies inside the base or holds it, is a file, is a folder that is not empty without
    `overwrite`, or with it, one that shortcut did not write.
    """
    if base is not None:
        target, source = out.resolve(), base.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise ShortcutError(f"cannot write to {out}: it is the base {base}, lies inside it or holds it")
    if out.is_dir():
        if any(out.iterdir()) and not overwrite:
            raise ShortcutError(f"{out} is not empty: name another folder, or --overwrite it")
        if any(out.iterdir()) and not (out / RECORD).exists():
            raise ShortcutError(f"{out} was not written by shortcut (no {RECORD} in it): name another folder")
        return
    if occupied := [path for path in (out, *out.parents) if os.path.lexists(path) and not path.is_dir()]:
        raise ShortcutError(f"cannot write to {out}: {occupied[0]} is a file: name a folder")


@contextmanager
def staged(out: Path, *, overwrite: bool = False, base: Path | None = None, size: int = 0) -> Iterator[Path]:
    """Give a folder beside `out` to write into, which becomes `out` when the block ends well, and goes when it fails.

    size: bytes that will be written; there has to be room for them. A leftover of a killed process is removed; one that
    a living process writes to is an error. Raises ShortcutError as `check_target` does, and where the disk fails.
    """
    check_target(out, overwrite=overwrite, base=base)
    out = Path(os.path.realpath(out))
    try:
        with _partial(out) as partial:
            free = shutil.disk_usage(partial).free
            if free < size:
                raise ShortcutError(
                    f"no room for {out}: it needs {format_size(size)}, and {format_size(free)} are free"
                )
            yield partial
            for root, _, names in os.walk(partial):
                for name in [*names, "."]:
                    make_durable(os.path.join(root, name))
            _put_in_place(partial, out)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise ShortcutError(f"cannot write {out}: {error.strerror}") from None


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, locked; removed where the block fails."""
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShortcutError(f"another process is writing {out}: wait for it, or name another folder") from None
        if not partial.exists() or not os.path.samestat(os.fstat(lock), os.stat(partial)):
            raise ShortcutError(f"another process has just written {out}: look at it, or name another folder")
        try:
            _empty(partial)
            yield partial
        except BaseException:
            with suppress(OSError):
                _remove(partial)
            raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove what a folder holds, config.json first: whenever this is interrupted, nothing loads what is left."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "config.json"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(folder: Path) -> None:
    _empty(folder)
    folder.rmdir()


def make_durable(path: Path | str) -> None:
    """Return when a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename, with what stood there before moved aside first, so that no moment shows a mixture."""
    if not out.exists() or not any(out.iterdir()):
        partial.rename(out)  # POSIX: an empty folder may be replaced
    else:
        old = out.with_name(f".{out.name}.replaced")
        if old.exists():
            _remove(old)
        out.rename(old)
        partial.rename(out)
        _remove(old)
    make_durable(out.parent)


def check_file(path: Path) -> None:
    """Raise ShortcutError for a file that could not be written: a folder of that name, or no folder to be in."""
    if path.is_dir():
        raise ShortcutError(f"cannot write {path}: Is a directory")
    if not path.parent.is_dir():
        reason = "Not a directory" if path.parent.exists() else "No such file or directory"
        raise ShortcutError(f"cannot write {path}: {reason}")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    check_file(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ShortcutError(f"cannot write {path}: {error.strerror}") from None
