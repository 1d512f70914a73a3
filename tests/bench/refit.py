"""Healing by refit: how often the fitting text goes through the decoder, how long that takes, and how much memory."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.healing import refit
from shortcut.live.blocks import decode, hidden_input
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model, load_tokenizer
from shortcut.material.calibration import make_calibration
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from shortcut.records.plan import Plan
from tests.bench.rounds import THREADS, compare, emit, take_turns, timed

SAMPLES, LENGTH, BATCH = 8, 512, 4
SPAN = range(12, 19)


def main() -> None:
    torch.set_num_threads(THREADS)
    base = open_model(embedded_model())
    text = make_calibration(load_tokenizer(base.folder), Source(), samples=SAMPLES, length=LENGTH)
    model = load_model(base.folder, Loading(device="cpu", dtype="float32"))
    decoder, plan = Decoder.of(model), Plan.dropping(base.base, SPAN)
    fitting, deciding = (part.batches(BATCH) for part in text.split(SAMPLES // 4))

    def heal() -> None:
        refit.fit_refits(decoder, plan, fitting, deciding)

    def forward() -> None:
        with torch.inference_mode():
            for batch in (*fitting, *deciding):
                decode(model, batch.inputs)

    what = f"SmolLM2-135M without {plan.described}, {SAMPLES} x {LENGTH} tokens, float32, {THREADS} thread"
    for name, patience, bound in (("in front of the gap alone", 0, 4), ("as a whole", refit.PATIENCE, 12)):
        with mock.patch.object(refit, "PATIENCE", patience):
            passes = count_passes(decoder, heal) / sum(batch.ids.numel() for batch in (*fitting, *deciding))
            timings = take_turns(1, lambda: timed(heal), lambda: timed(forward))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        found = {"passes": round(passes, 2), "passes_bound": bound, "peak_mb": round(peak), **compare(*timings)}
        emit("refit", f"{what}, {name}", rival="forward of the decoder", **found)


def count_passes(decoder: Decoder, work: Callable[[], None]) -> float:
    """How many tokens go through the decoder, blocks that run and pieces of text counted in parts."""
    with counted(decoder) as tokens:
        work()
    return sum(tokens) / len(decoder.blocks)


@contextmanager
def counted(decoder: Decoder) -> Iterator[list[int]]:
    """The tokens of every run of a block."""
    tokens: list[int] = []
    handles = [
        block.register_forward_pre_hook(
            lambda _, *given: tokens.append(hidden_input(*given)[..., 0].numel()), with_kwargs=True
        )
        for block in decoder.blocks
    ]
    yield tokens
    for handle in handles:
        handle.remove()


if __name__ == "__main__":
    main()
