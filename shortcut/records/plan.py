"""The plan: what happens to every block of which base model, and why.

A plan is the only thing that scoring and surgery share. On disk it is a YAML file that a person can write:

    shortcut: 1
    base: {model: org/model, revision: 5f0b02c, blocks: 32}
    drop: 21-29
    attention-only: 15,17
    why: {metric: block-influence, select: lowest}
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import STACKS, Stack
from shortcut.records.actions import GONE, LISTED, Action
from shortcut.records.block_lists import format_blocks, parse_blocks, parse_kept

Format = Literal["custom", "zeroed", "decilm"]
FORMAT = 1
KEEPS_HEADS = "keep-mtp"  # in a file, and as an option


@dataclass(frozen=True)
class Base:
    """The model that a plan or a set of scores speaks of: where it is, at which revision, how deep, and which of its
    stacks of blocks is meant."""

    model: str
    revision: str | None
    blocks: int
    stack: Stack = "decoder"

    @property
    def on_hub(self) -> bool:
        """Whether it is named by its id on the Hub: folders and files are recorded by their whole path."""
        return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.model) is not None

    @property
    def title(self) -> str:
        """What to call it in public: its id on the Hub, or the name of its folder or file without the path to it."""
        return self.model if self.on_hub else Path(self.model).name.removesuffix(".gguf")

    def to_dict(self) -> dict[str, Any]:
        """Plain data; the stack is named where it is not the decoder."""
        return {name: value for name, value in vars(self).items() if (name, value) != ("stack", "decoder")}


@dataclass(frozen=True)
class Plan:
    """One action per block of the base, in block order, and the reason for it as plain data.

    format: how blocks that lose a half are written: "custom", without its tensors and with a modeling file; "zeroed",
    with zeros in their place, as large as before; "decilm", without them and as servers of DeciLM read it.
    keeps_heads: whether heads behind the last block that predict further tokens stay where blocks go.
    """

    base: Base
    actions: tuple[Action, ...]
    why: Mapping[str, Any] = field(default_factory=dict)
    format: Format = "custom"
    keeps_heads: bool = False

    def __post_init__(self) -> None:
        if len(self.actions) != self.base.blocks:
            raise ShortcutError(f"a plan for {self.base.blocks} blocks has {len(self.actions)} actions")
        if unknown := set(self.actions) - {"keep", *LISTED}:
            raise ShortcutError(f"unknown action {sorted(unknown)[0]!r}: there are keep, {', '.join(LISTED)}")
        if not self.kept:
            raise ShortcutError(f"the plan drops all {self.base.blocks} blocks: at least one has to stay")
        if self.format not in get_args(Format):
            raise ShortcutError(f"unknown format {self.format!r}: there are {', '.join(get_args(Format))}")
        for action in ("last-token", "freeze-visual") if self.format != "custom" else ():
            if action in self.actions:
                raise ShortcutError(f"the format {self.format} knows no {action} blocks: they need --format custom")
        if self.frozen and (self.hollow or self.blocks("last-token")):
            raise ShortcutError("blocks cannot be frozen where others are attention-only, mlp-only or last-token")
        if all("attention" in GONE[action] for action in self.actions):
            raise ShortcutError("the plan leaves no block its attention: at least one has to keep it")

    @classmethod
    def dropping(cls, base: Base, blocks: Iterable[int], why: Mapping[str, Any] | None = None) -> "Plan":
        """The plan that drops these blocks of the base and keeps the others."""
        return cls.of(base, dict.fromkeys(blocks, "drop"), why)

    @classmethod
    def of(cls, base: Base, actions: Mapping[int, Action], why: Mapping[str, Any] | None = None) -> "Plan":
        """The plan of these actions by block; the other blocks are kept."""
        if beyond := sorted(block for block in actions if not 0 <= block < base.blocks):
            raise ShortcutError(f"no block {format_blocks(beyond)}: the model has blocks 0-{base.blocks - 1}")
        return cls(base, tuple(actions.get(block, "keep") for block in range(base.blocks)), dict(why or {}))

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks of the base that are in the result, in order: the result's block k is `kept[k]` of the base."""
        return tuple(i for i, action in enumerate(self.actions) if action != "drop")

    @property
    def dropped(self) -> tuple[int, ...]:
        """Blocks of the base that are not in the result."""
        return self.blocks("drop")

    @property
    def hollow(self) -> tuple[int, ...]:
        """Blocks of the base of which half is in the result."""
        return tuple(i for i, action in enumerate(self.actions) if len(GONE[action]) == 1)

    @property
    def frozen(self) -> tuple[int, ...]:
        """Blocks of the base that leave the tokens of images as they are."""
        return self.blocks("freeze-visual")

    @property
    def changes(self) -> bool:
        """Whether anything happens to any block."""
        return any(action != "keep" for action in self.actions)

    @property
    def needs_code(self) -> bool:
        """Whether the result needs a modeling file: it has blocks that no class of transformers builds."""
        return self.format != "zeroed" and bool(self.hollow or self.blocks("last-token") or self.frozen)

    @property
    def described(self) -> str:
        """For people: what happens to which blocks, such as "4-5, attention-only 7"."""
        lists = {action: format_blocks(self.blocks(action)) for action in LISTED if self.blocks(action)}
        parts = [blocks if action == "drop" else f"{action} {blocks}" for action, blocks in lists.items()]
        return ", ".join(parts) or "none"

    def blocks(self, action: Action) -> tuple[int, ...]:
        """Blocks of the base to which this happens."""
        return tuple(i for i, own in enumerate(self.actions) if own == action)

    def __str__(self) -> str:
        return format_plan(self).rstrip()

    def to_dict(self) -> dict[str, Any]:
        """The plan as the plain data that its file holds."""
        base = self.base.to_dict()
        lists: dict[str, Any] = {action: format_blocks(self.blocks(action)) for action in LISTED if self.blocks(action)}
        written: dict[str, Any] = {} if self.format == "custom" else {"format": self.format}
        written |= {KEEPS_HEADS: True} if self.keeps_heads else {}
        return {"shortcut": FORMAT, "base": base, "drop": "none", **lists, **written, "why": dict(self.why)}

    @classmethod
    def from_dict(cls, data: Any, origin: str = "plan") -> "Plan":
        """Read the plain data of a plan; `origin` names it in errors. Raises ShortcutError for anything else."""
        check_format(data, origin, {"base", *LISTED, "format", KEEPS_HEADS, "why"})
        base = read_base(data.get("base"), origin)
        lists: dict[Action, str] = {}
        for action in LISTED:
            blocks = data.get(action, "none")
            if not isinstance(blocks, str | int) or isinstance(blocks, bool):
                raise ShortcutError(f'{origin}: "{action}" is {blocks!r}: write a block list such as "3,5,21-28"')
            lists[action] = str(blocks)
        why = data.get("why") or {}
        if not isinstance(why, dict):
            raise ShortcutError(f'{origin}: "why" has to be a mapping, not {why!r}')
        try:
            json.dumps(why)
        except (TypeError, ValueError):
            raise ShortcutError(f'{origin}: "why" has to be plain data: text, numbers, lists and mappings') from None
        plan = cls.of(base, parse_moves(lists, base.blocks), why)
        return replace(plan, format=data.get("format", "custom"), keeps_heads=data.get(KEEPS_HEADS) is True)


