"""Sums that survive a kill: what a long run has added up so far, in the user's cache, under a key of all it depends on.

A run that goes on from them gives, bit for bit, the scores of one that was never interrupted.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from shortcut.common.cache import place_for
from shortcut.records.actions import Action
from shortcut.scoring.metrics import Metric
from shortcut.scoring.walk import UNSCALED


class Partials:
    """Where the sums of one run are kept. key: plain data that names everything they depend on."""

    def __init__(self, key: Mapping[str, Any]) -> None:
        self.key, self.used = key, set[Path]()

    def of(
        self,
        metrics: Sequence[Metric],
        allow: Sequence[Action],
        done: Mapping[int, Action],
        scales: Mapping[int, float] = UNSCALED,
    ) -> "Partial":
        """The sums of one walk of the run: of these metrics and actions, after what has been done to blocks."""
        rules = [(metric.name, metric.tokens, metric.average, _fingerprint(metric.measure)) for metric in metrics]
        path = place_for("partial", [self.key, rules, sorted(allow), sorted(done.items()), sorted(scales.items())])
        self.used.add(path)
        return Partial(path)

    def forget(self) -> None:
        """Remove what was kept: the run is through."""
        for path in self.used:
            path.unlink(missing_ok=True)


def _fingerprint(measure: Callable[..., Any]) -> str:
    """What tells a metric from another one of the same name."""
    code = getattr(measure, "__code__", None)
    return f"{code.co_code.hex()} {code.co_consts} {code.co_names}" if code else repr(measure)


@dataclass(frozen=True)
class Partial:
    """The sums of one walk over the batches, in a file."""

    path: Path

    def restore(self, sums: dict[str, Tensor]) -> int:
        """Put what is there into the sums; gives how many batches are in it. A damaged file has none."""
        try:
            content = torch.load(self.path, weights_only=True)
            found, batches = content["sums"], int(content["batches"])
            if {name: tensor.shape for name, tensor in found.items()} != {name: t.shape for name, t in sums.items()}:
                return 0
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, UnpicklingError):
            return 0
        sums |= found
        return batches

    def save(self, sums: Mapping[str, Tensor], batches: int) -> None:
        """Keep the sums over so many batches, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(f".{os.getpid()}")
        torch.save({"sums": dict(sums), "batches": batches}, fresh)
        fresh.replace(self.path)
