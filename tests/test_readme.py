"""The README speaks of what is there: commands parse, Python runs, make targets exist, tables are complete."""

import json
import re
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION
from shortcut.cli import COMMANDS, _parse, main
from shortcut.family.known import read_families
from shortcut.live.load import load_model
from shortcut.options.presets import PRESETS
from shortcut.records.block_lists import parse_blocks
from shortcut.scoring.metrics import METRICS
from tests.conftest import DEPTH

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = rf"(?:`|^)shortcut ((?:{'|'.join(COMMANDS)})\b[^`\n#]*)"
SPELT = sorted(set(re.findall(COMMAND, README, re.MULTILINE)))


@pytest.mark.parametrize("line", [line.strip() for line in SPELT if "..." not in line])
def test_commands_parse(line: str) -> None:
    """Every command line of the README is one that the command line accepts, to the last option."""
    assert callable(_parse(shlex.split(line)))


@pytest.mark.thorough
def test_the_table_of_commands_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, each on what those before it wrote, with small models, counts and texts in place of those named.

    Rows that wait for somebody, and `push`, `heal` and `demo`, have tests of their own.
    """
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": llama, "A": llama, "OUT": "out", "B": "out", "VLM": EMBEDDED_VISION, "7": 2, "19": 4}
    named |= {"1-12": "1-2", "recipe.yaml": ROOT / "recipes" / "tiny-llava-freeze.yaml"}
    small = dict.fromkeys(("score", "check", "prune", "sweep", "eval"), "--samples 2 --length 32")
    small |= {"freeze": "--samples 8 --overwrite", "speed": "--prompt 8 --new-tokens 2 --runs 2 --warm-up 1"}
    small |= {"prune": f"{small['prune']} --overwrite", "eval": f"{small['eval']} --questions none"}
    ran = set()
    for line in re.findall(r"^\| `shortcut ([^`]*)`", README, re.MULTILINE):
        command, *words = shlex.split(line)
        if command in ("push", "heal", "demo", "chat", "compare"):
            continue
        if command == "freeze":
            words[1] = "frozen"
        if command == "refresh":
            words[0] = "frozen"
        words = [str(named.get(word, word)) for word in words]
        quiet = ["--quiet"] if command in ("score", "check", "prune", "freeze", "sweep", "eval", "speed", "run") else []
        assert main([command, *words, *small.get(command, "").split(), *quiet]) == 0, line
        ran.add(command)
    assert len(ran) == len(COMMANDS) - 5
    assert (tmp_path / "scores.png").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == DEPTH - 2


def test_every_command_and_metric_is_in_the_readme() -> None:
    """No command and no metric is missing from the tables."""
    assert {name for name in COMMANDS if f"`shortcut {name}" in README} == set(COMMANDS)
    assert {name for name in METRICS if f"| `{name}` |" in README} == set(METRICS)


def test_families_are_as_in_the_readme() -> None:
    """The table of what the sweep found has a row for every task, and their sum in the words above it."""
    families = read_families()
    rows = [f"| {' | '.join(map(str, row))} |" for row in families.by_task]
    assert "\n".join(rows) in README
    sums = [sum(int(str(row[place])) for row in families.by_task) for place in range(1, 5)]
    words = " ".join(README.split())
    said = f"of {len(families.rows)} pairs of family and task, {sums[0]} exact, {sums[1]} exact but for blocks that are"
    assert f"{said} refused, {sums[2]} refused, {sums[3]} untried, none silently different" in words


def test_presets_are_as_in_the_readme() -> None:
    """The table of presets has every row, with its options, what goes by it, and its source."""
    rows = [
        f"| `{name}` | {', '.join(f'{option} {value}' for option, value in p.options.items())} | {p.why} | {p.source} |"
        for name, p in PRESETS.items()
    ]
    assert "\n".join(rows) in README


def test_make_targets_exist() -> None:
    """Every make target that the README names is in the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)\b", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_python_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of the README runs as written, on a small model in place of the named one."""
    code, _, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for name in ("score", "check"):
        command = getattr(shortcut, name)
        small = {"samples": 2, "length": 32, "quiet": True}
        monkeypatch.setattr(shortcut, name, lambda *a, command=command, small=small, **k: command(*a, **k, **small))
    model = load_model(llama)
    inputs = {"input_ids": model.dummy_inputs["input_ids"], "max_new_tokens": 2}
    code = code.replace("org/model", str(llama)).replace("count=7", "count=2").replace("shorter", str(tmp_path / "s"))
    exec(code, {"model": model, "inputs": inputs})
    assert (tmp_path / "s" / "config.json").exists()


@pytest.mark.thorough
def test_python_about_images_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does that about images, on the small model of the package with blocks frozen."""
    monkeypatch.chdir(tmp_path)
    _, code, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    shortcut.cut(EMBEDDED_VISION, "frozen", freeze_visual="8-11", quiet=True)
    found: dict[str, Any] = {name: getattr(transformers, name) for name in re.findall(r"\bAuto\w+", code)}
    exec(code.replace("[30, 31]", "[10, 11]"), found)
    assert found["model"].config.shortv["blocks"] == [10, 11]


def test_a_metric_of_ones_own(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that which adds a metric: its blocks are those that it scores lowest."""
    _, _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setattr("shortcut.scoring.metrics.METRICS", dict(METRICS))
    monkeypatch.setattr(shortcut, "prune", partial(shortcut.prune, samples=2, length=32, quiet=True))
    code = code.replace("org/model", str(llama)).replace("count=7", "count=2").replace("shorter", str(tmp_path / "s"))
    exec(code, {"shortcut": shortcut})
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())["metrics"]["drift"]
    plan = yaml.safe_load((tmp_path / "s" / "plan.yaml").read_text())
    assert sorted(scores.index(score) for score in sorted(scores)[:2]) == list(parse_blocks(str(plan["drop"])))
