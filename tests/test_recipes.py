"""Recipes: a file is a call, its expectation is compared with what came out, and those of the project are sound."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import shortcut
from shortcut.arguments import bind
from shortcut.cli import main
from shortcut.errors import ShortcutError
from shortcut.recipes import RUNNABLE
from tests.conftest import DEPTH

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.yaml"))


def write(path: Path, **content: Any) -> Path:
    """A recipe with these entries."""
    path.write_text(yaml.safe_dump(content))
    return path


def test_run_carries_out_a_recipe(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe is a command with its options by name, spelt with - or _."""
    recipe = {"command": "cut", "model": str(llama), "out": str(tmp_path / "short"), "drop": 3, "max-shard-size": "1GB"}
    assert main(["run", str(write(tmp_path / "r.yaml", **recipe)), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "drops  3" in printed
    assert "expected" not in printed
    assert json.loads((tmp_path / "short" / "config.json").read_text())["num_hidden_layers"] == DEPTH - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "command: prune\nmodel: m\nout: o\ncuont: 3\n",
            r"r\.yaml: unknown option 'cuont': there are model, out, count",
        ),
        ("command: prune\nmodel: m\n", r"r\.yaml: OUT is missing"),
        ("command: prune\nmodel: m\nout: o\ncount: many\n", r"r\.yaml: --count many: needs a whole number"),
        ("command: dance\n", r"r\.yaml needs an entry command: with one of inspect, plan"),
        ("- 1\n", r"r\.yaml needs an entry command"),
        ("{", r"cannot read the recipe"),
        (
            "command: score\nmodel: m\nexpect: {drop: 3}\n",
            r"r\.yaml: score drops no blocks: expect goes with plan, cut",
        ),
        ("command: plan\nexpect: 21-29\n", r"r\.yaml: expect has drop, as in {drop: 21-29}, not '21-29'"),
        ("command: plan\nexpect: {drop: 3, parameters: 4}\n", r"r\.yaml: expect has drop, as in .*, not {'drop': 3, "),
        ("command: cut\nexpect: {parameters: 4}\n", r"r\.yaml: expect has drop and parameters, as in"),
        ("command: cut\nexpect: {drop: 3, parameters: 5.5B}\n", r"r\.yaml: expect has drop and parameters, as in"),
        ("command: prune\nexpect: {drop: 29-21}\n", r"r\.yaml: the span 29-21 in '29-21' runs backwards"),
        ("command: prune\nexpect:\n", r"r\.yaml: expect has drop and parameters, as in .*, not None"),
    ],
)
def test_wrong_recipes_are_refused(content: str, message: str, tmp_path: Path) -> None:
    """A misspelt option, a missing one, a wrong value, another command and what is no YAML are each one line."""
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ShortcutError, match=message) as caught:
        shortcut.run(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_an_expectation_of_a_plan(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report ends with whether the blocks are those expected, whatever their order, and which went instead."""
    plan = {"command": "plan", "scores": str(llama), "select": "deepest", "count": 3}
    assert main(["run", str(write(tmp_path / "r.yaml", **plan, expect={"drop": "5,3,4"}))]) == 0
    assert capsys.readouterr().out.endswith("\n\nexpected blocks 3-5: the same\n")
    assert main(["run", str(write(tmp_path / "r.yaml", **plan, expect={"drop": "4-6"}))]) == 0
    assert capsys.readouterr().out.endswith("\n\nexpected blocks 4-6: differs: 3-5\n")


def test_an_expectation_of_a_cut(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters left are compared too, and --json has what was expected and what came out beside the report."""
    cut = {"command": "cut", "model": str(llama), "out": str(tmp_path / "o"), "drop": "3,5", "dry-run": True}
    expect = {"drop": "3,5", "parameters": 1}
    assert main(["run", str(write(tmp_path / "r.yaml", **cut, expect=expect)), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    left = shortcut.cut(llama, tmp_path / "o", drop="3,5", dry_run=True).parameters_after
    assert printed["expected"] == expect
    assert (
        printed["found"] == {"drop": "3,5", "parameters": left} == {**expect, "parameters": printed["parameters_after"]}
    )
    assert str(shortcut.run(tmp_path / "r.yaml")).endswith(
        f"\n\nexpected blocks 3,5: the same\nexpected parameters 1: differs: {left}"
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete_calls(recipe: Path) -> None:
    """Every recipe that comes with the project names a command and options that it has, and says how to run it."""
    text = recipe.read_text()
    content = yaml.safe_load(text)
    assert f"# Run it with: shortcut run recipes/{recipe.name}\n" in text
    command = RUNNABLE[content.pop("command")]
    content.pop("expect", None)
    assert bind(command, {name.replace("-", "_"): str(value) for name, value in content.items()})
