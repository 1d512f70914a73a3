"""How long prompts and new tokens take, of several models in turn: the machine's drift then falls on all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
from transformers import Cache

from shortcut.common.errors import ShortcutError
from shortcut.common.progress import track
from shortcut.live.load import Model
from shortcut.modeling.passing import cache_argument

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """What is run: prompts of random tokens, so many at once, and new tokens behind each, the likeliest ones."""

    prompt: int = 256
    new_tokens: int = 24
    batch_size: int = 1
    seed: int = 0

    def ids(self, models: Sequence[Model]) -> torch.Tensor:
        """Tokens that all these models know, (batch, tokens)."""
        vocabulary = min(model.config.get_text_config(decoder=True).vocab_size for model in models)
        how = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocabulary, (self.batch_size, self.prompt), generator=how)

    @property
    def cached(self) -> int:
        """Tokens in the cache when a run ends: the last one is not read any more."""
        return self.batch_size * (self.prompt + self.new_tokens - 1)


@dataclass(frozen=True)
class Run:
    """What one run took, in seconds: the prompt, the prompt and the first new token, and all new tokens behind it.

    cache: bytes of keys and values in the end. On a GPU alone, else None: memory, what torch's allocator held at most
    for this model alone, in bytes, and use, the share of time in which the GPU was busy, as its driver says.
    """

    prefill: float
    first: float
    decode: float
    cache: int
    memory: int | None = None
    use: float | None = None


@dataclass(frozen=True)
class Speed:
    """Medians over the runs. prefill: prompt tokens per second; decode: new tokens per second, with a cache."""

    prefill: float
    decode: float


def measure_speed(
    models: Sequence[Model], *, prompt: int = 256, new_tokens: int = 24, runs: int = 5, seed: int = 0
) -> list[Speed]:
    """Time the models interleaved, run by run, after one run each that does not count, on random tokens, batch 1."""
    times = time_runs(models, Work(prompt, new_tokens, seed=seed), runs=runs, warm_up=1)
    return [
        Speed(
            prefill=prompt / statistics.median(run.prefill for run in own),
            decode=(new_tokens - 1) / statistics.median(run.decode for run in own),
        )
        for own in times
    ]


@torch.inference_mode()
def time_runs(models: Sequence[Model], work: Work, *, runs: int, warm_up: int, quiet: bool = True) -> list[list[Run]]:
    """The runs of every model that count, made interleaved; warm_up: how many come first that do not count."""
    ids = work.ids(models)
    found: list[list[Run]] = [[] for _ in models]
    for _ in track(range(warm_up + runs), "runs", quiet=quiet):
        for own, model in zip(found, models, strict=True):
            own.append(_time_run(model, ids.to(model.device), work.new_tokens))
    return [own[warm_up:] for own in found]


def run_once(model: Model, ids: torch.Tensor, new_tokens: int, note: Callable[[], T]) -> tuple[list[T], Any]:
    """Run prompts, choose a token behind each, and then the others, one by one.

    Returns what `note` gives before these three steps and after each, and the cache in the end. Raises ShortcutError
    for a model without one.
    """
    notes = [note()]
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    output = model(input_ids=ids, use_cache=True, **last)
    notes.append(note())
    if cache_in(output) is None:
        raise ShortcutError(f"{model.config.model_type} keeps no cache of keys and values: its speed is not measured")
    place = cache_argument(model.forward)
    token = output.logits[:, -1:].argmax(-1)
    notes.append(note())
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, use_cache=True, **{place: cache_in(output)})
        token = output.logits[:, -1:].argmax(-1)
    notes.append(note())
    return notes, cache_in(output)


def cache_in(output: Any) -> Any:
    """The cache among what a model returned; None where there is none."""
    return next((value for value in vars(output).values() if isinstance(value, Cache)), None)


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values in a cache of transformers; states that do not grow with the text do not count."""
    stored = [(name, value) for layer in cache.layers for name, value in vars(layer).items()]
    return sum(
        value.nbytes for name, value in stored if name.endswith(("keys", "values")) and isinstance(value, torch.Tensor)
    )


def _time_run(model: Model, ids: torch.Tensor, new_tokens: int) -> Run:
    device, on_gpu = model.device, model.device.type == "cuda"

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        others = torch.cuda.memory_allocated(device) - model.get_memory_footprint()
    (start, read, first, end), cache = run_once(model, ids, new_tokens, clock)
    return Run(
        prefill=read - start,
        first=first - start,
        decode=end - first,
        cache=cache_bytes(cache),
        memory=torch.cuda.max_memory_allocated(device) - others if on_gpu else None,
        use=_use(device) if on_gpu else None,
    )


def _use(device: torch.device) -> float | None:
    """The share of the last moments, up to a second, in which a GPU was busy; None where its driver does not say."""
    try:
        from pynvml import NVMLError
    except ImportError:
        return None
    with suppress(RuntimeError, NVMLError):
        return torch.cuda.utilization(device) / 100
    return None
