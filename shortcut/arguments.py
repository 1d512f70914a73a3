"""From text to a call: every value arrives as text and is read by the annotation of its parameter.

The command line and recipe files share this, so that a word means the same in both.
"""

import shlex
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin


class UsageError(Exception):
    """A call that cannot be made: an unknown option, a value of the wrong kind, something left out."""


@dataclass(frozen=True)
class Option:
    """One parameter of a command, as its signature declares it."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    positional: bool

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is Parameter.empty

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


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a command by name, in the order of its signature."""
    options = {}
    for name, parameter in signature(function).parameters.items():
        hint = parameter.annotation
        union = get_origin(hint) in (Union, types.UnionType)
        kinds = tuple(kind for kind in (get_args(hint) if union else (hint,)) if kind is not types.NoneType)
        positional = parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        options[name] = Option(name, kinds, parameter.default, positional)
    return options


def spell_out(command: Callable[..., Any], values: Mapping[str, Any]) -> str:
    """The command line that makes a call: what it is about, and every option that is not left at its default.

    values: by parameter name. Options that say nothing of the result are left out.
    """
    words = ["shortcut", command.__name__]
    for name, option in options_of(command).items():
        if option.positional:
            words.append(str(values[name]))
        elif values[name] != option.default and name not in ("quiet", "overwrite"):
            words += [option.flag] if option.is_switch else [option.flag, str(values[name])]
    return shlex.join(words)


def bind(function: Callable[..., Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Keyword arguments for a call, read from text by parameter name.

    Raises UsageError for an unknown name, an unreadable value, and a required parameter without one.
    """
    options = options_of(function)
    if unknown := [name for name in texts if name not in options]:
        raise UsageError(f"unknown option {unknown[0]!r}: there are {', '.join(options)}")
    if missing := [option.name for option in options.values() if option.required and option.name not in texts]:
        raise UsageError(f"{missing[0].upper()} is missing")
    return {name: options[name].read(text) for name, text in texts.items()}
