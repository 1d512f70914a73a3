"""What two checkpoints share, what was written, and where it came from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.surgery import cut as cutting
from tests.conftest import DEPTH


def test_diff_finds_every_block(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks are recognised by their bytes, however the files are split; what is gone, changed or other is named."""
    base = checkpoint_of("llama", sharded=True)
    shortcut.cut(base, tmp_path / "short", drop="1,4", max_shard_size="1GB", quiet=True)
    difference = shortcut.diff(base, tmp_path / "short")
    assert (difference.matches, difference.only_one, difference.differing) == ((0, 2, 3, 5, 6), (1, 4), ())
    file = tmp_path / "short" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    difference = shortcut.diff(base, tmp_path / "short")
    assert (difference.matches, difference.only_one) == ((0, 2, None, 5, 6), (1, 3, 4))
    assert difference.differing == ("model.norm.weight",)
    rows = [line.split() for line in str(difference).splitlines()]
    assert rows[3:8] == [["blocks", "of", "B", "are", "A's"], ["0", "0"], ["1", "2"], ["2", "changed"], ["3-4", "5-6"]]


def test_the_record_keeps_the_lineage(llama: Path, tmp_path: Path) -> None:
    """A checkpoint that was cut twice names both plans, back to the first base."""
    shortcut.cut(llama, tmp_path / "a", drop="1", quiet=True)
    shortcut.cut(tmp_path / "a", tmp_path / "b", drop="0,5", quiet=True)
    record = json.loads((tmp_path / "b" / "shortcut.json").read_text())
    assert [(plan["base"]["model"], plan["drop"]) for plan in [*record["lineage"], record["plan"]]] == [
        (str(llama.resolve()), "1"),
        (str(tmp_path / "a"), "0,5"),
    ]
    assert shortcut.diff(llama, tmp_path / "b").matches == (2, 3, 4, 5)
    report = shortcut.check(tmp_path / "b", samples=2, length=32, quiet=True)
    assert report.base == str(tmp_path / "a")


def test_verify_reads_back_what_was_written(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --verify, a byte that the disk changed is found, and nothing stays at the final name."""
    write_file = cutting.write_file

    def write_badly(path: Path, *arguments: object) -> None:
        write_file(path, *arguments)
        with path.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    monkeypatch.setattr(cutting, "write_file", write_badly)
    with pytest.raises(ShortcutError, match="differs from the base's"):
        shortcut.cut(llama, tmp_path / "short", drop="1", verify=True, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_shrinks_is_an_error(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is truncated between the headers and the copy is one line, and nothing is written."""
    base = shutil.copytree(llama, tmp_path / "base")
    plan_files = cutting.plan_files

    def shrink(*arguments: object) -> object:
        files = plan_files(*arguments)
        weights = base / "model.safetensors"
        with weights.open("r+b") as file:
            file.truncate(weights.stat().st_size // 2)
        return files

    monkeypatch.setattr(cutting, "plan_files", shrink)
    with pytest.raises(ShortcutError, match="bytes early: it changed while it was read"):
        shortcut.cut(base, tmp_path / "short", drop=str(DEPTH - 1), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_no_room_is_said_before_writing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little free space names what is needed and what is free, and nothing is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ShortcutError, match=r"no room for .*short: it needs [0-9]+ KB, and 1 KB are free"):
        shortcut.cut(llama, tmp_path / "short", drop="1", quiet=True)
    assert list(tmp_path.iterdir()) == []
