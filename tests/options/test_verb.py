"""From text to a call: every kind of annotation is read, and what cannot be meant is a UsageError."""

import inspect
import pydoc
from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest

import shortcut
from shortcut.cli import COMMANDS, main
from shortcut.options.groups import Loading, Quiet, Running
from shortcut.options.verb import UsageError, bind, handed_on, spell_out, verb, verb_of


class Report:
    """What no option can be."""


@dataclass(frozen=True)
class Options(Running):
    """What is special"""

    model: Annotated[str | Path, "what to read"]
    out: Annotated[str | Path, "where to write"] = "here"
    _: KW_ONLY
    count: Annotated[int | None, "how many"] = None
    share: Annotated[float, "how much"] = 0.5
    how_many_bytes: Annotated[int, "how large"] = 3
    plot: Annotated[Path | None, "a picture"] = None
    select: Annotated[Literal["lowest", "span"], "which"] = "lowest"
    maybe: Annotated[Literal["a", "b"] | None, "or not"] = None
    report: Annotated[Report | None, "nothing that text can say"] = None
    batch_size: int = 7


@verb(Options, first="count", example="m")
def command(asked: Options) -> Options:
    """A command with one option of every kind.

    More of it.
    """
    return asked


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
    """Options come as the record has them, its own first, with flag, default, position, kind and heading."""
    options = verb_of(command).options
    assert [option.flag for option in options.values()][:5] == [
        "--model",
        "--out",
        "--count",
        "--share",
        "--how-many-bytes",
    ]
    assert [name for name, option in options.items() if option.positional] == ["model", "out"]
    assert [name for name, option in options.items() if option.required] == ["model"]
    assert [name for name, option in options.items() if option.is_switch] == ["trust_remote_code", "quiet"]
    assert (options["model"].default, options["share"].default) == (MISSING, 0.5)
    assert (options["count"].heading, options["device"].heading) == ("What is special", "The model")


def test_another_default_keeps_the_meaning():
    """A record that gives an option of a group another default leaves the rest as the group says it."""
    option = verb_of(command).options["batch_size"]
    assert (option.default, option.heading, option.meaning) == (7, "The model", "sequences per forward pass")
    assert (command("m").batch_size, command("m", batch_size=2).batch_size) == (7, 2)


def test_a_verb_is_called_as_any_function():
    """By position, by keyword; with one too many, one that is not there, or too few, as Python says it."""
    assert command("m", "o", count=3) == command(model="m", out="o", count=3) == Options("m", "o", count=3)
    for args, kwargs in ((("m", "o", 3), {}), (("m",), {"size": 3}), ((), {})):
        with pytest.raises(TypeError):
            command(*args, **kwargs)


def test_help_says_it_all():
    """help() and inspect know every option of every verb, with kind and default, and what it means."""
    assert str(inspect.signature(command)).startswith(
        "(model: str | pathlib.Path, out: str | pathlib.Path = 'here', *,"
    )
    assert inspect.signature(shortcut.prune).parameters["count"].annotation == int | None
    for name, each in COMMANDS.items():
        text = pydoc.render_doc(getattr(shortcut, name), renderer=pydoc.plaintext)
        assert all(f"{option}: " in text for option in verb_of(each).options)
        assert all(option.meaning for option in verb_of(each).options.values())


def test_help_of_the_command_line(capsys):
    """Usage and an example come first, then what matters most, then the rest by headings; every option once."""
    for name, each in COMMANDS.items():
        assert main([name, "--help"]) == 0
        lines, known = capsys.readouterr().out.splitlines(), verb_of(each)
        assert lines[0].startswith(f"usage: shortcut {name} ")
        flags = [line.split()[0] for line in lines if line.startswith("  --")]
        assert sorted(flags) == sorted(["--json", *(o.flag for o in known.options.values() if not o.positional)])
        assert flags[: len(known.first)] == [known.options[first].flag for first in known.first]
        assert set(known.first) <= known.options.keys()


def test_groups_are_handed_on():
    """One record takes from another what both have of the same groups, and nothing else of the same name."""
    asked = Options("m", count=3, device="cuda", quiet=True, batch_size=9)
    assert handed_on(Running, asked) == Running(device="cuda", quiet=True, batch_size=9)
    assert handed_on(Running, asked, device="cpu") == Running(device="cpu", quiet=True, batch_size=9)
    assert handed_on(Loading, asked) == Loading(device="cuda")

    @dataclass(frozen=True, kw_only=True)
    class Other(Quiet):
        count: int = 0

    assert handed_on(Other, asked) == Other(count=0, quiet=True)


def test_the_command_that_makes_a_call():
    """Every option that is not left at its default, but for what says nothing of the result."""
    asked = Options("a b", count=3, quiet=True, trust_remote_code=True)
    assert spell_out(command, asked) == "shortcut command 'a b' here --count 3 --trust-remote-code"
