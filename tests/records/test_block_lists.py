"""Block lists: what is written is read back, and what is wrong is said in its own words."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut.common.errors import ShortcutError
from shortcut.records.block_lists import format_blocks, parse_blocks, parse_kept

BLOCKS = st.sets(st.integers(0, 999_999) | st.integers(0, 40), min_size=1, max_size=40)


@given(BLOCKS)
@settings(deadline=None)
def test_what_is_written_is_read_back(blocks):
    """Reading a written block list gives the same blocks, ascending."""
    assert parse_blocks(format_blocks(blocks)) == tuple(sorted(blocks))


@given(BLOCKS)
@settings(deadline=None)
def test_written_lists_are_as_short_as_can_be(blocks):
    """A written list has one part per run of consecutive blocks."""
    runs = sum(block - 1 not in blocks for block in blocks)
    assert len(format_blocks(blocks).split(",")) == runs


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("0", (0,)),
        ("3,5,21-28", (3, 5, *range(21, 29))),
        (" 7 , 2 - 4 ", (2, 3, 4, 7)),
        ("9,1", (1, 9)),
        ("6-6", (6,)),
        ("007", (7,)),
    ],
)
def test_what_can_be_written(text, blocks):
    """Spans include both ends, order and blanks do not matter."""
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize(
    ("blocks", "text"), [([], "none"), ([4], "4"), ([4, 5], "4-5"), ([8, 5, 4, 4, 0], "0,4-5,8"), (range(3), "0-2")]
)
def test_how_blocks_are_written(blocks, text):
    """Two neighbours already make a span, nothing is "none", repetition and order are evened out."""
    assert format_blocks(blocks) == text


@pytest.mark.parametrize("part", ["", "a", "-1", "3-", "1-2-3", "1.5", "2;3", "1234567", "+1", "1 2", "none", "1\n2"])
def test_a_part_that_is_no_block(part):
    """Text that is no block list is quoted, with an example of one."""
    with pytest.raises(ShortcutError, match=r"cannot read .* in the block list .*: write it like") as caught:
        parse_blocks(f"0,{part}")
    assert repr(part.strip()) in str(caught.value)


def test_a_span_that_runs_backwards():
    """A span from high to low is refused with the right way round."""
    with pytest.raises(ShortcutError, match=r"the span 9-4 in '1,9-4' runs backwards: write 4-9"):
        parse_blocks("1,9-4")


@pytest.mark.parametrize(
    ("text", "twice"), [("3,3", "3"), ("2-6,4-5", "4-5"), ("0-9,9-12,11", "9,11"), ("0-999999,5", "5")]
)
def test_a_block_named_twice(text, twice):
    """All blocks that are named twice are told, at once even where a million are named."""
    with pytest.raises(ShortcutError, match=f"names {twice} twice"):
        parse_blocks(text)


@pytest.mark.parametrize(("text", "beyond"), [("7", "7"), ("3,6-9", "7-9"), ("999999", "999999")])
def test_a_block_that_the_model_does_not_have(text, beyond):
    """Where the depth is known, blocks beyond it are told, and which there are."""
    with pytest.raises(ShortcutError, match=f"no block {beyond}: the model has blocks 0-6"):
        parse_blocks(text, 7)


def test_the_last_block_is_there():
    """The last of n blocks has the number n - 1."""
    assert parse_blocks("0,5-6", 7) == (0, 5, 6)


@given(st.text(max_size=20) | st.text("0123456789,- ", max_size=20))
@settings(deadline=None)
def test_any_text_is_read_or_refused(text):
    """Whatever is written, the answer is ascending blocks without repetition or a ShortcutError in one line."""
    try:
        blocks = parse_blocks(text)
    except ShortcutError as error:
        answer, expected = len(str(error).splitlines()), 1
    else:
        answer, expected = blocks, tuple(sorted(set(blocks)))
    assert answer == expected


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("every-second", (0, 2, 4, 6, 8, 10)),
        ("every-third", (0, 3, 6, 9)),
        ("every-sixth", (0, 6)),
        ("0,2,4-6", (0, 2, 4, 5, 6)),
    ],
)
def test_blocks_that_stay(text, blocks):
    """By number, or by a step from the first."""
    assert parse_kept(text, 12) == blocks
