"""Staging: a folder is there whole or not at all, and nothing that someone else made is lost."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from shortcut.checkpoint.stage import RECORD, check_target, staged, write_text
from shortcut.common.errors import ShortcutError


def tree(folder):
    """Every path below a folder, with the text of files."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write(out, text="new", error=None, **options):
    """Write a folder with a record and a file in a folder of its own, or fail after that."""
    with staged(out, **options) as folder:
        (folder / RECORD).write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)
        if error is not None:
            raise error


NEW = {RECORD: "new", "inner/file": "new"}


def test_what_is_written_appears_as_a_whole(tmp_path):
    """The folder appears with all its files when the block ends, in place of nothing or of an empty folder."""
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "a" / "b" / "out", tmp_path / "empty"):
        write(out)
        assert tree(out) == NEW
    assert [path.name for path in tmp_path.rglob(".*")] == []


@pytest.mark.parametrize("error", [ValueError, ShortcutError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_nothing(tmp_path, error, before):
    """When the block fails, in whatever way, what was there before is untouched and nothing else is there."""
    if before:
        write(tmp_path / "out", before)
    found = tree(tmp_path)
    with pytest.raises(error):
        write(tmp_path / "out", "new", error, overwrite=True)
    assert tree(tmp_path) == found
    assert os.listdir(tmp_path) == (["out"] if before else [])


def test_a_full_disk(tmp_path):
    """A disk that is full is one line, and leaves nothing."""
    with pytest.raises(ShortcutError, match=r"cannot write .*out: No space left on device"):
        write(tmp_path / "out", "new", OSError(errno.ENOSPC, "No space left on device"))
    assert os.listdir(tmp_path) == []


def test_a_leftover_is_replaced(tmp_path):
    """What a killed process left half-written is not mixed into the result, and links in it are not followed."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    leftover = tmp_path / ".out.partial"
    (leftover / "inner").mkdir(parents=True)
    (leftover / "inner" / "stale").write_text("stale")
    (leftover / "stale").write_text("stale")
    (leftover / "link").symlink_to(tmp_path / "precious")
    write(tmp_path / "out")
    assert tree(tmp_path) == {"precious/file": "mine", **{f"out/{name}": text for name, text in NEW.items()}}


def test_two_writers_at_once(tmp_path):
    """A second writer of the same folder is refused, and does not disturb the first."""
    with staged(tmp_path / "out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ShortcutError, match="another process is writing .*out: wait for it"):
            write(tmp_path / "out")
    assert tree(tmp_path) == {"out/file": "first"}


def test_a_lock_of_another_process(tmp_path):
    """A folder that a living process has locked is left to it; once it lets go, the folder can be written."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "file").write_text("theirs")
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ShortcutError, match="another process is writing"):
        write(tmp_path / "out")
    assert tree(tmp_path) == {".out.partial/file": "theirs"}
    os.close(lock)
    write(tmp_path / "out")
    assert tree(tmp_path / "out") == NEW


def test_a_lock_on_what_is_already_in_place(tmp_path, monkeypatch):
    """A writer that waited at the door while another one finished is told so, and the finished folder is untouched."""
    flock = fcntl.flock

    def finish_first(handle, how):
        (tmp_path / ".out.partial" / "file").write_text("first")
        (tmp_path / ".out.partial").rename(tmp_path / "out")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(ShortcutError, match=r"out"):
        write(tmp_path / "out")
    assert tree(tmp_path) == {"out/file": "first"}


def test_overwriting_replaces_all(tmp_path):
    """With overwrite, files of the earlier run are gone and those of the new one are there."""
    with staged(tmp_path / "out") as folder:
        (folder / RECORD).write_text("old")
        (folder / "stale").write_text("old")
    write(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == NEW
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_folders_of_others_stay(tmp_path, overwrite):
    """A folder with files that shortcut did not write is never replaced; one that it wrote only with overwrite."""
    write(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("mine")
    found = tree(tmp_path)
    message = "was not written by shortcut .no shortcut.json in it." if overwrite else "is not empty: name another"
    with pytest.raises(ShortcutError, match=message):
        write(tmp_path / "theirs", overwrite=overwrite)
    with pytest.raises(ShortcutError, match="is not empty: name another folder, or --overwrite it"):
        write(tmp_path / "ours")
    assert tree(tmp_path) == found


@pytest.mark.parametrize("out", ["file", "file/out", "file/a/out", "dangling", "to-file"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_places_that_are_no_folder(tmp_path, out, overwrite):
    """A file, or what lies below one, or a link to nowhere is refused before any work."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    with pytest.raises(ShortcutError, match="name a folder"):
        check_target(tmp_path / out, overwrite=overwrite)
    assert tree(tmp_path) == {"file": "mine", "to-file": "mine"}


@pytest.mark.parametrize("before", [{}, {RECORD: "old"}], ids=["empty", "full"])
def test_a_link_to_a_folder(tmp_path, before):
    """Written to through a link, the folder behind it is filled or replaced, and the link stays."""
    (tmp_path / "real").mkdir()
    for name, text in before.items():
        (tmp_path / "real" / name).write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", overwrite=True)
    assert (tree(tmp_path / "real"), (tmp_path / "link").is_symlink()) == (NEW, True)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


@pytest.mark.parametrize("out", ["base", "base/out", "base/a/out", ".", "base/../base", "link", "link/out", "up/base"])
@pytest.mark.parametrize("base", ["base", "link"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_the_base_is_safe(tmp_path, out, base, overwrite):
    """Out and base may not be the same folder nor lie in each other, whatever links lead there."""
    write(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    (tmp_path / "up").symlink_to(tmp_path)
    found = tree(tmp_path)
    with pytest.raises(ShortcutError, match="it is the base .*, lies inside it or holds it"):
        write(tmp_path / out, overwrite=overwrite, base=tmp_path / base)
    assert tree(tmp_path) == found


def test_a_neighbour_of_the_base_is_fine(tmp_path):
    """A folder beside the base may be written, even if its name starts with the base's."""
    write(tmp_path / "base")
    write(tmp_path / "base-short", base=tmp_path / "base")
    assert tree(tmp_path / "base-short") == NEW


def test_a_text_file_is_written_whole(tmp_path):
    """A text file replaces what was there and leaves nothing beside it."""
    write_text(tmp_path / "a.yaml", "one\n")
    write_text(tmp_path / "a.yaml", "zwölf\n")
    assert tree(tmp_path) == {"a.yaml": "zwölf\n"}


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder", "Is a directory"), ("gone/a.yaml", "No such file"), ("folder/f/a", "Not a directory")],
)
def test_text_files_that_cannot_be_written(tmp_path, name, message):
    """Where a text file cannot be written, that is one line, and no part of it stays."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f").write_text("mine")
    with pytest.raises(ShortcutError, match=f"cannot write .*{name}: {message}"):
        write_text(tmp_path / name, "text")
    assert tree(tmp_path) == {"folder/f": "mine"}


def test_leftovers_are_removed_config_first(tmp_path, monkeypatch):
    """Whenever the removal is interrupted, what is left has no config.json, so that nothing loads it."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for name in ("a.safetensors", "config.json", "z.txt"):
        (partial / name).write_text("x")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, *args: (removed.append(path.name), unlink(path, *args)))
    with staged(tmp_path / "out") as folder:
        (folder / "new").write_text("y")
    assert removed[0] == "config.json"
    assert sorted(removed) == ["a.safetensors", "config.json", "z.txt"]
