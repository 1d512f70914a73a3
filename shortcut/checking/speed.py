"""Tokens per second, for prefill and decode, of several models in turn: the machine's drift then falls on all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shortcut.live import Model


@dataclass(frozen=True)
class Speed:
    """Medians over the runs. prefill: prompt tokens per second; decode: new tokens per second, with a cache."""

    prefill: float
    decode: float


@torch.inference_mode()
def measure_speed(
    models: Sequence[Model], *, prompt: int = 256, new_tokens: int = 24, runs: int = 5, seed: int = 0
) -> list[Speed]:
    """Time the models interleaved, run by run, after one run each that does not count, on random tokens, batch 1."""
    vocabulary = min(model.config.get_text_config(decoder=True).vocab_size for model in models)
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(seed))
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(runs + 1):
        for timings, model in zip(times, models, strict=True):
            timings.append(_one_run(model, ids.to(model.device), new_tokens))
    return [
        Speed(
            prefill=prompt / statistics.median(prefill for prefill, _ in timings[1:]),
            decode=new_tokens / statistics.median(decode for _, decode in timings[1:]),
        )
        for timings in times
    ]


def _one_run(model: Model, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for this many greedy tokens after it."""
    output, prefill = _timed(model, lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))

    def decode() -> None:
        nonlocal output
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    return prefill, _timed(model, decode)[1]


def _timed(model: Model, work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return result, time.perf_counter() - start
