"""Healing by refit: how often the fitting text goes through the decoder, how long that takes, and how much memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.healing import refit
from shortcut.healing.saved_fit import SavedFit
from shortcut.live.blocks import decode, hidden_input
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model, load_tokenizer
from shortcut.material.calibration import make_calibration
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from shortcut.records.plan import Plan
from tests.bench.rounds import THREADS, emit, timed

SAMPLES, LENGTH, BATCH = 8, 512, 4
SPAN = range(12, 19)


def main() -> None:
    torch.set_num_threads(THREADS)
    base = open_model(embedded_model())
    text = make_calibration(load_tokenizer(base.folder), Source(), samples=SAMPLES, length=LENGTH)
    model = load_model(base.folder, Loading(device="cpu", dtype="float32"))
    decoder, plan = Decoder.of(model), Plan.dropping(base.base, SPAN)
    fitting, deciding = (part.batches(BATCH) for part in text.split(SAMPLES // 4))

    def forward() -> None:
        with torch.inference_mode():
            for batch in (*fitting, *deciding):
                decode(model, batch.inputs)

    forward()
    seconds = timed(forward)
    watch = Watch(decoder)
    with watch.counting():
        refit.fit_refits(decoder, plan, fitting, deciding, saved=watch)
        watch.note("as a whole")
    tokens = sum(batch.ids.numel() for batch in (*fitting, *deciding))
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)
    what = f"SmolLM2-135M without {plan.described}, {SAMPLES} x {LENGTH} tokens, float32, {THREADS} thread"
    for name, bound in (("until the gap is refitted", 4), ("as a whole", 12)):
        took, runs = watch.noted[name]
        found = {"passes": round(runs / tokens, 2), "passes_bound": bound, "peak_mb": peak, "seconds": round(took, 1)}
        rival = {"rival": "forward of the decoder", "rival_seconds": round(seconds, 1)}
        emit("refit", f"{what}, {name}", **found, **rival, ratio=round(took / seconds, 2))


class Watch(SavedFit):
    """Notes how many tokens have gone through the decoder, runs of single blocks counted in parts; keeps nothing."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.tokens, self.start = decoder, 0, time.perf_counter()
        self.noted: dict[str, tuple[float, float]] = {}

    def note(self, name: str) -> None:
        """The seconds until now, and the tokens; the first time counts."""
        self.noted.setdefault(name, (time.perf_counter() - self.start, self.tokens / len(self.decoder.blocks)))

    def read(self, block: int) -> None:
        """Nothing."""

    def keep(self, *_: Any) -> None:
        """Called for every block that is refitted, the one in front of the gap first."""
        self.note("until the gap is refitted")

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, and start the clock."""

        def count(block: nn.Module, *given: Any) -> None:
            if "forward" not in vars(block):  # else something stands in for it
                self.tokens += hidden_input(*given)[..., 0].numel()

        handles = [block.register_forward_pre_hook(count, with_kwargs=True) for block in self.decoder.blocks]
        self.start = time.perf_counter()
        yield
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    main()
