"""`run`: one command with its options in a recipe, a YAML file, and what a publication says comes out of it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from shortcut.checkpoint.open import open_model
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import text_config
from shortcut.options.groups import Quiet
from shortcut.options.verb import UsageError, bind, verb
from shortcut.records.actions import LISTED
from shortcut.records.block_lists import format_blocks, parse_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.report import CutReport
from shortcut.surgery.savings import prefill
from shortcut.verbs.check import check
from shortcut.verbs.cut import cut
from shortcut.verbs.diff import diff
from shortcut.verbs.eval import eval  # noqa: A004  (the word on the command line)
from shortcut.verbs.freeze import freeze
from shortcut.verbs.heal import heal
from shortcut.verbs.inspect import inspect
from shortcut.verbs.plan import plan
from shortcut.verbs.prune import PruneReport, prune
from shortcut.verbs.score import score
from shortcut.verbs.sweep import sweep

PLANNING: tuple[Callable[..., Any], ...] = (plan, cut, prune, freeze)  # the commands that an expectation can be of
VERBS: tuple[Callable[..., Any], ...] = (
    *(inspect, plan, cut, diff),
    *(score, sweep, check, prune, freeze, heal, eval),
)
RUNNABLE = {command.__name__: command for command in VERBS}
_FLOPS = re.compile(r"[\d.]+% of ([1-9]\d*)\+([1-9]\d*)")


@dataclass(frozen=True)
class Outcome:
    """What a recipe's command did, and what of it is expected: blocks by action, parameters left, operations left."""

    report: Plan | CutReport | PruneReport
    expected: Mapping[str, str | int]
    found: Mapping[str, str | int]

    @property
    def is_same(self) -> bool:
        """Whether what came out is what is expected."""
        return self.found == self.expected

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**self.report.to_dict(), "expected": dict(self.expected), "found": dict(self.found)}

    def __str__(self) -> str:
        return "\n".join([str(self.report), "", *self.lines])

    @property
    def lines(self) -> list[str]:
        """For people: what is expected, each with what came out."""
        lines = []
        for name, value in self.found.items():
            expected = self.expected.get(name, "none")
            lines.append(f"expected {name} {expected}: {'the same' if value == expected else f'differs: {value}'}")
        return lines


class OutcomeError(ShortcutError):
    """The outcome of a recipe that is not the expected one; `outcome` has the whole of it."""

    def __init__(self, recipe: Path, outcome: Outcome) -> None:
        super().__init__(f"{recipe}: {'; '.join(line for line in outcome.lines if not line.endswith('the same'))}")
        self.outcome = outcome


@dataclass(frozen=True)
class RunOptions(Quiet):
    """The outcome"""

    recipe: Annotated[Path, "a YAML file: the options of one command, by name"]
    _: KW_ONLY
    verify: Annotated[bool, "take any outcome but the one that the recipe expects for a failure"] = False


@verb(RunOptions, example="recipe.yaml --verify")
def run(asked: RunOptions) -> Any:
    """Run the command that a recipe file describes, with its options by name.

    A recipe is YAML: `command: prune`, then that command's options, such as `model: org/name` or `count: 7`. With an
    entry such as `expect: {drop: 21-29}` the report ends with whether these blocks went. Fails as the command does, and
    with --verify for another outcome.
    """
    recipe = asked.recipe
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ShortcutError(f"cannot read the recipe {recipe}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or content.get("command") not in RUNNABLE:
        raise ShortcutError(f"{recipe} needs an entry command: with one of {', '.join(RUNNABLE)}")
    command: Any = RUNNABLE[content.pop("command")]
    expected = None if "expect" not in content else _read_expected(content.pop("expect"), command, str(recipe))
    if asked.verify and expected is None:
        raise ShortcutError(f"{recipe} has no entry expect: there is nothing that --verify could compare")
    texts = {str(name).replace("-", "_"): str(value) for name, value in content.items() if value is not None}
    if asked.quiet:
        texts["quiet"] = "True"
    try:
        arguments = bind(command, texts)
    except UsageError as error:
        raise ShortcutError(f"{recipe}: {error}") from None
    report = command(**arguments)
    if expected is None:
        return report
    outcome = Outcome(report, expected, _find(report, expected))
    if asked.verify and not outcome.is_same:
        raise OutcomeError(recipe, outcome)
    return outcome


def _read_expected(entry: Any, command: Any, origin: str) -> dict[str, str | int]:
    """The outcome that a recipe expects: blocks by action, and what may be said of them. Raises ShortcutError."""
    if command not in PLANNING:
        raise ShortcutError(
            f"{origin}: {command.__name__} chooses no blocks: expect goes with plan, cut, prune, freeze"
        )
    known: dict[str, Any] = {**dict.fromkeys(LISTED, str | int), "flops": str}
    if command is not plan:  # which counts no weights
        known["parameters"] = int
    sound = isinstance(entry, dict) and any(action in entry for action in LISTED)
    if not sound or not all(name in known and isinstance(value, known[name]) for name, value in entry.items()):
        raise ShortcutError(f"{origin}: expect has {', '.join(known)}, as in {{drop: 21-29}}, not {entry!r}")
    if "flops" in entry and ("freeze-visual" not in entry or not _FLOPS.fullmatch(entry["flops"])):
        form = "the share left of a prompt of tokens of text and of images, as in 55.2% of 64+576"
        raise ShortcutError(f"{origin}: flops goes with freeze-visual, and is {form}, not {entry['flops']!r}")
    try:
        return {
            name: format_blocks(parse_blocks(str(value))) if name in LISTED else value for name, value in entry.items()
        }
    except ShortcutError as error:
        raise ShortcutError(f"{origin}: {error}") from None


def _find(report: Plan | CutReport | PruneReport, expected: Mapping[str, str | int]) -> dict[str, str | int]:
    """What came out, of what is expected, and what else happened to blocks."""
    cut = report.cut if isinstance(report, PruneReport) else report
    plan = cut if isinstance(cut, Plan) else cut.plan
    found: dict[str, str | int] = {
        action: format_blocks(plan.blocks(action)) for action in LISTED if action in expected or plan.blocks(action)
    }
    if "parameters" in expected and isinstance(cut, CutReport):
        found["parameters"] = cut.parameters_after
    if match := _FLOPS.fullmatch(str(expected.get("flops"))):
        base = open_model(plan.base.model, plan.base.revision, weights=False, quiet=True)
        saved = prefill(text_config(base.config)[1], plan.frozen, int(match[1]), int(match[2]))
        share = saved.frozen / saved.dense - len(plan.dropped) / plan.base.blocks
        found["flops"] = f"{share:.1%} of {match[1]}+{match[2]}"
    return found
