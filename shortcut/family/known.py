"""Which families are cut exactly: the table that the sweep over all families of transformers wrote.

`make sweep` makes it: a tiny random model of every family is cut in three ways and compared with
itself, its blocks bypassed.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from shortcut.common.text import format_table
from shortcut.family.halves import read_hollowings

RESULTS = ("exact", "in part", "refused", "untried")


@dataclass(frozen=True)
class Family:
    """One family and task. result: exact, in part (what is not exact is refused), refused, or untried.

    task: what its models do, and of those with several stacks, whose blocks went. halves: what else its blocks can
    become: "halves" is attention-only and mlp-only, "last" last-token, "images" freeze-visual.
    """

    name: str
    task: str
    result: str
    why: str
    halves: str


@dataclass(frozen=True)
class Families:
    """What the sweep found, with this release of transformers."""

    transformers: str
    rows: tuple[Family, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    @property
    def by_task(self) -> list[list[object]]:
        """For every task, how many families had each of the `RESULTS`."""
        tasks = dict.fromkeys(row.task for row in self.rows)
        counts = Counter((row.task, row.result) for row in self.rows)
        return [[task, *(counts[task, result] for result in RESULTS)] for task in sorted(tasks)]

    def __str__(self) -> str:
        rows = [[row.name, row.task, row.result, row.halves, row.why] for row in self.rows]
        table = format_table(["family", "task", "blocks deleted", "or", "why"], rows, left=5)
        summary = format_table(["task", *RESULTS], self.by_task)
        return f"{table}\n\n{len(rows)} pairs of family and task in transformers {self.transformers}:\n\n{summary}"


@cache
def read_families() -> Families:
    """Read the table that comes with the package."""
    data = json.loads(files("shortcut").joinpath("data", "families.json").read_text(encoding="utf-8"))
    known = {(found.family, found.auto): found for found in read_hollowings().values()}
    tasks = {"text": "AutoModelForCausalLM", "image and text": "AutoModelForImageTextToText"}

    def halves(name: str, task: str) -> str:
        found = known.get((name, tasks.get(task, "")))
        if found is None:
            return ""
        return ", ".join(["halves", *["last"] * found.last_token, *["images"] * found.freezes])

    rows = [Family(name, task, result, why, halves(name, task)) for name, task, result, why in data["rows"]]
    return Families(data["transformers"], tuple(rows))


def is_proven(family: str) -> bool:
    """Whether the sweep cut this family exactly, in every way that it tried, for every task."""
    return {row.result for row in read_families().rows if row.name == family} - {"untried"} == {"exact"}
