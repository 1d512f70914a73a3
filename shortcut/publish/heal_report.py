"""What a healed checkpoint says of itself: what was done to it, and what it is worth beside the base and the cut."""

import shutil
from dataclasses import dataclass, replace
from typing import Any

from shortcut.checking.benchmark import FORMS, Benchmark
from shortcut.checking.verify import CheckReport
from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.stage import write_text
from shortcut.common.text import format_count, format_size, format_table
from shortcut.publish.card import CARD, format_card
from shortcut.publish.report import Report, make_report, write_report
from shortcut.records.methods import Method
from shortcut.records.plan import Plan, format_plan
from shortcut.records.scores import read_scores

BESIDE = ("scores.json", "scores.png")  # of what stands beside the weights of the cut, what still holds


@dataclass(frozen=True)
class HealReport:
    """What healing did, and what base, shortened and healed model are worth on text that chose nothing.

    parameters, bytes: of the base and of the healed model, which is as large as the shortened one; page: what
    report.html shows of it.
    """

    out: str
    methods: tuple[Method, ...]
    changes: tuple[str, ...]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    cut: CheckReport
    check: CheckReport
    benchmark: Benchmark
    page: Report | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        found = {"out": self.out, "methods": list(self.methods), "changes": list(self.changes)}
        sizes = {"parameters": list(self.parameters), "bytes": list(self.bytes)}
        return {**found, **sizes, "cut": self.cut.to_dict(), "check": self.check.to_dict(), **self.benchmark.to_dict()}

    def __str__(self) -> str:
        rows: list[list[object]] = [
            [name, before, was, now]
            for (name, _, was), (_, before, now) in zip(self.cut.rows, self.check.rows, strict=True)
        ]
        found = self.benchmark.columns()
        for name, form in FORMS.items():
            values = [found.get(model, {}).get(name) for model in ("base", "cut", "healed")]
            if any(value is not None for value in values):
                rows.append([name, *("" if value is None else format(value, form) for value in values)])
        for name, (before, after), write in (
            ("parameters", self.parameters, format_count),
            ("bytes", self.bytes, format_size),
        ):
            rows.append([name, write(before), write(after), write(after)])
        return "\n".join(
            [
                f"wrote {self.out}, healed by {', then '.join(self.methods)}",
                *self.changes,
                "",
                format_table(["", "base", "cut", "healed"], rows),
                "",
                str(self.check),
            ]
        )


def describe_healed(
    base: Checkpoint, plan: Plan, cut: Checkpoint, healed: Checkpoint, report: HealReport, command: str
) -> HealReport:
    """Write beside the weights how they came about: plan, scores where the cut has them, model card and report.html.

    Gives the report with that page. Raises ShortcutError where a file cannot be written.
    """
    folder = healed.folder
    write_text(folder / "plan.yaml", format_plan(plan))
    for name in BESIDE:
        if (cut.folder / name).exists():
            shutil.copyfile(cut.folder / name, folder / name)
    write_text(folder / CARD, format_card(healed, base, plan, report.check))
    kept = cut.folder / "scores.json"
    scores = read_scores(kept) if kept.exists() else None
    made, found = {"cut": cut, "healed": healed}, report.benchmark.columns()
    page = make_report(base, plan, made, report.check, scores=scores, command=command, changes=report.changes).measured(
        found
    )
    if report.cut.perplexity is not None:
        page = page.measured({"cut": {"perplexity": report.cut.perplexity}})
    if report.cut.answers is not None and report.cut.answers.right is not None:
        page = page.measured({"cut": {"right answers": report.cut.answers.right}})
    write_report(folder / "report.html", page)
    return replace(report, page=page)
