"""Plans tried on a live model: what each costs in perplexity, on text that it was not chosen by."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shortcut.checking.perplexity import perplexity
from shortcut.common.progress import track
from shortcut.common.text import format_count, format_table
from shortcut.live.blocks import device_of
from shortcut.live.load import Model
from shortcut.material.examples import Material
from shortcut.records.actions import Action
from shortcut.records.plan import Plan
from shortcut.records.scores import Scores
from shortcut.surgery.preview import preview


@dataclass(frozen=True)
class Trial:
    """One plan and what it costs: the rule and metric that chose it, and the perplexity without its blocks.

    dropped: what goes, as text; count: how many blocks that concerns.
    """

    select: str
    metric: str | None
    dropped: str
    count: int
    parameters: int
    perplexity: float


@dataclass(frozen=True)
class Trials:
    """Several plans for one model, tried on the same text."""

    model: str
    text: str
    parameters: int
    perplexity: float
    trials: tuple[Trial, ...]

    @property
    def best(self) -> int:
        """The place of the plan that costs least; of equal ones the first."""
        return min(range(len(self.trials)), key=lambda place: self.trials[place].perplexity)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    def table(self) -> list[list[str]]:
        """A head and a row for every plan, the whole model first."""
        head = ["select", "metric", "count", "dropped", "parameters", "perplexity"]
        whole = Trial("none", None, "none", 0, self.parameters, self.perplexity)
        rows = [
            [trial.select, trial.metric or "-", trial.count, trial.dropped, trial.parameters]
            for trial in (whole, *self.trials)
        ]
        prices = [self.perplexity, *(trial.perplexity for trial in self.trials)]
        return [head, *([*map(str, row), f"{price:.2f}"] for row, price in zip(rows, prices, strict=True))]

    def as_csv(self) -> str:
        """The table for other programs."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.table())
        return text.getvalue()

    def __str__(self) -> str:
        head, *rows = self.table()
        rows = [[*row[:4], format_count(int(row[4])), row[5]] for row in rows]
        return f"{format_table(head, rows, left=2)}\n\nperplexity on {self.text}"


def try_plans(
    model: Model,
    scores: Scores,
    plans: Sequence[Plan],
    text: Material,
    batch_size: int,
    *,
    price: Callable[[Plan], float] | None = None,
    quiet: bool = True,
) -> Trials:
    """Measure the perplexity of a live model as it is, and under each of these plans; equal plans are tried once.

    scores: of this model, by which the plans were made; price: the perplexity on this text where plans are more than
    blocks that go, as when the rest is healed.
    """
    batches = text.batches(batch_size, device_of(model))
    whole = Plan.dropping(scores.base, ())
    known: dict[tuple[Action, ...], float] = {}
    for plan in track((whole, *plans), "trying plans", quiet=quiet):
        if plan.actions not in known and price is not None:
            known[plan.actions] = price(plan)
        elif plan.actions not in known:
            with preview(model, plan, batches[0]):
                known[plan.actions] = perplexity(model, batches)
    trials = tuple(
        Trial(
            plan.why["select"],
            plan.why.get("metric"),
            plan.described,
            len(plan.dropped) + len(plan.hollow),
            scores.parameters - sum(scores.size(*move) for move in enumerate(plan.actions)),
            known[plan.actions],
        )
        for plan in plans
    )
    described = text.described + (", every plan as it is once refitted" if price is not None else "")
    return Trials(scores.base.model, described, scores.parameters, known[whole.actions], trials)
