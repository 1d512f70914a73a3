"""The plan: what happens to every block of which base model, and why.

A plan is the only thing that scoring and surgery share. On disk it is a YAML file that a person can write:

    shortcut: 1
    base: {model: org/model, revision: 5f0b02c, blocks: 32}
    drop: 21-29
    why: {metric: block-influence, select: lowest}
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from shortcut.errors import ShortcutError
from shortcut.records.blocks import format_blocks, parse_blocks

Action = Literal["keep", "drop"]
FORMAT = 1


@dataclass(frozen=True)
class Base:
    """The model that a plan or a set of scores speaks of: where it is, at which revision, how deep."""

    model: str
    revision: str | None
    blocks: int


@dataclass(frozen=True)
class Plan:
    """One action per block of the base, in block order, and the reason for it as plain data."""

    base: Base
    actions: tuple[Action, ...]
    why: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.actions) != self.base.blocks:
            raise ShortcutError(f"a plan for {self.base.blocks} blocks has {len(self.actions)} actions")
        if unknown := set(self.actions) - set(get_args(Action)):
            raise ShortcutError(f"unknown action {sorted(unknown)[0]!r}: there are {', '.join(get_args(Action))}")
        if not self.kept:
            raise ShortcutError(f"the plan drops all {self.base.blocks} blocks: at least one has to stay")

    @classmethod
    def dropping(cls, base: Base, blocks: Iterable[int], why: Mapping[str, Any] | None = None) -> "Plan":
        """The plan that drops these blocks of the base and keeps the others."""
        gone = set(blocks)
        if beyond := sorted(block for block in gone if not 0 <= block < base.blocks):
            raise ShortcutError(f"no block {format_blocks(beyond)}: the model has blocks 0-{base.blocks - 1}")
        return cls(base, tuple("drop" if i in gone else "keep" for i in range(base.blocks)), dict(why or {}))

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks of the base that are in the result, in order: the result's block k is `kept[k]` of the base."""
        return tuple(i for i, action in enumerate(self.actions) if action != "drop")

    @property
    def dropped(self) -> tuple[int, ...]:
        """Blocks of the base that are not in the result."""
        return tuple(i for i, action in enumerate(self.actions) if action == "drop")

    def __str__(self) -> str:
        return format_plan(self).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The plan as the plain data that its file holds."""
        base = {"model": self.base.model, "revision": self.base.revision, "blocks": self.base.blocks}
        return {"shortcut": FORMAT, "base": base, "drop": format_blocks(self.dropped), "why": dict(self.why)}

    @classmethod
    def from_dict(cls, data: Any, origin: str = "plan") -> "Plan":
        """Read the plain data of a plan; `origin` names it in errors. Raises ShortcutError for anything else."""
        check_format(data, origin, {"base", "drop", "why"})
        base = read_base(data.get("base"), origin)
        drop = data.get("drop", "none")
        if not isinstance(drop, str | int) or isinstance(drop, bool):
            raise ShortcutError(f'{origin}: "drop" is {drop!r}: write a block list such as "3,5,21-28"')
        blocks = () if drop == "none" else parse_blocks(str(drop), base.blocks)
        why = data.get("why") or {}
        if not isinstance(why, dict):
            raise ShortcutError(f'{origin}: "why" has to be a mapping, not {why!r}')
        try:
            json.dumps(why)
        except (TypeError, ValueError):
            raise ShortcutError(f'{origin}: "why" has to be plain data: text, numbers, lists and mappings') from None
        return cls.dropping(base, blocks, why)


def read_base(data: Any, origin: str) -> Base:
    """Read the `base` entry of a plan or a score file."""
    blocks = data.get("blocks") if isinstance(data, dict) else None
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks <= 100_000:
        raise ShortcutError(f'{origin}: "base" needs model, revision and blocks (the number of blocks), not {data!r}')
    revision = data.get("revision")
    return Base(str(data.get("model", "")), None if revision is None else str(revision), blocks)


def check_format(data: Any, origin: str, known: set[str]) -> None:
    """Refuse what is not a record of this format, and entries that nothing here would read."""
    if not isinstance(data, dict) or data.get("shortcut") != FORMAT:
        raise ShortcutError(f"{origin} is not a file of shortcut: it lacks the entry shortcut: {FORMAT}")
    if unknown := sorted(str(key) for key in data if key not in known | {"shortcut"}):
        raise ShortcutError(f"{origin}: unknown entry {unknown[0]!r}; it can have {', '.join(sorted(known))}")


def read_plan(path: Path) -> Plan:
    """Read a plan from its YAML file."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ShortcutError(f"no plan at {path}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ShortcutError(f"cannot read the plan {path}: {' '.join(str(error).split())}") from None
    return Plan.from_dict(data, str(path))


def format_plan(plan: Plan) -> str:
    """The text of a plan's YAML file."""
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True, width=120)
