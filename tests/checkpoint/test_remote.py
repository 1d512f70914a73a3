"""Of a model on the Hub, only the bytes that stay are fetched, each once, whatever happens in between."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.remote import merge, subtract
from tests.hub_server import SHA, Hub, serve

pytestmark = pytest.mark.thorough

RANGES = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda pair: (min(pair), max(pair))), max_size=8
)


def run(hub: Hub, home: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """A command line in a process of its own, whose Hub is the server."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "shortcut", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def same_weights(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weight files."""
    files = [{path.name: path.read_bytes() for path in folder.glob("*.safetensors*")} for folder in (one, other)]
    return files[0] == files[1]


@given(RANGES, RANGES)
def test_range_arithmetic_is_that_of_sets(wanted: list[tuple[int, int]], there: list[tuple[int, int]]) -> None:
    """merge and subtract agree with sets of byte numbers, and give disjoint ranges in order."""

    def numbers(ranges: list[tuple[int, int]]) -> set[int]:
        return {number for start, stop in ranges for number in range(start, stop)}

    left = subtract(merge(wanted), merge(there))
    assert numbers(left) == numbers(wanted) - numbers(there)
    assert sum(stop - start for start, stop in left) == len(numbers(left))
    assert left == sorted(left)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_remote_cut_fetches_what_stays(sharded: bool, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """The result is that of a local cut; the bytes sent are those of the kept tensors and the headers."""
    base = checkpoint_of("llama", sharded=sharded, intermediate_size=499)
    expected = shortcut.cut(base, tmp_path / "local", drop="1-3", quiet=True)
    headers = sum(file.tensors[0].start for file in read_checkpoint(base).files)
    with serve("org/tiny", base) as hub:
        dry = run(hub, tmp_path / "home", "cut", "org/tiny", str(tmp_path / "remote"), "--drop", "1-3", "--dry-run")
        assert "from the Hub: " in dry.stdout
        assert hub.weight_bytes() == headers
        done = run(hub, tmp_path / "home", "cut", "org/tiny", str(tmp_path / "remote"), "--drop", "1-3")
        assert (done.returncode, done.stderr) == (0, "")
        assert hub.weight_bytes() == headers + expected.bytes_after
        assert run(hub, tmp_path / "home", "inspect", "org/tiny").returncode == 0
        assert hub.weight_bytes() == headers + expected.bytes_after
    assert same_weights(tmp_path / "local", tmp_path / "remote")
    assert f'"revision": "{SHA}"' in (tmp_path / "remote" / "shortcut.json").read_text()


def test_an_interrupted_fetch_goes_on(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """A connection that breaks is one line and leaves no OUT; the next run fetches only what had not come in."""
    base = checkpoint_of("llama", sharded=True, intermediate_size=499)
    expected = shortcut.cut(base, tmp_path / "local", drop="1-3", quiet=True)
    headers = sum(file.tensors[0].start for file in read_checkpoint(base).files)
    argv = ("cut", "org/tiny", str(tmp_path / "remote"), "--drop", "1-3", "--quiet")
    with serve("org/tiny", base) as hub:
        hub.fail_after = expected.bytes_after // 2
        broken = run(hub, tmp_path / "home", *argv)
        assert broken.returncode == 1
        assert "run the same command again to go on" in broken.stderr
        assert broken.stderr.count("\n") == 1
        assert {path.name for path in tmp_path.iterdir()} == {"local", "home"}
        first = hub.weight_bytes()
        hub.fail_after = None
        assert run(hub, tmp_path / "home", *argv).returncode == 0
        assert 0 < first < hub.weight_bytes() == headers + expected.bytes_after  # nothing came twice
    assert same_weights(tmp_path / "local", tmp_path / "remote")


def test_a_model_the_hub_lacks_is_one_line(llama: Path, tmp_path: Path) -> None:
    """An unknown model is an error that says so, with exit code 1."""
    with serve("org/tiny", llama) as hub:
        failed = run(hub, tmp_path / "home", "cut", "org/other", str(tmp_path / "out"), "--drop", "1")
    assert failed.returncode == 1
    assert failed.stderr.startswith("shortcut: cannot get org/other from the Hub: the Hub has no such model")
    assert failed.stderr.count("\n") == 1
