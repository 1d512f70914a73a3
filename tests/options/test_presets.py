"""Presets: each is what its options say one by one, as defaults, in every command that has some of them."""

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import pytest

import shortcut
from shortcut.cli import COMMANDS, main
from shortcut.common.errors import ShortcutError
from shortcut.options.groups import Ranking
from shortcut.options.presets import PRESETS
from shortcut.options.verb import bind, verb

TEXT: dict[str, Any] = {"samples": 2, "length": 24, "quiet": True}


def of(name: str, command: str) -> dict[str, Any]:
    """The options of a preset that a command has."""
    return {
        key: value for key, value in PRESETS[name].options.items() if key in signature(COMMANDS[command]).parameters
    }


@pytest.mark.parametrize("name", PRESETS)
def test_options_are_what_the_command_line_takes(name: str) -> None:
    """Every value of a row can be written behind the option of that name, and is read as the same value."""
    options = PRESETS[name].options
    assert {"metric", "select"} <= set(options) or set(options) == {"keep"}
    assert bind(
        COMMANDS["prune"], {"model": "m", "out": "o", **{key: str(value) for key, value in options.items()}}
    ) == {
        "model": "m",
        "out": "o",
        **options,
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if "keep" not in PRESETS[name].options])
def test_a_preset_is_its_options(name: str, llama: Path) -> None:
    """Scores and plan by a preset are those by its options, and both say which preset it was."""
    extra = {"greedy": 1} if name == "sleb" else {}
    scores = shortcut.score(llama, preset=name, **TEXT, **extra)  # type: ignore[arg-type]
    expected = shortcut.score(llama, **{**of(name, "score"), **TEXT, **extra})
    assert scores.settings == {**expected.settings, "preset": name}
    assert (scores.metrics, scores.orders) == (expected.metrics, expected.orders)
    assert scores.settings["average"] == PRESETS[name].options.get("average", "tokens")
    plan = shortcut.plan(scores, count=1, preset=name)  # type: ignore[arg-type]
    assert plan.dropped == shortcut.plan(expected, count=1, **of(name, "plan")).dropped
    assert plan.why.items() >= {"preset": name, **of(name, "plan")}.items()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["shortened-llama", "short-transformers", "sleb"])
def test_prune_by_preset(name: str, llama: Path, tmp_path: Path) -> None:
    """prune by a preset drops what its options drop, on its own text where the row has figures for it."""
    small = {**TEXT, **{key: value for key, value in of(name, "prune").items() if key in TEXT}}
    given = {key: value for key, value in small.items() if key not in of(name, "prune")}
    pruned = shortcut.prune(llama, tmp_path / "a", count=1, preset=name, **given)  # type: ignore[arg-type]
    expected = shortcut.prune(llama, tmp_path / "b", count=1, **{**small, **of(name, "prune")})
    assert pruned.cut.plan.why == {**expected.cut.plan.why, "preset": name}
    assert pruned.cut.plan.dropped == expected.cut.plan.dropped
    assert pruned.cut.plan.why["calibration"]["samples"] == small["samples"]


@pytest.mark.parametrize(("name", "dropped"), [("distilbert", (1, 3, 5)), ("distil-whisper", (1, 2, 3, 4, 5))])
def test_presets_of_places(name: Any, dropped: tuple[int, ...], llama: Path) -> None:
    """Those that keep blocks by their place need no scores, and say which preset it was."""
    plan = shortcut.plan(llama, preset=name)
    assert plan.dropped == dropped
    assert plan.why == {"preset": name}
    with pytest.raises(ShortcutError, match=f"the preset {name} is not for this command: all it says is keep"):
        shortcut.score(llama, preset=name)


def test_sweep_by_preset(llama: Path) -> None:
    """sweep leaves blocks out one by one where the preset does."""
    trials = shortcut.sweep(llama, count="1-2", preset="sleb", **TEXT)
    expected = shortcut.sweep(llama, count="1-2", select="greedy", metric="perplexity", **TEXT)
    assert trials.as_csv() == expected.as_csv()


def test_what_is_given_wins() -> None:
    """An option that is given is not the preset's, even where it is given what the command would take by default."""

    @dataclass(frozen=True, kw_only=True)
    class Options(Ranking):
        metric: str = "l2"
        samples: Annotated[int, "how many"] = 16

    @verb(Options, example="", presets=PRESETS)
    def command(asked: Options) -> tuple[Any, ...]:
        return asked.preset, asked.metric, asked.samples

    assert command() == (None, "l2", 16)
    assert command(preset=None, samples=3) == (None, "l2", 3)
    assert command(preset="shortened-llama") == ("shortened-llama", "perplexity", 10)
    assert command(preset="shortened-llama", metric="l2", samples=16) == ("shortened-llama", "l2", 16)


def test_unknown_presets(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that there is not is one line with those that there are: wrong usage on the command line."""
    with pytest.raises(ShortcutError, match="unknown preset 'best': there are shortgpt, shortx, deeper-layers, "):
        shortcut.score("m", preset="best")  # type: ignore[arg-type]
    assert main(["prune", "m", "o", "--preset", "best"]) == 2
    assert "--preset best: choose from shortgpt, shortx, deeper-layers, " in capsys.readouterr().err


def test_sleb_needs_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    """score by a preset that leaves blocks out one by one says that it has to be told how many."""
    assert main(["score", "m", "--preset", "sleb"]) == 1
    said = capsys.readouterr().err
    assert said == "shortcut: the preset sleb leaves blocks out one by one: say how many with --greedy N\n"
