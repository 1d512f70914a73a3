"""All metrics in one walk, against the forward pass that it contains, and against doing it by hand afterwards."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.live.batch import Batch
from shortcut.live.blocks import decode
from shortcut.live.load import Model, load_model, load_tokenizer
from shortcut.live.offload import open_live
from shortcut.material.calibration import make_batches, make_calibration
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from shortcut.scoring.metrics import METRICS, angular_distance, block_influence, l2, relative_magnitude, variance
from tests.bench.rounds import THREADS, compare, emit, take_turns, timed
from tests.reference import scores_of

RUNS, SLOW_RUNS, ABLATION_RUNS = 5, 3, 2
SAMPLES, LENGTH, BATCH = 8, 512, 4


def main() -> None:
    torch.set_num_threads(THREADS)
    folder = open_model(embedded_model()).folder
    calibration = make_calibration(load_tokenizer(folder), Source(), samples=SAMPLES, length=LENGTH)
    model = load_model(folder, Loading(device="cpu", dtype="float32"))
    batches = make_batches(calibration, BATCH, model.device)
    metrics = [metric for metric in METRICS.values() if metric.needs in ("states", "spans")]
    check_agreement(scores_of(model, batches, metrics), score_by_hand(model, batches))  # and warms up

    def walk() -> float:
        return timed(lambda: scores_of(model, batches, metrics))

    what = f"SmolLM2-135M, {SAMPLES} x {LENGTH} tokens, float32, {THREADS} thread, {len(metrics)} metrics"
    plain = take_turns(RUNS, walk, lambda: timed(lambda: forward(model, batches)))
    emit("score", what, rival="forward of the decoder alone", **compare(*plain), bound=1.10)
    by_hand = take_turns(SLOW_RUNS, walk, lambda: timed(lambda: score_by_hand(model, batches)))
    emit("score", what, rival="output_hidden_states, metrics in a loop", **compare(*by_hand))
    compare_ablations(model, [Batch(batches[0].ids[:2, :256], batches[0].mask[:2, :256])])
    compare_offloaded(folder, batches, walk)


def compare_ablations(model: Model, batches: list[Batch]) -> None:
    """Every block taken out, against a forward pass of the whole model for each, and one for the base."""
    passes = len(model.model.layers) + 1

    def forwards() -> float:
        return timed(lambda: [whole_forward(model, batches) for _ in range(passes)])

    count, length = batches[0].ids.shape
    size = f"SmolLM2-135M, {count} x {length} tokens, float32, {THREADS} thread, all blocks"
    for name, bound in (("kl", 0.6), ("perplexity", 0.75)):
        timings = take_turns(
            ABLATION_RUNS, lambda name=name: timed(lambda: scores_of(model, batches, [METRICS[name]])), forwards
        )
        emit("score", f"{name}, {size}", rival=f"{passes} forward passes", **compare(*timings), bound=bound)


def compare_offloaded(folder: Path, batches: list[Batch], walk: Callable[[], float]) -> None:
    """Blocks read from the disk (the page cache, here) when they run, against blocks in memory."""
    checkpoint, metrics = read_checkpoint(folder), [m for m in METRICS.values() if m.needs in ("states", "spans")]
    with open_live(checkpoint, Loading(device="cpu", dtype="float32"), offload=True, quiet=True) as model:
        timings = take_turns(RUNS, lambda: timed(lambda: scores_of(model, batches, metrics)), walk)
    what = f"SmolLM2-135M, {SAMPLES} x {LENGTH} tokens, float32, {THREADS} thread, blocks on the disk"
    emit("score", what, rival="blocks in memory", **compare(*timings), bound=1.5)


@torch.inference_mode()
def whole_forward(model: Model, batches: list[Batch]) -> None:
    for batch in batches:
        model(input_ids=batch.ids, use_cache=False)


@torch.inference_mode()
def forward(model: Model, batches: list[Batch]) -> None:
    for batch in batches:
        decode(model, batch.inputs)


@torch.inference_mode()
def score_by_hand(model: Model, batches: list[Batch]) -> dict[str, Any]:
    """As one would write it without shortcut, span by span; the states after the last block are those of the norm."""
    rows: list[dict[str, Any]] = []
    for batch in batches:
        states = model(input_ids=batch.ids, output_hidden_states=True, use_cache=False).hidden_states
        depth = len(states) - 1
        row: dict[str, Any] = {
            metric.__name__: [metric(states[i], states[i + 1]).mean().item() for i in range(depth)]
            for metric in (block_influence, relative_magnitude, l2, variance)
        }
        spans = [[angles(states[i], states[i + n]) for i in range(depth + 1 - n)] for n in range(1, depth + 1)]
        row["angular"] = [[angle[:, -1].mean().item() for angle in row] for row in spans]
        row["angular_all"] = [[angle.mean().item() for angle in row] for row in spans]
        rows.append(row)
    return {name: average([row[name] for row in rows]) for name in rows[0]}


def angles(before: Tensor, after: Tensor) -> Tensor:
    return angular_distance(torch.nn.functional.cosine_similarity(before, after, dim=-1))


def average(values: list[Any]) -> Any:
    """Mean of numbers, or number by number of lists of them."""
    if isinstance(values[0], list):
        return [average(list(column)) for column in zip(*values, strict=True)]
    return statistics.fmean(values)


def check_agreement(scores: dict[str, Any], by_hand: dict[str, Any]) -> None:
    """Rivals do the same work: all scores agree, but for spans that end at the final norm."""
    for name, values in by_hand.items():
        mine = scores[name.replace("_", "-")]
        rows = zip(mine, values, strict=True) if isinstance(values[0], list) else [(mine, values)]
        for row, other in rows:
            torch.testing.assert_close(torch.tensor(row[:-1]), torch.tensor(other[:-1]), rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
