"""Tokens per second of a model that lost a fifth of its blocks, against its base and against what depth alone gives."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import statistics

import torch

from shortcut.checking.speed import measure_speed
from shortcut.commands import cut
from shortcut.live import load_model
from shortcut.sources import embedded_model, open_model
from tests.bench.rounds import THREADS, emit, scratch

REPEATS, RUNS = 3, 5
DROP = "20-25"


def main() -> None:
    torch.set_num_threads(THREADS)
    base = open_model(embedded_model())
    with scratch() as folder:
        plan = cut(base.folder, folder / "short", drop=DROP, quiet=True).plan
        models = [load_model(path, device="cpu", dtype="float32") for path in (folder / "short", base.folder)]
        pairs = [measure_speed(models, runs=RUNS) for _ in range(REPEATS)]
    what = f"SmolLM2-135M, {len(plan.dropped)} of {base.base.blocks} blocks cut, float32, {THREADS} thread"
    for phase in ("prefill", "decode"):
        rates = [(getattr(short, phase), getattr(whole, phase)) for short, whole in pairs]
        ratios = sorted(rate / base_rate for rate, base_rate in rates)
        found = {
            "tokens_per_second": round(statistics.median(rate for rate, _ in rates), 1),
            "rival": "the base",
            "rival_tokens_per_second": round(statistics.median(base_rate for _, base_rate in rates), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
            "ideal_ratio": round(base.base.blocks / len(plan.kept), 3),
            "runs": REPEATS * RUNS,
        }
        emit("speed", f"{phase}, {what}", **found)


if __name__ == "__main__":
    main()
