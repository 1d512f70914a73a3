"""Scores: how important every block (or span of blocks) of a model is under one or more metrics.

Higher is always more important. A metric holds either one number per block, or a triangle: row n - 1 has the score of
every span of n blocks, by its first block, so row 0 speaks of single blocks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shortcut.errors import ShortcutError
from shortcut.records.plan import FORMAT, Base, check_format, read_base
from shortcut.text import format_table

Triangle = tuple[tuple[float, ...], ...]
Average = Literal["tokens", "sequences"]  # what counts the same in a mean over text


@dataclass(frozen=True)
class Scores:
    """Scores of one model on one calibration set, with what a plan needs to know of the model.

    parameters: of the whole model; block_parameters: of each block. calibration and settings are plain data. orders: by
    metric, the blocks in the order in which they went, one by one, what was left being scored again each time.
    """

    base: Base
    parameters: int
    block_parameters: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...] | Triangle]
    calibration: Mapping[str, Any]
    settings: Mapping[str, Any]
    orders: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def of_blocks(self, metric: str) -> tuple[float, ...]:
        """One score per block: (blocks,)."""
        values = self._of(metric)
        return values[0] if isinstance(values[0], tuple) else values

    def of_spans(self, metric: str, length: int) -> tuple[float, ...]:
        """The score of every span of this many blocks, by its first block: (blocks - length + 1,).

        A metric that was measured for single blocks only counts for a span by its sum over the span.
        """
        values = self._of(metric)
        if isinstance(values[0], tuple):
            return values[length - 1]
        single = self.of_blocks(metric)
        return tuple(math.fsum(single[i : i + length]) for i in range(len(single) - length + 1))

    def _of(self, metric: str) -> tuple[float, ...] | Triangle:
        if metric not in self.metrics:
            raise ShortcutError(f"no scores of metric {metric!r}: there are {', '.join(self.metrics)}")
        return self.metrics[metric]

    def __str__(self) -> str:
        columns = [self.of_blocks(name) for name in self.metrics]
        rows = [[block, *(f"{column[block]:.4f}" for column in columns)] for block in range(self.base.blocks)]
        table = format_table(["block", *self.metrics], rows, left=0)
        orders = [f"one by one, by {metric}: {', '.join(map(str, blocks))}" for metric, blocks in self.orders.items()]
        stable = self.settings.get("stability")
        if isinstance(stable, dict):
            agreed = ", ".join(f"{name} {value:.2f}" for name, value in stable.items() if name != "parts")
            orders.append(f"rank agreement of {stable.get('parts')} parts of the text (1 is full): {agreed}")
        return "\n".join([table, *([""] if orders else []), *orders])

    def to_dict(self) -> dict[str, Any]:
        """The scores as the plain data that their file holds."""
        return {"shortcut": FORMAT, **asdict(self)}


def format_scores(scores: Scores) -> str:
    """The text of a score file."""
    return json.dumps(scores.to_dict(), indent=1, ensure_ascii=False) + "\n"


def read_scores(path: Path) -> Scores:
    """Read scores from their JSON file. Raises ShortcutError for a file that does not hold scores."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShortcutError(f"no scores at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ShortcutError(f"cannot read the scores {path}: {error}") from None
    fields = {"parameters", "block_parameters", "metrics", "calibration", "settings"}
    check_format(data, str(path), fields | {"base", "orders"})
    base = read_base(data.get("base"), str(path))
    if missing := sorted(fields - set(data)):
        raise ShortcutError(f"{path} lacks the entry {missing[0]!r}")
    try:
        metrics = {name: _read_values(values, base.blocks) for name, values in data["metrics"].items()}
        block_parameters = tuple(int(count) for count in data["block_parameters"])
        parameters = int(data["parameters"])
        orders = {str(name): _read_order(blocks, base.blocks) for name, blocks in data.get("orders", {}).items()}
        plain = isinstance(data["calibration"], dict) and isinstance(data["settings"], dict)
        if len(block_parameters) != base.blocks or not metrics or parameters < 1 or not plain:
            raise ValueError
    except (AttributeError, TypeError, ValueError, LookupError, OverflowError):
        raise ShortcutError(f"{path} does not hold the scores of {base.blocks} blocks") from None
    return Scores(base, parameters, block_parameters, metrics, data["calibration"], data["settings"], orders)


def _read_order(blocks: Any, depth: int) -> tuple[int, ...]:
    order = tuple(int(block) for block in blocks)
    if len(set(order)) != len(order) or not set(order) <= set(range(depth)):
        raise ValueError
    return order


def _read_values(values: Any, depth: int) -> tuple[float, ...] | Triangle:
    def row(numbers: Any, length: int) -> tuple[float, ...]:
        scores = tuple(float(number) for number in numbers)
        if len(scores) != length or not all(math.isfinite(score) for score in scores):
            raise ValueError
        return scores

    if not isinstance(values, list):
        raise ValueError
    if isinstance(values[0], list):
        if len(values) != depth:
            raise ValueError
        return tuple(row(numbers, depth - n) for n, numbers in enumerate(values))
    return row(values, depth)
