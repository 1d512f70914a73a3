"""Tokens per second of models that lost the same number of parameters in three ways, and one with last-token blocks.

Each against its base, run by run in turn, beside the ratio of the arithmetic in the blocks that `inspect` counts.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import statistics
from typing import Any

import torch

from shortcut.checking.speed import measure_speed
from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.live.load import load_model
from shortcut.surgery.savings import savings
from shortcut.verbs.cut import cut
from tests.bench.rounds import THREADS, emit, scratch

REPEATS, RUNS, PROMPT = 3, 3, 1024
# 21 million of 134.5 million parameters; the last goes without any.
PLANS: dict[str, dict[str, str]] = {
    "6 blocks dropped": {"drop": "20-25"},
    "8 blocks without MLP": {"attention_only": "18-25"},
    "24 blocks without attention": {"mlp_only": "2-25"},
    "12 last-token blocks": {"last_token": "14-25"},
}


def main() -> None:
    torch.set_num_threads(THREADS)
    base = open_model(embedded_model())
    saved = {saving.action: saving for saving in savings(base, 0)}
    whole = base.base.blocks * (saved["drop"].prefill or 0)
    with scratch() as folder:
        plans = {name: cut(base.folder, folder / name, quiet=True, **how).plan for name, how in PLANS.items()}
        loading: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
        models = [load_model(path, **loading) for path in (base.folder, *(folder / name for name in PLANS))]
        rounds = [measure_speed(models, prompt=PROMPT, runs=RUNS) for _ in range(REPEATS)]
    for place, (name, plan) in enumerate(plans.items(), 1):
        gone = sum(saved[action].prefill or 0 for action in plan.actions if action in saved)
        for phase in ("prefill", "decode"):
            rates = [(getattr(speeds[place], phase), getattr(speeds[0], phase)) for speeds in rounds]
            ratios = sorted(rate / base_rate for rate, base_rate in rates)
            found = {
                "tokens_per_second": round(statistics.median(rate for rate, _ in rates), 1),
                "rival": "the base",
                "rival_tokens_per_second": round(statistics.median(base_rate for _, base_rate in rates), 1),
                "ratio": round(statistics.median(ratios), 3),
                "ratio_range": [round(ratios[0], 3), round(ratios[-1], 3)],
                "runs": REPEATS * RUNS,
            }
            ideal = {"ideal_ratio": round(whole / (whole - gone), 3)} if phase == "prefill" else {}
            emit(
                "speed", f"{phase}, SmolLM2-135M, {name}, {PROMPT} tokens, float32, {THREADS} thread", **found, **ideal
            )


if __name__ == "__main__":
    main()
