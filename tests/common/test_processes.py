"""Two processes give the scores of one, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import shortcut
from shortcut.cli import main
from shortcut.common.processes import add_up, are_several, is_writer, share
from shortcut.scoring.metrics import METRICS

TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "shortcut"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--offload"]], ids=["in memory", "on disk"])
def test_two_processes_give_the_scores_of_one(options: list[str], llama: Path, tmp_path: Path) -> None:
    """Every metric and the order of greedy, from five sequences in batches of two: three batches for two processes."""
    text = {"samples": 5, "length": 24, "batch_size": 2}
    expected = shortcut.score(llama, metric=",".join(["kl", *METRICS]), greedy=2, quiet=True, **text)
    argv = ["score", str(llama), "--metric", ",".join(["kl", *METRICS]), "--greedy", "2", "--samples", "5"]
    argv += ["--length", "24", "--batch-size", "2", "--out", str(tmp_path / "s.json"), "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*TWO, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)  # one document: one process printed
    assert printed == json.loads((tmp_path / "s.json").read_text())
    assert printed["orders"] == {"kl": [str(move) for move in expected.orders["kl"]]}
    for name, values in expected.to_dict()["metrics"].items():
        flat = [values] if not isinstance(values[0], tuple) else values
        mine = [printed["metrics"][name]] if len(flat) == 1 else printed["metrics"][name]
        for row, other in zip(flat, mine, strict=True):
            assert list(other) == pytest.approx(list(row), rel=1e-6, abs=1e-9)


def test_the_work_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every item goes to exactly one process; alone, a process has all of them, and nothing to add up."""
    assert (are_several(), is_writer(), share([1, 2, 3])) == (False, True, [1, 2, 3])
    assert add_up("as it is") == "as it is"
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        assert is_writer() == (rank == 0)
        parts.append(share(list(range(8))))
    assert sorted(item for part in parts for item in part) == list(range(8))


def test_other_commands_run_in_one_process(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What writes checkpoints refuses to run several times at once."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["cut", str(llama), "out", "--drop", "1"]) == 2
    assert "cut runs in one process; torchrun is for score and heal" in capsys.readouterr().err
