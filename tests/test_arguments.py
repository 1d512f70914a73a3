"""From text to a call: every kind of annotation is read, and what cannot be meant is a UsageError."""

from inspect import Parameter
from pathlib import Path
from typing import Literal

import pytest

from shortcut.arguments import UsageError, bind, options_of
from shortcut.cli import COMMANDS
from shortcut.option_help import OPTION_HELP


class Report:
    """What the command below gives, and what no option can be."""


def command(
    model: str | Path,
    out: str | Path = "here",
    *,
    count: int | None = None,
    share: float = 0.5,
    how_many_bytes: int = 3,
    plot: Path | None = None,
    select: Literal["lowest", "span"] = "lowest",
    maybe: Literal["a", "b"] | None = None,
    quiet: bool = False,
    report: Report | None = None,
) -> "Report":
    """A command with one option of every kind."""
    raise NotImplementedError


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", "7", "7"),
        ("out", "a b", "a b"),
        ("count", "7", 7),
        ("count", "-7", -7),
        ("share", "0.25", 0.25),
        ("share", "3", 3.0),
        ("how_many_bytes", "10", 10),
        ("plot", "a/b.png", Path("a/b.png")),
        ("select", "span", "span"),
        ("maybe", "a", "a"),
        ("quiet", "True", True),
        ("quiet", "False", False),
    ],
)
def test_every_kind_is_read(name, text, value):
    """Text becomes a value of the kind that the annotation names, and of exactly that type."""
    read = bind(command, {"model": "m", name: text})[name]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("count", "two", "--count two: needs a whole number"),
        ("count", "2.0", "--count 2.0: needs a whole number"),
        ("count", "", "--count : needs a whole number"),
        ("count", "None", "--count None: needs a whole number"),
        ("count", "9" * 5000, "needs a whole number"),
        ("how_many_bytes", "x", "--how-many-bytes x: needs a whole number"),
        ("share", "half", "--share half: needs a number"),
        ("select", "best", "--select best: choose from lowest, span"),
        ("select", "Span", "--select Span: choose from lowest, span"),
        ("maybe", "None", "--maybe None: choose from a, b"),
        ("quiet", "false", "--quiet stands alone: it takes no value such as 'false'"),
        ("quiet", "", "--quiet stands alone"),
        ("report", "x", "--report cannot be given as text"),
    ],
)
def test_values_that_an_option_cannot_mean(name, text, message):
    """A value of the wrong kind names the option as it is written, and what it needs."""
    with pytest.raises(UsageError, match=message):
        bind(command, {"model": "m", name: text})


def test_an_unknown_option():
    """A name that the command does not have is told, with those it has in order."""
    with pytest.raises(UsageError, match="unknown option 'size': there are model, out, count, share,"):
        bind(command, {"model": "m", "size": "3"})


def test_a_missing_argument():
    """What has no default has to be given."""
    with pytest.raises(UsageError, match="MODEL is missing"):
        bind(command, {"count": "3"})


def test_only_what_is_given_is_bound():
    """Defaults are left to the command itself."""
    assert bind(command, {"model": "m"}) == {"model": "m"}


def test_options_are_as_the_signature_says():
    """Options come in the order of the signature, with flag, default, position and kind."""
    options = options_of(command)
    assert [option.flag for option in options.values()][:5] == [
        "--model",
        "--out",
        "--count",
        "--share",
        "--how-many-bytes",
    ]
    assert [name for name, option in options.items() if option.positional] == ["model", "out"]
    assert [name for name, option in options.items() if option.required] == ["model"]
    assert [name for name, option in options.items() if option.is_switch] == ["quiet"]
    assert (options["model"].default, options["share"].default) == (Parameter.empty, 0.5)


def test_a_result_that_cannot_be_resolved():
    """What a command gives may be named by a type that is not imported: only the options are looked at."""

    def lazy(count: int = 1) -> "NotImported":  # type: ignore[name-defined]  # noqa: F821
        return count

    assert bind(lazy, {"count": "4"}) == {"count": 4}


def test_every_option_has_its_meaning():
    """Every option of every command is described once, and no description is left over."""
    assert {name for command in COMMANDS.values() for name in options_of(command)} == set(OPTION_HELP)
