"""Rules: against brute force over all choices, with protection, ties and limits."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut.choose.rules import most_moves, parse_protect, parse_ratio, pick_count, pick_ratio, removals
from shortcut.common.errors import ShortcutError
from shortcut.records.plan import Base
from shortcut.records.scores import Scores

RULES = ["lowest", "span", "deepest", "spaced"]
FEW = st.integers(0, 4).map(float)  # few values, so that ties are common


def scores_of(metric):
    """Scores of a model with one metric, called m; a triangle is told by its rows."""
    depth = len(metric)
    return Scores(Base("org/model", None, depth), 100, (1,) * depth, {"m": tuple(metric)}, {}, {})


@st.composite
def cases(draw, most=7):
    """A depth, protected blocks, and scores of every span of every length."""
    depth = draw(st.integers(1, most))
    protected = draw(st.sets(st.integers(0, depth - 1), max_size=3))
    rows = [draw(st.lists(FEW, min_size=depth - n, max_size=depth - n)) for n in range(depth)]
    return depth, protected, tuple(map(tuple, rows))


def gone(choices):
    """The blocks of every choice, in order; here nothing but dropping is allowed."""
    assert all(set(choice.values()) == {"drop"} for choice in choices)
    return [tuple(sorted(choice)) for choice in choices]


def ranked(choices, cost):
    """The cheapest choice; of equal ones the one that lies deepest, read from its last block."""
    return min(choices, key=lambda choice: (cost(choice), [-block for block in reversed(choice)]))


@given(cases())
@settings(deadline=None)
def test_lowest_is_the_cheapest_set_of_blocks(case):
    """Of all sets of n unprotected blocks, the one with the smallest sum goes, for every n that leaves a block."""
    depth, protected, triangle = case
    values = triangle[0]
    free = [block for block in range(depth) if block not in protected]
    expected = [
        ranked(combinations(free, count), lambda choice: sum(values[block] for block in choice))
        for count in range(1, min(len(free), depth - 1) + 1)
    ]
    assert gone(removals("lowest", depth, protected, scores_of(values), "m")) == expected


@given(cases(), st.booleans())
@settings(deadline=None)
def test_span_is_the_cheapest_run_of_blocks(case, of_spans):
    """Of all runs of n blocks without a protected one, the one with the lowest score goes; blocks are summed."""
    depth, protected, triangle = case
    rows = triangle if of_spans else [[sum(triangle[0][i : i + n + 1]) for i in range(depth - n)] for n in range(depth)]
    expected = []
    for count in range(1, depth):
        runs = [tuple(range(start, start + count)) for start in range(depth - count + 1)]
        if possible := [run for run in runs if not protected & set(run)]:
            row = rows[count - 1]
            expected.append(ranked(possible, lambda run, row=row: row[run[0]]))
    scores = scores_of(triangle if of_spans else triangle[0])
    assert gone(removals("span", depth, protected, scores, "m")) == expected


@given(
    cases(),
    st.sampled_from(["lowest", "span", "deepest", "spaced"]),
    st.sampled_from(["drop", "attention-only", "mlp-only"]),
)
@settings(deadline=None)
def test_how_much_can_go_is_known_before_there_are_scores(case, rule, action):
    """As many moves as a rule makes of any scores; with several actions at least as many."""
    depth, protected, triangle = case
    free = [block for block in range(depth) if block not in protected]
    halves = {name: {"m": triangle} for name in ("attention-only", "mlp-only")}
    sizes = dict.fromkeys(halves, (1,) * depth)
    scores = replace(scores_of(triangle), halves=halves, half_parameters=sizes)
    assert most_moves(rule, free, depth, (action,)) == len(removals(rule, depth, protected, scores, "m", (action,)))
    both = (action, "attention-only", "mlp-only")
    if rule == "lowest":
        assert most_moves(rule, free, depth, both) >= len(removals(rule, depth, protected, scores, "m", both))


@given(cases())
@settings(deadline=None)
def test_deepest_counts_from_the_end(case):
    """The deepest n unprotected blocks go, but never the last one, and no scores are needed."""
    depth, protected, _ = case
    free = [block for block in range(depth - 1) if block not in protected]
    expected = [tuple(free[-count:]) for count in range(1, len(free) + 1)]
    assert gone(removals("deepest", depth, protected)) == expected


@given(cases(), st.sampled_from(RULES))
@settings(deadline=None)
def test_choices_are_sound(case, rule):
    """The n-th choice has n ascending blocks, spares what is protected, and leaves at least one block."""
    depth, protected, triangle = case
    for count, choice in enumerate(gone(removals(rule, depth, protected, scores_of(triangle), "m")), 1):
        assert len(choice) == count < depth
        assert list(choice) == sorted(set(choice) - protected)


@given(cases())
@settings(deadline=None)
def test_spaced_leaves_blocks_that_are_spread_evenly(case):
    """Those that stay of the unprotected ones are where equal steps from the first to the last lead."""
    depth, protected, _ = case
    free = [block for block in range(depth) if block not in protected]
    for count, choice in enumerate(gone(removals("spaced", depth, protected)), 1):
        places = np.rint(np.linspace(0, len(free) - 1, len(free) - count)).astype(int)
        assert set(free) - set(choice) == {free[place] for place in places}


def test_spaced_is_the_rule_of_distilbert_and_distil_whisper():
    """Six of 12 and two of 32, as both were started from."""
    assert set(range(12)) - set(gone(removals("spaced", 12))[5]) == {0, 2, 4, 7, 9, 11}
    assert set(range(32)) - set(gone(removals("spaced", 32))[29]) == {0, 31}


@pytest.mark.parametrize("rule", ["lowest", "span"])
def test_ties_go_deeper(rule):
    """Where all blocks score alike, the last ones go."""
    assert gone(removals(rule, 5, (), scores_of([1.0] * 5), "m")) == [(4,), (3, 4), (2, 3, 4), (1, 2, 3, 4)]


def test_the_last_span_can_go():
    """A span may start as late as depth - count, so that it ends with the last block."""
    assert gone(removals("span", 4, (), scores_of([9.0, 9.0, 1.0, 1.0]), "m"))[1] == (2, 3)


@pytest.mark.parametrize(
    ("rule", "scores", "message"),
    [
        ("lowest", None, "--select lowest needs scores: give a scores.json, or --select deepest or spaced"),
        ("span", None, "--select span needs scores"),
        ("best", scores_of([1.0]), "unknown rule 'best': there are lowest, span, deepest"),
        ("lowest", scores_of([1.0, 2.0]), "no scores of metric 'x': there are m"),
    ],
)
def test_rules_that_cannot_be_followed(rule, scores, message):
    """A rule without its scores, and one that there is not, say what there is."""
    with pytest.raises(ShortcutError, match=message):
        removals(rule, 2, (), scores, "x")


CHOICES = removals("lowest", 7, parse_protect("0-3", 7), scores_of([0.0, 0.0, 0.0, 0.0, 3.0, 1.0, 2.0]), "m")


def test_a_count_that_can_go():
    """The choice of n blocks has n blocks."""
    assert gone([pick_count(CHOICES, count, 7) for count in (1, 2, 3)]) == [(5,), (5, 6), (4, 5, 6)]


@pytest.mark.parametrize("count", [-1, 0, 4, 7])
def test_a_count_that_cannot_go(count):
    """Protected blocks never go to make up a number: the error says how many can go."""
    with pytest.raises(ShortcutError, match=f"cannot drop {count} of 7 blocks: 1 to 3 can go"):
        pick_count(CHOICES, count, 7)


def test_no_count_can_go():
    """Where every block is protected, or there is but one, the error says that none can go."""
    for choices in (removals("deepest", 3, range(3)), removals("deepest", 1)):
        with pytest.raises(ShortcutError, match="none can go"):
            pick_count(choices, 1, 3)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8), st.integers(0, 200), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_a_ratio_takes_the_first_choice_that_holds_enough(sizes, rest, share):
    """The smallest choice with at least the share of all parameters goes; where none has it, the most is told."""
    choices, total = removals("deepest", len(sizes)), sum(sizes) + rest
    held = [sum(sizes[block] for block in choice) / total for choice in choices]
    enough = [choice for choice, part in zip(choices, held, strict=True) if part >= share]
    if enough:
        assert pick_ratio(choices, share, total, lambda block, _: sizes[block]) == enough[0]
    else:
        with pytest.raises(ShortcutError, match=f"the blocks that may go hold {held[-1]:.2%}"):
            pick_ratio(choices, share, total, lambda block, _: sizes[block])


def test_a_ratio_where_no_block_may_go():
    """Without any choice, the blocks that may go hold nothing."""
    with pytest.raises(ShortcutError, match=r"cannot remove 25.00% of the parameters: .* hold 0.00%"):
        pick_ratio([], 0.25, 100, lambda *_: 50)


@pytest.mark.parametrize(
    ("text", "share"),
    [("25%", 0.25), ("0.25", 0.25), (".5", 0.5), (" 12.5 % ", 0.125), ("99.9%", 0.999), ("0.1%", 0.001)],
)
def test_ratios_that_are_read(text, share):
    """A share is written in percent or as a fraction."""
    assert parse_ratio(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["0", "0%", "1", "100%", "25", "150%", "-0.2", "a quarter", "", "1e-3", "nan", "%", "5%%"]
)
def test_ratios_that_are_refused(text):
    """Nothing, everything, and what is no share are refused with two examples."""
    with pytest.raises(ShortcutError, match=r"cannot use the ratio .*: write a share .* such as 25% or 0.25"):
        parse_ratio(text)


@pytest.mark.parametrize(
    ("text", "depth", "blocks"),
    [
        ("none", 7, ()),
        ("plus", 32, (0, 1, 2, 3, 30, 31)),
        ("plus", 5, (0, 1, 2, 3, 4)),
        ("plus", 2, (0, 1)),
        ("0-1,6", 7, (0, 1, 6)),
    ],
)
def test_what_can_be_protected(text, depth, blocks):
    """Nothing, a block list, or the first four and the last two, as far as there are so many."""
    assert parse_protect(text, depth) == blocks


def test_protecting_a_block_that_is_not_there():
    """Blocks beyond the model cannot be protected."""
    with pytest.raises(ShortcutError, match="no block 7: the model has blocks 0-6"):
        parse_protect("0,7", 7)