def parse_moves(lists: Mapping[Action, str], depth: int) -> dict[int, Action]:
    """Read a block list per action, "none" being empty, into an action per block.

    Of blocks to keep, as `parse_kept` reads them, the others are dropped. Raises ShortcutError as `parse_blocks` does,
    for a block in two lists, and where both are said, what stays and what goes.
    """
    if {"keep", "drop"} <= lists.keys():
        raise ShortcutError("say which blocks go, or which stay, not both")
    moves: dict[int, Action] = {}
    if "keep" in lists:
        moves = dict.fromkeys(sorted(set(range(depth)) - set(parse_kept(lists["keep"], depth))), "drop")
    for action, text in lists.items():
        for block in () if text == "none" or action == "keep" else parse_blocks(text, depth):
            if block in moves:
                raise ShortcutError(f"block {block} cannot be both {moves[block]} and {action}")
            moves[block] = action
    return moves


def read_base(data: Any, origin: str) -> Base:
    """Read the `base` entry of a plan or a score file."""
    blocks = data.get("blocks") if isinstance(data, dict) else None
    if not isinstance(blocks, int) or isinstance(blocks, bool) or not 1 <= blocks <= 100_000:
        raise ShortcutError(f'{origin}: "base" needs model, revision and blocks (the number of blocks), not {data!r}')
    revision, stack = data.get("revision"), data.get("stack", "decoder")
    if stack not in STACKS:
        raise ShortcutError(f"{origin}: unknown stack {stack!r}: there are {', '.join(STACKS)}")
    return Base(str(data.get("model", "")), None if revision is None else str(revision), blocks, stack)


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
