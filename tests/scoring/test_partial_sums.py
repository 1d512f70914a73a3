"""A run that was killed goes on where it stopped, with the scores of one that never was."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

import shortcut
from shortcut.scoring import blocks
from shortcut.scoring.metrics import METRICS, Metric
from shortcut.scoring.partial_sums import Partial, Partials
from shortcut.scoring.walk import run_together

pytestmark = pytest.mark.thorough

TEXT: dict[str, Any] = {"samples": 6, "length": 24, "batch_size": 1, "quiet": True}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "shortcut" / "partial"


class Walks:
    """How many walks over a batch there were, and after how many the run is killed."""

    count = 0
    limit = 1000


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Walks:
    """Counts walks, and kills."""
    walks = Walks()

    def count(*arguments: Any) -> None:
        if walks.count == walks.limit:
            raise KeyboardInterrupt
        run_together(*arguments)
        walks.count += 1

    monkeypatch.setattr(blocks, "run_together", count)
    return walks


@pytest.mark.parametrize("killed_after", [1, 4, 8, 14])
def test_a_killed_run_goes_on(killed_after: int, llama: Path, cache: Path, walks: Walks) -> None:
    """Bit for bit the scores of an uninterrupted run; no batch is walked twice; nothing stays in the cache."""
    options = {"metric": "kl,angular,block-influence", "greedy": 2, **TEXT}
    expected = shortcut.score(llama, **options)
    assert walks.count == 6 + 2 * 6
    assert list(cache.iterdir()) == []

    walks.count, walks.limit = 0, killed_after
    with pytest.raises(KeyboardInterrupt):
        shortcut.score(llama, **options)
    walks.limit = 1000
    assert shortcut.score(llama, **options) == expected
    assert walks.count == 6 + 2 * 6
    assert list(cache.iterdir()) == []


def test_a_killed_run_goes_on_where_blocks_are_on_the_disk(
    llama: Path, cache: Path, walks: Walks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several batches go through a block for one reading of it, and such groups are what a run goes on with.

    The rest may be walked in memory: it is the same run.
    """
    monkeypatch.setattr(blocks, "TOKENS_PER_READING", 40)  # two batches
    options = {"metric": "kl,angular,block-influence", **TEXT}
    expected = shortcut.score(llama, **options)
    for offload in (True, False):
        walks.count, walks.limit = 0, 2
        with pytest.raises(KeyboardInterrupt):
            shortcut.score(llama, **options, offload=True)
        assert len(list(cache.iterdir())) == 1
        walks.count, walks.limit = 0, 1000
        assert shortcut.score(llama, **options, offload=offload) == expected
        assert walks.count == (1 if offload else 2)
        assert list(cache.iterdir()) == []


@pytest.mark.parametrize(("metric", "killed_after"), [("taylor", 3), ("taylor", 6), ("linear-replacement", 9)])
def test_what_takes_long_goes_on(
    metric: str, killed_after: int, llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and fits go on at the block where the run was killed, bit for bit; none is had twice."""
    place = {"taylor": "gradients._backward", "linear-replacement": "pairs._together"}[metric]
    module, name = import_module(f"shortcut.scoring.{place.partition('.')[0]}"), place.partition(".")[2]
    real, calls = getattr(module, name), []
    limit = 10_000

    def counting(*arguments: Any) -> Any:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(0)
        return real(*arguments)

    monkeypatch.setattr(module, name, counting)
    options = {"metric": f"{metric},l2", **TEXT, "batch_size": 6, "length": 40}
    expected = shortcut.score(llama, **options)
    whole = len(calls)
    calls.clear()
    limit = killed_after
    with pytest.raises(KeyboardInterrupt):
        shortcut.score(llama, **options)
    assert len(list(cache.iterdir())) == 2
    limit = 10_000
    assert shortcut.score(llama, **options) == expected
    assert whole <= len(calls) < whole + 8
    assert list(cache.iterdir()) == []


def test_partial_sums_are_for_the_same_run_only(llama: Path, cache: Path, walks: Walks) -> None:
    """Another text, metric, size of batches or type starts from nothing."""
    walks.limit = 3
    with pytest.raises(KeyboardInterrupt):
        shortcut.score(llama, metric="l2", **TEXT)
    walks.limit = 1000
    assert len(list(cache.iterdir())) == 1
    for other in ({"seed": 1}, {"batch_size": 2}, {"dtype": "bfloat16"}, {"metric": "l2,variance"}):
        walks.count = 0
        options = {"metric": "l2", **TEXT, **other}
        shortcut.score(llama, **options)
        assert walks.count == 6 // options["batch_size"]
    assert len(list(cache.iterdir())) == 1  # of the run that was killed


@pytest.mark.parametrize("change", ["weights", "config", "version"])
def test_partial_sums_are_for_the_same_model_only(
    change: str, llama: Path, tmp_path: Path, cache: Path, walks: Walks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights of the same size in the same place, another config, another version: no old sum is gone on from."""
    base, other = shutil.copytree(llama, tmp_path / "base"), shutil.copytree(llama, tmp_path / "other")
    walks.limit = 3
    with pytest.raises(KeyboardInterrupt):
        shortcut.score(base, metric="l2", **TEXT)
    walks.count, walks.limit = 0, 1000
    for folder in (other, base):
        if change == "weights":
            tensors = load_file(llama / "model.safetensors")
            save_file(
                {name: 2 * tensor for name, tensor in tensors.items()},
                folder / "model.safetensors",
                metadata={"format": "pt"},
            )
        elif change == "config":
            config = json.loads((llama / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    if change == "version":
        monkeypatch.setattr("shortcut.checkpoint.open.__version__", "0")
    assert len(list(cache.iterdir())) == 1
    assert shortcut.score(base, metric="l2", **TEXT).metrics == shortcut.score(other, metric="l2", **TEXT).metrics
    assert walks.count == 6 + 6


def test_what_names_a_run() -> None:
    """Key, metrics with their functions and means, actions, and what has been done decide; the order does not."""
    partials, drop, done = Partials({"a": 1}), ("drop",), {1: "drop", 2: "mlp-only"}
    one = partials.of([METRICS["l2"]], drop, done)
    assert partials.of([METRICS["l2"]], drop, dict(reversed(done.items()))) == one
    own = Metric("l2", lambda x, y: y - x + 7, "states", "all", "", "")
    others = [
        Partials({"a": 2}).of([METRICS["l2"]], drop, done),
        partials.of([METRICS["kl"]], drop, done),
        partials.of([own], drop, done),
        partials.of([replace(METRICS["l2"], average="sequences")], drop, done),
        partials.of([METRICS["l2"]], ("drop", "mlp-only"), done),
        partials.of([METRICS["l2"]], drop, {1: "drop", 2: "drop"}),
        partials.of([METRICS["l2"]], drop, done, {2: 1.5}),
    ]
    assert one not in others
    assert len({other.path for other in others}) == len(others)


def test_damaged_sums_count_as_none(tmp_path: Path) -> None:
    """A file that is half there, of other metrics or of other sizes is computed again."""
    partial, sums = Partial(tmp_path / "p.pt"), {"l2": torch.ones(3)}
    assert partial.restore(sums) == 0
    partial.save({"l2": torch.full((3,), 5.0)}, 2)
    assert partial.restore({"l2": torch.ones(4)}) == 0
    assert partial.restore({"kl": torch.ones(3)}) == 0
    assert partial.restore(sums) == 2
    assert sums["l2"].tolist() == [5.0] * 3
    partial.path.write_bytes(partial.path.read_bytes()[:100])
    assert partial.restore(sums) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["p.pt"]
