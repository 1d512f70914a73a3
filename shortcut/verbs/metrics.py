"""`metrics`: what blocks can be scored by."""

from typing import TYPE_CHECKING

from shortcut.options.groups import Quiet
from shortcut.options.verb import verb

if TYPE_CHECKING:
    from shortcut.scoring.metrics import MetricList


@verb(Quiet, example="--json")
def metrics(asked: Quiet) -> "MetricList":  # noqa: ARG001  (every command can be told to be quiet)
    """List the metrics: formula, what they need, what they cost, and where they come from."""
    from shortcut.scoring.metrics import METRICS, MetricList

    return MetricList(tuple(METRICS.values()))
