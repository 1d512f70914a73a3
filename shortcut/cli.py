"""The command line: text -> bound call -> exit code. It knows no models.

fire alone would call a function before it rejects a mistyped flag, guess types, page its help and show tracebacks. So
fire only parses here: what it calls returns the bound call, which runs when nothing is left over.

Exit codes: 0 done, 1 a mistake found while working, 2 wrong usage, 130 interrupted, 143 terminated.
"""

import contextlib
import difflib
import functools
import io
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import fire

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import are_several, is_writer
from shortcut.common.version import __version__
from shortcut.options.verb import Option, UsageError, Verb, bind, verb_of
from shortcut.verbs.chat import chat
from shortcut.verbs.check import check
from shortcut.verbs.compare import compare
from shortcut.verbs.cut import cut
from shortcut.verbs.demo import demo
from shortcut.verbs.diff import diff
from shortcut.verbs.eval import eval  # noqa: A004  (the word on the command line)
from shortcut.verbs.families import families
from shortcut.verbs.freeze import freeze
from shortcut.verbs.heal import heal
from shortcut.verbs.inspect import inspect
from shortcut.verbs.metrics import metrics
from shortcut.verbs.plan import plan
from shortcut.verbs.prune import prune
from shortcut.verbs.push import push
from shortcut.verbs.refresh import refresh
from shortcut.verbs.run import OutcomeError, run
from shortcut.verbs.score import score
from shortcut.verbs.speed import speed
from shortcut.verbs.sweep import sweep

Command = Callable[..., Any]
VERBS: tuple[Command, ...] = (
    *(inspect, score, plan, cut, prune, freeze, check, heal, eval, speed),
    *(push, refresh, chat, compare, sweep, diff, metrics, families, run, demo),
)
COMMANDS: dict[str, Command] = {verb.__name__: verb for verb in VERBS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code. Results go to stdout, everything else to stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"shortcut {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UsageError(f"unknown command {words[0]!r}: there are {', '.join(COMMANDS)}")
        if {"-h", "--help"} & set(words):
            print(_help(verb_of(COMMANDS[words[0]])))
            return 0
        if are_several() and COMMANDS[words[0]] not in (score, heal):
            raise UsageError(f"{words[0]} runs in one process; torchrun is for score and heal")
        as_json = "--json" in words
        call = _parse([word for word in words if word != "--json"])
        try:
            result = call()
        except OutcomeError as error:
            _print(error.outcome, as_json=as_json)
            raise
        _print(result, as_json=as_json)
    except UsageError as error:
        return _fail(f"{error} (shortcut {words[0] if words[0] in COMMANDS else ''} --help)".replace("  ", " "), 2)
    except ShortcutError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of stdout, such as `head`, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def entry() -> NoReturn:
    """The console script: `main` with SIGTERM turned into an orderly end, so that half-written output is removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())


def _print(result: Any, *, as_json: bool) -> None:
    if is_writer():
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) if as_json else result)
    sys.stdout.flush()


def _fail(message: str, code: int) -> int:
    print(f"shortcut: {message}", file=sys.stderr)
    return code


def _parse(words: list[str]) -> Callable[[], Any]:
    """Let fire sort the words into the parameters of the command, and give the call; nothing runs."""
    command = COMMANDS[words[0]]
    options = verb_of(command).options
    calls: list[Callable[[], Any]] = []

    @fire.decorators.SetParseFn(str)
    @functools.wraps(command)
    def note(*args: Any, **kwargs: Any) -> None:
        given = dict(zip(options, args, strict=False)) | kwargs  # fire fills in defaults of positionals, as they are
        texts = {name: value for name, value in given.items() if value is not options[name].default}
        calls.append(functools.partial(command, **bind(command, texts)))

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            fire.Fire({words[0]: note}, [words[0], *_spell_out(words[1:], options)], "shortcut", lambda _: None)
    except fire.core.FireExit as stop:
        raise UsageError(_reason(stop.trace.elements[-1].ErrorAsStr(), _usage(words[0], options))) from None
    return calls[0]


def _spell_out(words: Sequence[str], options: Mapping[str, Option]) -> list[str]:
    """Write every option as --name=value, so that nothing is left for fire to guess; refuse what it would pass over."""
    by_flag = {option.flag: option for option in options.values() if not option.positional}
    spelt: list[str] = []
    seen: set[str] = set()
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if not word.startswith("-"):
            spelt.append(word)
            continue
        if flag not in by_flag:
            close = difflib.get_close_matches(flag, by_flag, 1)
            raise UsageError(f"unknown option {flag}" + (f": did you mean {close[0]}?" if close else ""))
        if flag in seen:
            raise UsageError(f"{flag} is given twice")
        seen.add(flag)
        if not equals and by_flag[flag].is_switch:
            value = "True"
        elif not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UsageError(f"{flag} needs a value")
        spelt.append(f"{flag}={value}")
    return spelt


def _reason(complaint: str, usage: str) -> str:
    """What fire found wrong, in the words of this command line."""
    what, _, word = complaint.rpartition(": ")
    return f"{word.upper()} is missing" if "required" in what else f"unexpected argument {word!r} to {usage}"


def _usage(name: str, options: Mapping[str, Option]) -> str:
    return " ".join([name, *(_placeholder(option) for option in options.values() if option.positional), "[options]"])


def _overview() -> str:
    lines = [f"  {name:9}{_summary(verb_of(command))}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: shortcut COMMAND ...",
            "",
            "Rank the decoder blocks of a transformer and write a shorter checkpoint.",
            "",
            *lines,
            "",
            "shortcut COMMAND --help says more. --json prints one JSON document; --version the version.",
        ]
    )


def _summary(known: Verb) -> str:
    return known.about.partition("\n")[0].removesuffix(".")


def _help(known: Verb) -> str:
    """Usage, an example, what the verb does, the options that matter most, and the others by their headings."""
    width = max(60, min(shutil.get_terminal_size().columns, 110))
    lines = [f"usage: shortcut {_usage(known.name, known.options)}", f"such as: {known.example}", "", known.about]
    positional = [name for name, option in known.options.items() if option.positional]
    groups = {"": [known.options[name] for name in (*positional, *known.first)]}
    for name, option in known.options.items():
        if name not in (*positional, *known.first):
            groups.setdefault(f"{option.heading}:", []).append(option)
    for heading, options in groups.items():
        lines += ["", *([heading] if heading else []), *(line for each in options for line in _describe(each, width))]
    return "\n".join([*lines, f"  {'--json':<24}print the result as one JSON document"])


def _describe(option: Option, width: int) -> list[str]:
    """The lines of --help about one option, at most so wide."""
    head = option.name.upper() if option.positional else f"{option.flag} {_placeholder(option)}".rstrip()
    says_nothing = option.required or any(option.default is none for none in (None, False))
    text = textwrap.wrap(option.meaning + ("" if says_nothing else f" [{option.default}]"), width - 26)
    lines = [f"  {head:<24}{text[0]}"] if len(head) < 23 else [f"  {head}", f"{'':26}{text[0]}"]
    return lines + [" " * 26 + line for line in text[1:]]


def _placeholder(option: Option) -> str:
    if option.positional:
        return option.name.upper() if option.required else f"[{option.name.upper()}]"
    literals = [value for kind in option.kinds for value in get_args(kind)]
    names = {int: "N", float: "X", bool: "", Path: "FILE"}
    return "|".join(literals) or next((names[kind] for kind in option.kinds if kind in names), "TEXT")
