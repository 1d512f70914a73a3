"""Which blocks go: pure rules over scores. No rule looks at a model."""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, get_args

from shortcut.common.errors import ShortcutError
from shortcut.records.actions import GONE, Action, Move, join
from shortcut.records.block_lists import parse_blocks
from shortcut.records.scores import Scores

Select = Literal["lowest", "span", "deepest", "spaced", "greedy", "healed"]
BY_PLACE: tuple[Select, ...] = ("deepest", "spaced")  # these look at no scores
HEALED = "healed"  # what the order is called in which blocks went by that rule
Choice = dict[int, Action]  # what is done to which block


def removals(
    rule: Select,
    depth: int,
    protected: Iterable[int] = (),
    scores: Scores | None = None,
    metric: str = "",
    allow: Sequence[Action] = ("drop",),
) -> list[Choice]:
    """What is done when 1, 2, 3 ... moves are made; as many entries as moves may be made at most.

    lowest: the lowest scores, each block on its own. span: the consecutive blocks whose span scores lowest, starting at
    any of 0..depth-count inclusive. deepest: from the last block but one upwards (the last stays), as in Deeper Layers.
    spaced: those that stay are spread evenly from the first to the last, as in DistilBERT.
    greedy: the order in which blocks went when what was left was scored again each time, as in SLEB. healed: the order
    when it was healed each time. Ties go to the deeper block. Nothing happens to protected blocks. allow: what may be
    done to a block; of several actions, lowest takes the moves that score lowest per parameter that goes. Raises
    ShortcutError for a rule without the scores it needs, and for several actions where it takes one.
    """
    shielded, action = set(protected), allow[0]
    candidates = [block for block in range(depth) if block not in shielded]
    check_rule(rule, allow)
    if rule == "deepest":
        return _growing([Move(block, action) for block in reversed(candidates) if block != depth - 1], depth)
    if rule == "spaced":
        counts = range(1, most_moves(rule, candidates, depth, allow) + 1)
        return [dict.fromkeys(_between(candidates, len(candidates) - count), action) for count in counts]
    if scores is None:
        raise ShortcutError(f"--select {rule} needs scores: give a scores.json, or --select {' or '.join(BY_PLACE)}")
    if rule in ("greedy", "healed"):
        return _growing(_order(scores, metric if rule == "greedy" else HEALED, shielded), depth)
    if rule == "lowest":
        return _growing(_by_price(scores, metric, candidates, allow), depth)
    found: list[Choice] = []
    for count in range(1, depth):
        spans = scores.of_spans(metric, count, action)
        free = [start for start in range(depth - count + 1) if shielded.isdisjoint(range(start, start + count))]
        if not free:
            break
        best = min(free, key=lambda start: (spans[start], -start))
        found.append(dict.fromkeys(range(best, best + count), action))
    return found


def check_rule(rule: Select, allow: Sequence[Action]) -> None:
    """Raise ShortcutError for a rule that there is not, and for several actions where it takes one."""
    if rule not in get_args(Select):
        raise ShortcutError(f"unknown rule {rule!r}: there are {', '.join(get_args(Select))}")
    if len(allow) > 1 and rule in (*BY_PLACE, "span", "healed"):
        raise ShortcutError(f"--select {rule} takes one action, not {', '.join(allow)}")


def _between(blocks: Sequence[int], staying: int) -> list[int]:
    """All but so many of these, which are spread evenly from the first to the last; one that stays is the first."""
    step = (len(blocks) - 1) / max(1, staying - 1)
    stays = {blocks[round(place * step)] for place in range(staying)}
    return [block for block in blocks if block not in stays]


def _by_price(scores: Scores, metric: str, candidates: Sequence[int], allow: Sequence[Action]) -> list[Move]:
    moves = [Move(block, action) for action in allow for block in candidates]
    values = {action: scores.of_blocks(metric, action) for action in allow}
    sizes = {move: max(1, scores.size(*move)) if len(allow) > 1 else 1 for move in moves}
    return sorted(moves, key=lambda move: (values[move.action][move.block] / sizes[move], -move.block))


def _order(scores: Scores, metric: str, shielded: set[int]) -> tuple[Move, ...]:
    if metric not in scores.orders:
        known = ", ".join(scores.orders) or "none"
        how = "prune with --select healed" if metric == HEALED else "score with --greedy N"
        raise ShortcutError(f"no order by {metric!r} in these scores (there are: {known}): {how}")
    if early := sorted(shielded & {move.block for move in scores.orders[metric]}):
        raise ShortcutError(f"the order by {metric} has block {early[0]}, which is to stay: score again with --protect")
    return scores.orders[metric]


