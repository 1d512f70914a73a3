"""Recipes: a file is a call, its expectation is compared with what came out, and those of the project are sound."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION
from shortcut.choose.rules import parse_candidates
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.options.presets import PRESETS
from shortcut.options.verb import bind
from shortcut.records.block_lists import parse_blocks
from shortcut.verbs.freeze import LISTS
from shortcut.verbs.run import PLANNING, RUNNABLE, OutcomeError
from tests.conftest import DEPTH

RECIPES = sorted(Path(__file__).parents[2].joinpath("recipes").glob("*.yaml"))
EXPECTING = [recipe for recipe in RECIPES if "expect" in yaml.safe_load(recipe.read_text())]
COUNTED = [
    recipe for recipe in EXPECTING if {"parameters", "flops"} & set(yaml.safe_load(recipe.read_text())["expect"])
]
DEPTHS = {
    "smollm2-135m": 30,
    "baffo32/decapoda-research-llama-7B-hf": 32,
    "baichuan-inc/Baichuan2-13B-Base": 40,
    "baichuan-inc/Baichuan2-7B-Base": 32,
    "google/gemma-2b": 18,
    "google/gemma-7b": 28,
    "llava-hf/llava-1.5-13b-hf": 40,
    "llava-hf/llava-1.5-7b-hf": 32,
    "llava-hf/llava-v1.6-vicuna-13b-hf": 40,
    "llava-hf/llava-v1.6-vicuna-7b-hf": 32,
    "lmsys/vicuna-13b-v1.3": 40,
    "lmsys/vicuna-7b-v1.3": 32,
    "meta-llama/Llama-2-13b-hf": 40,
    "meta-llama/Llama-2-7b-hf": 32,
    "meta-llama/Meta-Llama-3-8B": 32,
    "mistralai/Mistral-7B-v0.1": 32,
    "tiny-llava": 12,
}
WIDTHS = {  # of the models whose parameters or operations are published: all are Llamas of one of two sizes
    32: {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
    40: {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40},
}
TOWER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


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
        (
            "command: heal\nshort: s\nout: o\nmethod: fold\nweeks: 3\n",
            r"r\.yaml: unknown option 'weeks': there are short",
        ),
        ("command: dance\n", r"r\.yaml needs an entry command: with one of inspect, plan"),
        ("- 1\n", r"r\.yaml needs an entry command"),
        ("{", r"cannot read the recipe"),
        (
            "command: score\nmodel: m\nexpect: {drop: 3}\n",
            r"r\.yaml: score chooses no blocks: expect goes with plan, cut, prune, freeze",
        ),
        ("command: plan\nexpect: 21-29\n", r"r\.yaml: expect has drop, .*flops, as in {drop: 21-29}, not '21-29'"),
        (
            "command: plan\nexpect: {drop: 3, parameters: 4}\n",
            r"expect has drop, .*-visual, flops, as in .*'drop': 3, ",
        ),
        ("command: cut\nexpect: {parameters: 4}\n", r"r\.yaml: expect has drop, .*parameters, as in"),
        ("command: cut\nexpect: {drop: 3, parameters: 5.5B}\n", r"r\.yaml: expect has drop, .*parameters, as in"),
        ("command: prune\nexpect: {drop: 29-21}\n", r"r\.yaml: the span 29-21 in '29-21' runs backwards"),
        ("command: prune\nexpect:\n", r"r\.yaml: expect has drop, .*parameters, as in .*, not None"),
        ("command: freeze\nexpect: {freeze: 3}\n", r"r\.yaml: expect has drop, .*freeze-visual, flops, .*'freeze': 3"),
        (
            "command: freeze\nexpect: {freeze-visual: 3, flops: 55.2%}\n",
            r"flops goes with freeze-visual, and is the share left .* as in 55\.2% of 64\+576, not '55\.2%'",
        ),
        ("command: cut\nexpect: {drop: 3, flops: 55.2% of 64+576}\n", r"r\.yaml: flops goes with freeze-visual"),
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
    assert capsys.readouterr().out.endswith("\n\nexpected drop 3-5: the same\n")
    assert main(["run", str(write(tmp_path / "r.yaml", **plan, expect={"drop": "4-6"}))]) == 0
    assert capsys.readouterr().out.endswith("\n\nexpected drop 4-6: differs: 3-5\n")


def test_halves_are_no_blocks(llama: Path, tmp_path: Path) -> None:
    """A plan that takes half of another block as well is not the one expected."""
    plan = {"command": "plan", "scores": str(llama), "drop": 3, "attention-only": 5, "expect": {"drop": 3}}
    report = shortcut.run(write(tmp_path / "r.yaml", **plan))
    assert str(report).endswith("\n\nexpected drop 3: the same\nexpected attention-only none: differs: 5")


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
        f"\n\nexpected drop 3,5: the same\nexpected parameters 1: differs: {left}"
    )


def test_a_recipe_can_measure(llama: Path, tmp_path: Path) -> None:
    """What eval finds comes back as it does without a recipe."""
    few: dict[str, Any] = {"samples": 2, "length": 32, "questions": "none", "quiet": True}
    report: Any = shortcut.run(write(tmp_path / "r.yaml", command="eval", model=str(llama), **few))
    expected = shortcut.eval(llama, **few)
    assert report.figures == expected.figures
    assert {**report.settings, "date": ""} == {**expected.settings, "date": ""}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_complete_calls(recipe: Path) -> None:
    """Every recipe that comes with the project names a command and options that it has, and says how to run it."""
    text = recipe.read_text()
    content = yaml.safe_load(text)
    assert f"# Run it with: shortcut run recipes/{recipe.name}\n" in text
    command = RUNNABLE[content.pop("command")]
    content.pop("expect", None)
    assert bind(command, {name.replace("-", "_"): str(value) for name, value in content.items()})


@pytest.mark.parametrize("recipe", EXPECTING, ids=lambda path: path.stem)
def test_expectations_can_be_met(recipe: Path) -> None:
    """The expected blocks are as many as go, there, not protected, and together where the rule takes a span."""
    text = recipe.read_text()
    content = yaml.safe_load(text)
    depth = DEPTHS[content["model"]]
    preset: Any = PRESETS[content["preset"]].options if "preset" in content else {"select": "lowest"}
    assert RUNNABLE[content["command"]] in PLANNING
    assert content["out"] == recipe.stem
    listed = content["expect"]["freeze-visual" if content["command"] == "freeze" else "drop"]
    blocks = parse_blocks(listed, depth)
    assert len(blocks) == content["count"]
    assert set(blocks) <= set(parse_candidates("all", str(preset.get("protect", "none")), depth))
    assert preset["select"] == "lowest" or blocks[-1] - blocks[0] == len(blocks) - 1
    assert f"{content['count']} of its {depth} blocks" in text
    if "\n# Source: " in text:
        assert f"{listed}." in text.replace(", the one expected here", "")


def test_published_lists_have_a_recipe() -> None:
    """What `freeze --preset` freezes is what the recipe of the same model expects of scoring."""
    for name, listed in LISTS.items():
        (recipe,) = (path for path in EXPECTING if path.stem == f"{name}-shortv")
        assert yaml.safe_load(recipe.read_text())["expect"]["freeze-visual"] == listed


def write_headers(model: str, folder: Path) -> None:
    """A checkpoint of a published model's shape, as transformers names its tensors, in a file that is all hole.

    Those of the first Llamas hold a table of frequencies in every block, which their authors do not count.
    """
    depth = DEPTHS[model]
    config: Any = transformers.LlamaConfig(**WIDTHS[depth], num_hidden_layers=depth, vocab_size=32000)
    build: Any = transformers.AutoModelForCausalLM
    if model.startswith("llava-hf/"):
        tower = transformers.CLIPVisionConfig(**TOWER, image_size=336, patch_size=14, projection_dim=768)
        kind = transformers.LlavaNextConfig if "1.6" in model else transformers.LlavaConfig
        config.vocab_size = 32064
        config, build = kind(text_config=config, vision_config=tower), transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        made = build.from_config(config, dtype=torch.float16)
    config.architectures = [type(made).__name__]
    config.save_pretrained(folder)
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    if build is transformers.AutoModelForCausalLM:
        shapes |= {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.Size([64]) for block in range(depth)}
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


@pytest.mark.parametrize("recipe", COUNTED, ids=lambda path: path.stem)
def test_published_figures_hold_without_weights(recipe: Path, tmp_path: Path) -> None:
    """Parameters and operations that a recipe expects are those of its model's shape without the expected blocks."""
    content = yaml.safe_load(recipe.read_text())
    folder = Path(EMBEDDED_VISION)
    if content["model"] != "tiny-llava":
        folder = tmp_path / "base"
        write_headers(content["model"], folder)
    expect = content["expect"]
    blocks = {action: expect[action] for action in ("drop", "freeze-visual") if action in expect}
    cut = {"command": "cut", "model": str(folder), "out": str(tmp_path / "o"), "dry-run": True, **blocks}
    report = shortcut.run(write(tmp_path / "r.yaml", **cut, expect=expect), verify=True)
    assert report.is_same
    for name in {"parameters", "flops"} & set(expect):
        assert report.found[name] == expect[name]


