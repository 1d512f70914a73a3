"""Recipes: a file is a call, its expectation is compared with what came out, and those of the project are sound."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import shortcut
from shortcut.arguments import bind
from shortcut.choose.rules import parse_candidates
from shortcut.cli import main
from shortcut.errors import ShortcutError
from shortcut.presets import PRESETS
from shortcut.recipes import DROPPING, RUNNABLE
from shortcut.records.blocks import parse_blocks
from tests.conftest import DEPTH

RECIPES = sorted(Path(__file__).parent.parent.joinpath("recipes").glob("*.yaml"))
PUBLISHED = [recipe for recipe in RECIPES if "expect" in yaml.safe_load(recipe.read_text())]
DEPTHS = {
    "baffo32/decapoda-research-llama-7B-hf": 32,
    "baichuan-inc/Baichuan2-13B-Base": 40,
    "baichuan-inc/Baichuan2-7B-Base": 32,
    "google/gemma-2b": 18,
    "google/gemma-7b": 28,
    "lmsys/vicuna-13b-v1.3": 40,
    "lmsys/vicuna-7b-v1.3": 32,
    "meta-llama/Llama-2-13b-hf": 40,
    "meta-llama/Llama-2-7b-hf": 32,
    "meta-llama/Meta-Llama-3-8B": 32,
    "mistralai/Mistral-7B-v0.1": 32,
}


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
        ("command: prune\nmodel: m\nout: o\npreset: best\n", r"r\.yaml: --preset best: choose from shortgpt, "),
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


def test_halves_are_no_blocks(llama: Path, tmp_path: Path) -> None:
    """A plan that takes half of another block as well is not the one expected."""
    plan = {"command": "plan", "scores": str(llama), "drop": 3, "attention-only": 5, "expect": {"drop": 3}}
    report = shortcut.run(write(tmp_path / "r.yaml", **plan))
    assert str(report).endswith("\n\nexpected blocks 3: differs: 3, attention-only 5")


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


@pytest.mark.parametrize("recipe", PUBLISHED, ids=lambda path: path.stem)
def test_expectations_can_be_met(recipe: Path) -> None:
    """The published blocks are as many as go, there, not protected, and together where the rule takes a span."""
    text = recipe.read_text()
    content = yaml.safe_load(text)
    preset, depth = PRESETS[content["preset"]].options, DEPTHS[content["model"]]
    assert RUNNABLE[content["command"]] in DROPPING
    assert content["out"] == recipe.stem
    blocks = parse_blocks(content["expect"]["drop"], depth)
    assert len(blocks) == content["count"]
    assert set(blocks) <= set(parse_candidates("all", str(preset.get("protect", "none")), depth))
    assert preset["select"] == "lowest" or blocks[-1] - blocks[0] == len(blocks) - 1
    assert f"{content['expect']['drop']}." in text.replace(", the one expected here", "")
    assert f"{content['count']} of its {depth} blocks" in text


@pytest.mark.parametrize(
    "name",
    [
        "llama-2-7b-shortgpt",
        "mistral-7b-deeper-layers",
        "llama-3-8b-short-transformers",
        "vicuna-7b-shortened-llama-perplexity",
        "vicuna-7b-shortened-llama-taylor",
    ],
)
def test_published_recipes_run(name: str, tmp_path: Path, checkpoint_of: Any) -> None:
    """With a small random model of the same depth and little text in place of theirs, recipes run to the comparison."""
    (recipe,) = (path for path in PUBLISHED if path.stem == name)
    content = yaml.safe_load(recipe.read_text())
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{i} text " * (i + 9)}) + "\n" for i in range(20)))
    content |= {"model": str(checkpoint_of("llama", num_hidden_layers=32)), "out": str(tmp_path / "o"), "samples": 2}
    content |= {"data": str(tmp_path / "t.jsonl"), "length": 32, "quiet": True}
    report = shortcut.run(write(tmp_path / "r.yaml", **content))
    plan = report.report.cut.plan
    assert len(plan.dropped) == content["count"]
    assert plan.why["preset"] == content["preset"]
    assert report.found["drop"] == plan.to_dict()["drop"]
    assert "\nexpected blocks " in str(report)