def _growing(order: Sequence[Move], depth: int) -> list[Choice]:
    """What is done after each move that changes something, as long as one block keeps its attention."""
    choices: list[Choice] = []
    done: Choice = {}
    for block, action in order:
        after = {**done, block: join(done.get(block, "keep"), action)}
        if after != done and sum("attention" in GONE[own] for own in after.values()) < depth:
            choices.append(after)
            done = after
    return choices


def pick_count(choices: Sequence[Choice], count: int, depth: int) -> Choice:
    """The choice of this many moves. Raises ShortcutError, naming the possible numbers, where there is none."""
    check_count(count, len(choices), depth)
    return choices[count - 1]


def check_count(count: int, most: int, depth: int) -> None:
    """Raise ShortcutError, naming the possible numbers, for more moves than can be made, and for none."""
    if not 1 <= count <= most:
        possible = f"1 to {most} can go" if most else "none can go"
        raise ShortcutError(f"cannot drop {count} of {depth} blocks: {possible}")


def check_share(share: float, most: float) -> None:
    """Raise ShortcutError for a larger share of the parameters than can go."""
    if share > most:
        raise ShortcutError(f"cannot remove {share:.2%} of the parameters: the blocks that may go hold {most:.2%}")


def most_moves(rule: Select, free: Sequence[int], depth: int, allow: Sequence[Action]) -> int:
    """How many moves a rule can make at most, whatever the scores are. free: the blocks that need not stay, ascending.

    One block keeps its attention. Of several actions, two can follow each other on a block.
    """
    if rule == "deepest":
        return sum(block != depth - 1 for block in free)
    if rule == "healed":  # nothing stands in front of the first
        return sum(block != 0 for block in free)
    if rule == "span":
        runs = groupby(enumerate(free), key=lambda pair: pair[1] - pair[0])
        return min(max((len(list(run)) for _, run in runs), default=0), depth - 1)
    if len(allow) > 1:
        return 2 * len(free) - (len(free) == depth)
    return min(len(free), depth - 1) if "attention" in GONE[allow[0]] else len(free)


def pick_ratio(choices: Sequence[Choice], share: float, parameters: int, size: Callable[[int, Action], int]) -> Choice:
    """The smallest choice by which at least this share of all parameters of the model goes.

    size: how many go when something is done to a block.

    Raises ShortcutError where even the largest holds less.
    """
    shares = [sum(size(*move) for move in choice.items()) / parameters for choice in choices]
    check_share(share, max(shares, default=0))
    return next(choice for choice, held in zip(choices, shares, strict=True) if held >= share)


def parse_rules(text: str) -> list[Select]:
    """The rules of a comma-separated list; auto means the first three. Raises ShortcutError for an unknown one."""
    text = "lowest,span,deepest" if text == "auto" else text
    rules: list[Select] = [rule for word in text.split(",") for rule in get_args(Select) if rule == word.strip()]
    if unknown := [word.strip() for word in text.split(",") if word.strip() not in rules]:
        raise ShortcutError(f"unknown rule {unknown[0]!r}: there are {', '.join(get_args(Select))} and auto")
    return list(dict.fromkeys(rules))


def parse_protect(text: str, depth: int, candidates: str = "all") -> tuple[int, ...]:
    """Blocks that must stay: a block list, "none", or "plus": the first four and the last two (Shortened LLaMA).

    candidates: a list of the blocks that may go; the others stay as well.
    """
    beyond = set(range(depth)).difference(range(depth) if candidates == "all" else parse_blocks(candidates, depth))
    if text == "none":
        return tuple(sorted(beyond))
    if text == "plus":
        return tuple(sorted({*range(min(4, depth)), *range(max(0, depth - 2), depth), *beyond}))
    return tuple(sorted({*parse_blocks(text, depth), *beyond}))


def parse_candidates(candidates: str, protect: str, depth: int) -> tuple[int, ...]:
    """Blocks that may go: those of a list, or all, without the protected ones."""
    return tuple(sorted(set(range(depth)).difference(parse_protect(protect, depth, candidates))))


def parse_ratio(text: str) -> float:
    """Read "25%" or "0.25" as a share between 0 and 1, both excluded."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0
    if not 0 < share < 1:
        raise ShortcutError(f"cannot use the ratio {text!r}: write a share of the parameters such as 25% or 0.25")
    return share