def test_verify_makes_another_outcome_an_error(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --verify the report is printed all the same, and the exit code is 1; without expectation nothing runs."""
    plan = {"command": "plan", "scores": str(llama), "select": "deepest", "count": 3}
    same = write(tmp_path / "same.yaml", **plan, expect={"drop": "3-5"})
    other = write(tmp_path / "other.yaml", **plan, expect={"drop": "4-6"})
    assert main(["run", str(same), "--verify"]) == 0
    assert capsys.readouterr().out.endswith("\n\nexpected drop 3-5: the same\n")
    assert main(["run", str(other), "--verify"]) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("\n\nexpected drop 4-6: differs: 3-5\n")
    assert printed.err == f"shortcut: {other}: expected drop 4-6: differs: 3-5\n"
    assert main(["run", str(other), "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["found"] == {"drop": "3-5"}
    with pytest.raises(OutcomeError, match="expected drop 4-6: differs: 3-5") as caught:
        shortcut.run(other, verify=True)
    assert caught.value.outcome.found == {"drop": "3-5"}
    with pytest.raises(ShortcutError, match=r"bare\.yaml has no entry expect: there is nothing that --verify could"):
        shortcut.run(write(tmp_path / "bare.yaml", **plan), verify=True)


def test_dropped_blocks_take_their_operations_along(tmp_path: Path) -> None:
    """Of 12 blocks, with 64 tokens of text and 36 of images: 8 whole ones, 3 frozen ones, one gone."""
    tokens, text, hidden, inner = 100, 64, 128, 256
    whole = 2 * tokens * (4 * hidden + 3 * inner) * hidden + 4 * tokens**2 * hidden
    keys = 2 * (tokens - text) * 2 * hidden * hidden
    frozen = 2 * text * (4 * hidden + 3 * inner) * hidden + keys + 4 * text * tokens * hidden
    share = f"{(8 * whole + 3 * frozen) / (12 * whole):.1%} of 64+36"
    cut = {"command": "cut", "model": "tiny-llava", "out": str(tmp_path / "o"), "dry-run": True}
    blocks = {"drop": "8", "freeze-visual": "9-11"}
    recipe = write(tmp_path / "r.yaml", **cut, **blocks, expect={**blocks, "flops": "1% of 64+36"})
    assert shortcut.run(recipe).found == {**blocks, "flops": share}


@pytest.mark.thorough
def test_the_small_recipe_comes_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From scores to a checked checkpoint of the model of the package, whose blocks are the expected ones."""
    (recipe,) = (path for path in RECIPES if path.stem == "tiny-llava-freeze")
    monkeypatch.chdir(tmp_path)
    assert main(["run", str(recipe), "--verify", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("expected freeze-visual 3-11: the same\nexpected flops 77.7% of 64+36: the same\n")
    config = json.loads((tmp_path / "tiny-llava-freeze" / "config.json").read_text())
    assert config["shortv"]["blocks"] == list(range(3, 12))


@pytest.mark.thorough
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
    (recipe,) = (path for path in EXPECTING if path.stem == name)
    content = yaml.safe_load(recipe.read_text())
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{i} text " * (i + 9)}) + "\n" for i in range(20)))
    content |= {"model": str(checkpoint_of("llama", num_hidden_layers=32)), "out": str(tmp_path / "o"), "samples": 2}
    content |= {"data": str(tmp_path / "t.jsonl"), "length": 32, "quiet": True}
    report = shortcut.run(write(tmp_path / "r.yaml", **content))
    plan = report.report.cut.plan
    assert len(plan.dropped) == content["count"]
    assert plan.why["preset"] == content["preset"]
    assert report.found["drop"] == plan.to_dict()["drop"]
    assert "\nexpected drop " in str(report)
