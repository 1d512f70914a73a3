"""Scores of all spans, against short-transformers: the same tokens, type and threads, models loaded before."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.live.load import load_model, load_tokenizer
from shortcut.material.calibration import Calibration, Source, make_batches, make_calibration
from shortcut.options.groups import Loading
from shortcut.records.scores import Triangle
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.metrics import METRICS
from tests.bench.rounds import THREADS, compare, emit, take_turns, timed

RUNS = 3
SAMPLES, LENGTH, BATCH = 8, 512, 4
RIVAL = Path(".short-transformers/bin/python")  # an environment of its own, made by `make bench`
SAME = {
    "block-influence": "bi_score",  # of single blocks here, of all spans there
    "angular": "angular_distance_last_token",  # its default
    "angular-all": "angular_distance_all_tokens",
}


def main() -> None:
    if not RIVAL.exists():
        sys.exit(f"no {RIVAL}: run `make bench`, which installs this rival")
    torch.set_num_threads(THREADS)
    folder = open_model(embedded_model()).folder
    calibration = make_calibration(load_tokenizer(folder), Source(), samples=SAMPLES, length=LENGTH)
    model = load_model(folder, Loading(device="cpu", dtype="float32"))
    batches = make_batches(calibration, BATCH, model.device)

    def score(*names: str) -> Any:
        return score_blocks(model, batches, [METRICS[name] for name in names])

    what = f"SmolLM2-135M, {SAMPLES} x {LENGTH} tokens, float32, {THREADS} thread"
    with rival(folder, calibration) as analyse:
        mine = score(*SAME)  # and warms up
        for name, its_name in SAME.items():
            check_agreement(mine[name], analyse(its_name)[1])
            timings = take_turns(
                RUNS, lambda name=name: timed(lambda: score(name)), lambda its_name=its_name: analyse(its_name)[0]
            )
            emit("spans", f"{name}, {what}", rival=f"short-transformers, {its_name}", **compare(*timings))
        timings = take_turns(
            RUNS, lambda: timed(lambda: score(*SAME)), lambda: sum(analyse(name)[0] for name in SAME.values())
        )
        emit("spans", f"all {len(SAME)} metrics, {what}", rival="short-transformers, one by one", **compare(*timings))


@contextmanager
def rival(folder: Path, calibration: Calibration) -> Iterator[Callable[[str], tuple[float, list[list[float]]]]]:
    """Start the other program: what it gives for the name of one of its metrics is seconds and scores."""
    command = [str(RIVAL), "-m", "tests.bench.short_transformers", str(folder)]
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(content: object) -> None:
            print(json.dumps(content), file=process.stdin, flush=True)

        def analyse(name: str) -> tuple[float, list[list[float]]]:
            ask(name)
            seconds, scores = json.loads(process.stdout.readline())
            return seconds, scores

        ask(calibration.sequences)
        yield analyse
        process.stdin.close()


def check_agreement(mine: tuple[float, ...] | Triangle, its: list[list[float]]) -> None:
    """Rivals do the same work: all scores agree. Its row n - 1 is of spans of n blocks, by their first."""
    rows = mine if isinstance(mine[0], tuple) else (mine,)
    for row, other in zip(rows, its, strict=False):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other[: len(row)]), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
