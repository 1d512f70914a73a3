"""Sizes, counts and tables: read as written, written in three or four digits."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_count, format_size, format_table, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("512 B", 512),
        ("20KB", 20_000),
        ("20k", 20_000),
        ("500 MB", 500_000_000),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        (" 1.5 GB ", 1_500_000_000),
        ("2TB", 2_000_000_000_000),
    ],
)
def test_sizes_that_are_read(text, size):
    """Units are decimal, in either case, with or without their B and a blank."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "0", "0.4", "0GB", "-5GB", "5 PB", "5GiB", "1e9", "5 GB 3", "five", "inf", "nan", "9" * 400]
)
def test_sizes_that_are_refused(text):
    """Anything else, and zero, is refused with two examples."""
    with pytest.raises(ShortcutError, match=r"cannot read the size .*: write it like 5GB or 500MB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1234, "1.23 KB"),
        (269_030_016, "269 MB"),
        (999_700_000, "1000 MB"),
        (15_000_000_000, "15 GB"),
        (2_340_000_000_000, "2.34 TB"),
        (7 * 10**15, "7000 TB"),
    ],
)
def test_how_sizes_are_written(size, text):
    """Sizes are written in decimal units, in three digits and never in powers of ten."""
    assert format_size(size) == text


@given(st.integers(1, 10**15))
@settings(deadline=None)
def test_a_written_size_is_read_back(size):
    """A written size is read back to within half of its third digit."""
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (1280, "1.28k"),
        (134_515_008, "134.5M"),
        (70 * 10**9, "70B"),
        (10**12, "1T"),
    ],
)
def test_how_counts_are_written(count, text):
    """Counts are written in at most four digits and a letter."""
    assert format_count(count) == text


@given(st.integers(0, 10**15))
@settings(deadline=None)
def test_a_written_count_is_close(count):
    """A written count is within half of its fourth digit, and never a power of ten."""
    match = re.fullmatch(r"([\d.]+)([kMBT]?)", format_count(count))
    assert match is not None
    factor = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[match[2]]
    assert float(match[1]) * factor == pytest.approx(count, rel=0.0006)


def test_a_table_is_flush():
    """The first columns are flush left, the others flush right, and no line ends in blanks."""
    table = format_table(["name", "n", "size"], [["a", 1, "10 MB"], ["longer", 200, ""]])
    assert table.splitlines() == ["name      n   size", "a         1  10 MB", "longer  200"]


@pytest.mark.parametrize(("left", "lines"), [(0, ["a  bb", "1   2"]), (2, ["a  bb", "1  2"])])
def test_columns_on_the_left(left, lines):
    """How many columns are flush left is up to the caller."""
    assert format_table(["a", "bb"], [[1, 2]], left=left).splitlines() == lines


def test_a_table_without_rows():
    """A table without rows is its head."""
    assert format_table(["a", "b"], []) == "a  b"
