"""Timing rivals in turn, and printing what came out. Imports nothing heavy: see `cut.py`."""

import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of torch: several wait for each other after every operation, which a busy machine slows out of proportion.
THREADS = 1


def take_turns(runs: int, *works: Callable[[], float]) -> list[list[float]]:
    """The seconds that each work gives, (works, runs): once per round, in an order that turns from round to round."""
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(runs):
        for turn in range(len(works)):
            which = (number + turn) % len(works)
            seconds[which].append(works[which]())
        say(f"round {number + 1} of {runs}: " + " ".join(f"{timings[-1]:.2f}" for timings in seconds) + " seconds")
    return seconds


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that goes even when the process is told to terminate."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="shortcut-bench-") as name:
        yield Path(name)


def compare(seconds: Sequence[float], rival_seconds: Sequence[float]) -> dict[str, Any]:
    """Medians, and the median of the rounds' ratios with the lowest and highest of them."""
    ratios = [one / other for one, other in zip(seconds, rival_seconds, strict=True)]
    return {
        "seconds": round(statistics.median(seconds), 3),
        "rival_seconds": round(statistics.median(rival_seconds), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "runs": len(ratios),
    }


def emit(bench: str, what: str, **found: Any) -> None:
    """Print one measurement as a JSON line."""
    print(json.dumps({"bench": bench, "what": what, **found, "machine": _machine()}, ensure_ascii=False), flush=True)


def say(message: str) -> None:
    """Progress, on stderr."""
    print(message, file=sys.stderr, flush=True)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    name = names[0].partition(": ")[2] if names else platform.machine()
    return f"{os.cpu_count()} cores, {name}, {memory} GiB, {platform.system()}, Python {platform.python_version()}"
