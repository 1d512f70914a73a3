"""What fails in the middle of a cut leaves nothing that loads, and the base as it was."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.surgery import cut as cut_module
from shortcut.surgery.diff import compare_tensors
from tests.fuzz.__main__ import make_base


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def base(checkpoint_of: Callable[..., Path]) -> Path:
    """A checkpoint of more than a megabyte, in several shards."""
    return checkpoint_of("llama", sharded=True, intermediate_size=1499)


def test_a_disk_that_is_too_small_is_named_before_writing(base: Path, small_disk: Path) -> None:
    """The bytes needed and the bytes free are in the message, and nothing is written."""
    with pytest.raises(ShortcutError, match=r"no room for .*: it needs [\d.]+ MB, and [\d.]+ MB are free"):
        shortcut.cut(base, small_disk / "short", drop="1", quiet=True)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_in_mid_write(base: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else takes the room: one line, no folder, and with room again the same command succeeds."""
    usage = shutil.disk_usage(base)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    with pytest.raises(ShortcutError, match=r"cannot write .*short: No space left on device"):
        shortcut.cut(base, small_disk / "short", drop="1", quiet=True)
    assert list(small_disk.iterdir()) == []
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert shortcut.cut(base, small_disk / "short", drop="1-6", quiet=True).written


def test_a_source_that_shrinks_while_it_is_copied(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard cut short after its header was read is one line and no folder; restored, the same command succeeds."""
    source = shutil.copytree(base, tmp_path / "base")
    shard = sorted(source.glob("*.safetensors"))[-1]
    raw = shard.read_bytes()
    write_file = cut_module.write_file

    def shrink_and_write(*arguments: Any) -> None:
        os.truncate(shard, len(raw) - 7)
        write_file(*arguments)

    monkeypatch.setattr(cut_module, "write_file", shrink_and_write)
    with pytest.raises(ShortcutError, match=r"ended .* bytes early: it changed while it was read"):
        shortcut.cut(source, tmp_path / "short", drop="1", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]

    shard.write_bytes(raw)
    monkeypatch.undo()
    report = shortcut.cut(source, tmp_path / "short", drop="1", quiet=True)
    assert compare_tensors(read_checkpoint(tmp_path / "short"), read_checkpoint(source), report.plan) > 0


def test_what_was_written_is_read_back(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that comes out without one of its tensors would load with random numbers: one line and no folder."""
    write_file = cut_module.write_file
    monkeypatch.setattr(cut_module, "write_file", lambda path, tensors, *rest: write_file(path, tensors[1:], *rest))
    with pytest.raises(ShortcutError, match="does not hold what was written to it: check the disk"):
        shortcut.cut(llama, tmp_path / "short", drop="1", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_the_base_of_the_fuzzer_is_in_order(tmp_path: Path) -> None:
    """What the fuzzer spoils is itself inspected and cut."""
    make_base(tmp_path / "base")
    assert shortcut.inspect(tmp_path / "base").refusal is None
    assert shortcut.cut(tmp_path / "base", tmp_path / "short", drop="1,3", quiet=True).written
