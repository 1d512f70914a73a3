"""The way through a plan: its kept blocks in order, each with what is dropped behind it."""

from collections.abc import Iterator
from dataclasses import dataclass

from shortcut.records.plan import Plan


@dataclass(frozen=True)
class Stretch:
    """A kept block and the dropped ones behind it. block: None for those in front of the first that is kept."""

    block: int | None
    covered: tuple[int, ...]


def stretches(plan: Plan) -> Iterator[Stretch]:
    """A plan's kept blocks in order, each with what is dropped behind it."""
    first = next(iter(plan.kept), len(plan.actions))
    if first:
        yield Stretch(None, tuple(range(first)))
    for block, following in zip(plan.kept, (*plan.kept[1:], len(plan.actions)), strict=True):
        yield Stretch(block, tuple(range(block, following)))


def runs_of(plan: Plan, *, looks: int, later: int) -> dict[Stretch, float]:
    """About as many runs of a block, over all text, as it takes to refit along a plan, by stretch.

    looks: how often a third of the text is read on to the end, to decide in front of a gap; later: how often behind
    one, where nothing is solved if never.
    """
    found, alike = dict[Stretch, float](), True
    for stretch in stretches(plan):
        gap = {plan.actions[number] for number in stretch.covered} != {"keep"}
        alike = alike and not gap
        tried = looks if gap else 0 if alike else later
        reading = tried * (len(plan.actions) - max(stretch.covered)) / 3
        found[stretch] = len(stretch.covered) + (not alike) + (3 + reading if tried else 0)
    return found
