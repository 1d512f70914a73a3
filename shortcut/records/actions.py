"""What can be done to a block, what of it goes then, and how one thing is done after the other."""

from typing import Literal, NamedTuple

from shortcut.common.errors import ShortcutError

Half = Literal["attention", "mlp"]  # the two residual branches of a block
Action = Literal["keep", "drop", "attention-only", "mlp-only", "last-token", "freeze-visual", "freeze-text"]
GONE: dict[Action, frozenset[Half]] = {
    "keep": frozenset(),
    "drop": frozenset(("attention", "mlp")),
    "attention-only": frozenset(("mlp",)),
    "mlp-only": frozenset(("attention",)),
    "last-token": frozenset(),  # of a prompt, only the last token goes through
    "freeze-visual": frozenset(),  # of a prompt, tokens of images give keys and values, and stay as they are
    "freeze-text": frozenset(),  # all others do; to compare with
}
FREEZING: tuple[Action, ...] = ("freeze-visual", "freeze-text")
MOVES = tuple(action for action in GONE if GONE[action] or action in FREEZING)
LISTED = tuple(action for action in GONE if action not in ("keep", "freeze-text"))  # what a plan can have


class Move(NamedTuple):
    """One action on one block; written "7" where the block goes whole, else "7 attention-only"."""

    block: int
    action: Action = "drop"

    def __str__(self) -> str:
        return str(self.block) if self.action == "drop" else f"{self.block} {self.action}"

    @classmethod
    def read(cls, text: str) -> "Move":
        """The inverse of `str`. Raises ValueError for other text."""
        number, _, word = text.partition(" ")
        for action in MOVES:
            if action == (word or "drop"):
                return cls(int(number), action)
        raise ValueError(f"no action {word!r}")


def join(one: Action, other: Action) -> Action:
    """What two actions on the same block come to: what goes by either is gone."""
    if "keep" in (one, other) or one == other:
        return one if other == "keep" else other
    gone = GONE[one] | GONE[other]
    return next(action for action in GONE if GONE[action] == gone)


def parse_actions(text: str) -> tuple[Action, ...]:
    """The actions of a comma-separated list. Raises ShortcutError for an unknown one."""
    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in MOVES]:
        raise ShortcutError(f"unknown action {unknown[0]!r}: there are {', '.join(MOVES)}")
    if len(words) > 1 and set(words) & set(FREEZING):
        raise ShortcutError(f"{text}: freezing takes no parameters away, so it cannot be weighed against other actions")
    return tuple(action for action in MOVES if action in words)
