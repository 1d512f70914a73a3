"""Recipes: one command with its options in a YAML file, and what a publication says comes out of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shortcut import commands, measure
from shortcut.arguments import UsageError, bind, options_of
from shortcut.errors import ShortcutError
from shortcut.freezing import freeze
from shortcut.records.blocks import format_blocks, parse_blocks
from shortcut.records.plan import Plan
from shortcut.road import PruneReport, prune
from shortcut.surgery.cut import CutReport

DROPPING = (commands.plan, commands.cut, prune)  # the commands that an expectation can be of
RUNNABLE = {
    command.__name__: command
    for command in (
        *(commands.inspect, commands.plan, commands.cut, commands.diff),
        *(measure.score, measure.sweep, measure.check, prune, freeze),
    )
}


@dataclass(frozen=True)
class Comparison:
    """What a recipe's command did, and whether it is what the recipe expects: blocks dropped, parameters left."""

    report: Plan | CutReport | PruneReport
    expected: Mapping[str, str | int]

    @property
    def found(self) -> dict[str, str | int]:
        """What came out, of what is expected."""
        if isinstance(self.report, Plan):
            return {"drop": self.report.described}
        cut = self.report.cut if isinstance(self.report, PruneReport) else self.report
        found: dict[str, str | int] = {"drop": cut.plan.described, "parameters": cut.parameters_after}
        return {name: found[name] for name in self.expected}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**self.report.to_dict(), "expected": dict(self.expected), "found": self.found}

    def __str__(self) -> str:
        lines = []
        for name, value in self.found.items():
            what = f"expected {'blocks' if name == 'drop' else name} {self.expected[name]}"
            lines.append(f"{what}: {'the same' if value == self.expected[name] else f'differs: {value}'}")
        return "\n".join([str(self.report), "", *lines])


def run(recipe: Path, *, quiet: bool = False) -> Any:
    """Run the command that a recipe file describes, with its options by name.

    A recipe is YAML: `command: prune`, then that command's options, such as `model: org/name` or `count: 7`. With an
    entry such as `expect: {drop: 21-29}` the report ends with whether these blocks went.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ShortcutError(f"cannot read the recipe {recipe}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("command") not in RUNNABLE:
        raise ShortcutError(f"{recipe} needs an entry command: with one of {', '.join(RUNNABLE)}")
    command: Any = RUNNABLE[content.pop("command")]
    expected = None if "expect" not in content else _read_expected(content.pop("expect"), command, str(recipe))
    texts = {str(name).replace("-", "_"): str(value) for name, value in content.items() if value is not None}
    if quiet and "quiet" in options_of(command):
        texts["quiet"] = "True"
    try:
        arguments = bind(command, texts)
    except UsageError as error:
        raise ShortcutError(f"{recipe}: {error}") from None
    report = command(**arguments)
    return report if expected is None else Comparison(report, expected)


def _read_expected(entry: Any, command: Any, origin: str) -> dict[str, str | int]:
    """The outcome that a recipe expects: `drop`, and where weights are counted `parameters`. Raises ShortcutError."""
    if command not in DROPPING:
        raise ShortcutError(f"{origin}: {command.__name__} drops no blocks: expect goes with plan, cut and prune")
    known: dict[str, Any] = {"drop": str | int} if command is commands.plan else {"drop": str | int, "parameters": int}
    sound = isinstance(entry, dict) and "drop" in entry
    if not sound or not all(name in known and isinstance(value, known[name]) for name, value in entry.items()):
        raise ShortcutError(f"{origin}: expect has {' and '.join(known)}, as in {{drop: 21-29}}, not {entry!r}")
    try:
        return {**entry, "drop": format_blocks(parse_blocks(str(entry["drop"])))}
    except ShortcutError as error:
        raise ShortcutError(f"{origin}: {error}") from None
