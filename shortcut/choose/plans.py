"""What is to go, as it was asked for, and the plans that rules make of scores for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shortcut.choose.rules import (
    BY_PLACE,
    HEALED,
    Choice,
    Select,
    parse_protect,
    parse_ratio,
    pick_count,
    pick_ratio,
    removals,
)
from shortcut.common.errors import ShortcutError
from shortcut.options.groups import Allowed, ByHand, HowMany
from shortcut.records.actions import LISTED, Action, parse_actions
from shortcut.records.plan import Base, Plan, parse_moves
from shortcut.records.scores import Scores

BY_HAND = "--drop (or --keep, --attention-only, --mlp-only, --last-token and --freeze-visual)"


@dataclass(frozen=True)
class Wanted:
    """What is to go: so many moves, a share of the parameters, or just these moves; the others are None.

    allow: what may be done to a block; staying: the blocks to which nothing happens; said: how both were put, for the
    record of a plan.
    """

    count: int | None
    share: float | None
    moves: Choice | None
    allow: tuple[Action, ...]
    staying: tuple[int, ...]
    said: Mapping[str, str]


def read_wanted(
    base: Base, amount: HowMany, by_hand: Mapping[Action, str], may_go: Allowed, preset: str | None = None
) -> Wanted:
    """Read what is to go from the base. Raises ShortcutError for what is unclear, and for what cannot both be meant."""
    if sum((amount.count is not None, amount.ratio is not None, bool(by_hand))) != 1:
        raise ShortcutError(f"say what goes with one of --count, --ratio and {BY_HAND}")
    staying = parse_protect(may_go.protect, base.blocks, may_go.candidates)
    moves = parse_moves(by_hand, base.blocks) if by_hand else None
    if early := sorted(set(moves or ()) & set(staying)):
        raise ShortcutError(f"block {early[0]} cannot both go and stay: see --protect and --candidates")
    said = {"allow": may_go.allow, "protect": may_go.protect, "candidates": may_go.candidates}
    said |= {} if preset is None else {"preset": preset}
    share = None if amount.ratio is None else parse_ratio(amount.ratio)
    return Wanted(amount.count, share, moves, parse_actions(may_go.allow), staying, said)


def given_by_hand(asked: ByHand) -> dict[Action, str]:
    """The block lists that were given by hand, by action."""
    lists = (asked.keep, asked.drop, asked.attention_only, asked.mlp_only, asked.last_token, asked.freeze_visual)
    return {action: text for action, text in zip(("keep", *LISTED), lists, strict=True) if text is not None}


def make_plan(wanted: Wanted, scores: Scores, rule: Select, metric: str | None = None) -> Plan:
    """The plan that a rule makes of scores, by one of their metrics: by the first where none is named.

    scores: those of the base; without any metric they say how large its blocks are. Raises ShortcutError as `removals`,
    `pick_count` and `pick_ratio` do.
    """
    base = scores.base
    if wanted.moves is not None:
        return Plan.of(base, wanted.moves, {"preset": wanted.said["preset"]} if "preset" in wanted.said else None)
    metric = metric or next(iter(scores.names), "")
    choices = removals(rule, base.blocks, wanted.staying, scores if scores.names else None, metric, wanted.allow)
    if wanted.count is not None:
        moves = pick_count(choices, wanted.count, base.blocks)
    else:
        assert wanted.share is not None
        moves = pick_ratio(choices, wanted.share, scores.parameters, scores.size)
    why: dict[str, object] = {"select": rule, **wanted.said}
    if scores.names and rule not in BY_PLACE:
        why |= {"metric": metric, "moves": scores.describe_moves(metric, moves)}
        why |= {"calibration": dict(scores.calibration), "settings": dict(scores.settings)}
    return Plan.of(base, moves, why)


def plans_by_rules(wanted: Wanted, scores: Scores, rules: Sequence[Select]) -> list[Plan]:
    """What every rule chooses by every metric. Raises ShortcutError as `make_plan` does."""
    plans = []
    for rule in rules:
        orders = [name for name in scores.orders if name != HEALED]
        by_rule = {**dict.fromkeys(BY_PLACE, scores.names[:1]), "greedy": orders, "healed": [HEALED]}
        known = by_rule.get(rule, scores.names)
        plans += [make_plan(wanted, scores, rule, metric) for metric in known]
    return plans
