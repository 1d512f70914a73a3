"""A verb: a function of one typed record, called by keywords in Python and by words on the command line.

The record is a dataclass, whose fields are the options; `groups.py` has those that several verbs share. Everything else
follows from it: how the function is called and what mypy knows of that, help(), --help, recipes, and the command that a
report says it was made by.
"""

import shlex
import textwrap
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, get_annotations
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

from shortcut.options.presets import Preset, with_preset

_GIVES = (
    "Gives {}: str() of it is what the command prints, to_dict() the same as plain data. Where the command fails with "
    "exit code 1, ShortcutError is raised."
)
P = ParamSpec("P")
A = TypeVar("A")
R = TypeVar("R")


class UsageError(Exception):
    """A call that cannot be made: an unknown option, a value of the wrong kind, something left out."""


@dataclass(frozen=True)
class Option:
    """One option of a verb: a field of its record. heading: of the group that it belongs to."""

    name: str
    annotation: Any
    default: Any
    positional: bool
    meaning: str
    heading: str

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value can have, but for None."""
        union = get_origin(self.annotation) in (Union, types.UnionType)
        kinds = get_args(self.annotation) if union else (self.annotation,)
        return tuple(kind for kind in kinds if kind is not types.NoneType)

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_switch(self) -> bool:
        """Whether it stands alone, without a value."""
        return self.kinds == (bool,)

    def read(self, text: str) -> Any:
        """Read a value. Raises UsageError for text that this option cannot mean."""
        literals = [value for kind in self.kinds if get_origin(kind) is Literal for value in get_args(kind)]
        if literals:
            if text not in literals:
                raise UsageError(f"{self.flag} {text}: choose from {', '.join(literals)}")
            return text
        if self.is_switch:
            if text not in ("True", "False"):
                raise UsageError(f"{self.flag} stands alone: it takes no value such as {text!r}")
            return text == "True"
        if str in self.kinds:
            return text
        if Path in self.kinds:
            return Path(text)
        for kind, called in ((int, "a whole number"), (float, "a number")):
            if kind in self.kinds:
                try:
                    return kind(text)
                except ValueError:
                    raise UsageError(f"{self.flag} {text}: needs {called}") from None
        raise UsageError(f"{self.flag} cannot be given as text")


@dataclass(frozen=True)
class Verb:
    """What is known of a verb. about: its docstring; first: the options that matter most; example: one command line."""

    name: str
    about: str
    options: Mapping[str, Option]
    first: tuple[str, ...]
    example: str


def verb(
    record: Callable[P, A], *, example: str, first: str = "", presets: Mapping[Any, Preset] | None = None
) -> Callable[[Callable[[A], R]], Callable[P, R]]:
    """Have a function of a record be called by the record's fields.

    example: words behind the name of the verb; first: names of the options that matter most, with blanks. presets: what
    the option `preset` means; the preset that a call names gives the options that are not given, and raises
    ShortcutError where that cannot be.
    """
    assert isinstance(record, type)
    options = _read_options(record)

    def make(function: Callable[[A], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in with_preset(kwargs, options, presets or {}).items():
                kwargs.setdefault(name, value)
            return function(record(*args, **kwargs))

        name, returned = function.__name__, get_annotations(function)["return"]
        about = textwrap.dedent("    " + (function.__doc__ or "")).strip()
        known = Verb(name, about, options, tuple(first.split()), f"shortcut {name} {example}")
        parameters = [_parameter(option) for option in options.values()]
        vars(call).update(verb=known, __signature__=Signature(parameters, return_annotation=returned))
        call.__doc__ = _describe(known, returned)
        return call

    return make


def verb_of(function: Callable[..., Any]) -> Verb:
    """What is known of a verb, by the function that is called."""
    return vars(function)["verb"]


def spell_out(function: Callable[..., Any], asked: Any) -> str:
    """The command line that makes a call: what it is about, and every option that is not left at its default.

    asked: the record of the call. Options that say nothing of the result are left out.
    """
    words = ["shortcut", function.__name__]
    for name, option in verb_of(function).options.items():
        value = getattr(asked, name)
        if option.positional:
            words.append(str(value))
        elif value != option.default and name not in ("quiet", "overwrite"):
            words += [option.flag] if option.is_switch else [option.flag, str(value)]
    return shlex.join(words)


def handed_on(record: Callable[P, A], asked: object, *given: P.args, **also: P.kwargs) -> A:
    """A record with these options, and with those of every group that it shares with another, as they are there.

    So `handed_on(Loading, asked)` is that group alone.
    """
    assert isinstance(record, type)
    for group in set(record.__mro__) & set(type(asked).__mro__[:-1]):
        for name in get_annotations(group):
            also.setdefault(name, getattr(asked, name))
    return record(*given, **also)


def bind(function: Callable[..., Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments for a call, read from text by the names of options.

    Raises UsageError for an unknown name, an unreadable value, and a required option without one.
    """
    options = verb_of(function).options
    if unknown := [name for name in texts if name not in options]:
        raise UsageError(f"unknown option {unknown[0]!r}: there are {', '.join(options)}")
    if missing := [option.name for option in options.values() if option.required and option.name not in texts]:
        raise UsageError(f"{missing[0].upper()} is missing")
    return {name: options[name].read(text) for name, text in texts.items()}


def _read_options(record: type) -> dict[str, Option]:
    """The options of a record: what it is about, its own, and those of its groups in the order that it names them.

    Those under one heading stand together, the most general first: its own stand first, or where a group has that
    heading as well.
    """
    known = {field.name: field for field in fields(record)}
    places: dict[str, type] = {}  # where an option is said, rather than given another default
    for group in record.__mro__[:-1]:
        for name, hint in get_annotations(group).items():
            if hasattr(hint, "__metadata__"):  # an Annotated
                places.setdefault(name, group)
    options = {name: _read_option(known[name], group) for name, group in places.items()}
    said = [option.heading for name, option in options.items() if places[name] is not record]
    own = _heading(record)
    headings = list(dict.fromkeys([*([] if own in said else [own]), *said]))
    general_first = list(reversed(record.__mro__))

    def place(option: Option) -> tuple[bool, int, int]:
        return not option.positional, headings.index(option.heading), general_first.index(places[option.name])

    return {option.name: option for option in sorted(options.values(), key=place)}


def _read_option(field: Any, group: type) -> Option:
    kind, meaning = get_args(get_annotations(group)[field.name])
    return Option(field.name, kind, field.default, not field.kw_only, meaning, _heading(group))


def _heading(group: type) -> str:
    return (group.__doc__ or "").partition("\n")[0]


def _parameter(option: Option) -> Parameter:
    """An option as `inspect.signature` and help() show it."""
    kind = Parameter.POSITIONAL_OR_KEYWORD if option.positional else Parameter.KEYWORD_ONLY
    default = Parameter.empty if option.required else option.default
    return Parameter(option.name, kind, default=default, annotation=option.annotation)


def _describe(known: Verb, returned: Any) -> str:
    """The docstring of a verb, for help(): what it does and gives, and its options by their headings."""
    names = [getattr(each, "__name__", str(each)) for each in get_args(returned) or (returned,)]
    lines = [known.about, "", *textwrap.wrap(_GIVES.format(" or ".join(names)), 116), ""]
    heading = None
    for option in known.options.values():
        if option.heading != heading:
            lines.append(heading := option.heading)
        lines += textwrap.wrap(f"{option.name}: {option.meaning}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
