"""push: what goes to the Hub loads from there, its card tells the truth, and what is wrong is one line."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.modeling import editions
from shortcut.publish.card import PLACEHOLDER, complete_card
from shortcut.publish.results import read_evaluation
from tests.fresh import run_fresh
from tests.hub_server import SHA, Hub, check_card, serve, using
from tests.verbs.test_eval import PIQA, ROLLING, task_of

pytestmark = pytest.mark.thorough

FEW: dict[str, Any] = {"samples": 2, "length": 32, "quiet": True}
ALICE = {"name": "alice", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": "write"}}}
BASE_CARD = """\
---
license: other
license_name: tiny
license_link: LICENSE.md
language: [no, en]
datasets: org/prose
tags: [other]
---
# Tiny
"""


@pytest.fixture(scope="module")
def world(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    """A Hub with the tiny Llama as org/tiny, in many files, and what `prune` made of it without two blocks."""
    folder = tmp_path_factory.mktemp("push")
    base = shutil.copytree(checkpoint_of("llama", sharded=True), folder / "hub" / "tiny")
    (base / "README.md").write_text(BASE_CARD)
    with serve("org/tiny", base) as hub, using(hub, folder):
        shortcut.prune("org/tiny", folder / "short", count=2, samples=2, length=32, quiet=True)
        yield hub, folder / "short"


@pytest.fixture
def hub(world: tuple[Hub, Path]) -> Iterator[Hub]:
    """That Hub with nothing pushed to it, and Alice of org logged in."""
    hub, _ = world
    fresh = Hub({"org/tiny": hub.repositories["org/tiny"]}, hub.url, account=ALICE)
    vars(hub).update(vars(fresh))
    yield hub
    for name in hub.repositories.keys() - {"org/tiny"}:
        shutil.rmtree(hub.repositories[name])


@pytest.fixture
def short(world: tuple[Hub, Path], tmp_path: Path) -> Path:
    """That shortened checkpoint, to do with as one likes."""
    return shutil.copytree(world[1], tmp_path / "short")


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter of a card and its text."""
    card = ModelCard.load(path)
    return card.data.to_dict(), card.text


def test_pushed_loaded_and_cut_again(
    hub: Hub, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes up is the checkpoint; the card's Python, commands, links and entries are right; it can be cut again."""
    (short / ".notes").write_text("mine")
    (short / "old.safetensors").write_text("of another day")
    assert main(["push", str(short), "org/short", "--samples", "2", "--length", "32", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["to"]["url"], report["left_out"]) == (f"{hub.url}/org/short", ["old.safetensors"])
    remote = hub.repositories["org/short"]
    going = {path.name for path in short.iterdir()} - {".notes", "old.safetensors", "report.html"}
    assert {name for name, _ in report["files"]} == {path.name for path in remote.iterdir()} == going
    for name in going - {"README.md"}:
        assert (remote / name).read_bytes() == (short / name).read_bytes()

    assert check_card((remote / "README.md").read_text()) == []
    front, text = read_card(remote / "README.md")
    assert front == {
        "license": "other",
        "license_name": "tiny",
        "license_link": f"{hub.url}/org/tiny/blob/{SHA}/LICENSE.md",
        "language": ["no", "en"],
        "datasets": "org/prose",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["pruned", "layer-pruning", "shortcut"],
        "base_model": "org/tiny",
        "base_model_relation": "finetune",
    }
    links = re.findall(r"\]\((.*?)\)", text)
    assert set(links) == {f"{hub.url}/org/tiny", "scores.png", "plan.yaml", "scores.json", "shortcut.json"}
    assert all((remote / link).exists() for link in links if "://" not in link)
    assert f"{report['check']['perplexity']:.2f}" in text
    assert report["check"]["logit_difference"] == 0

    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code += "import torch\ntorch.save(model(torch.arange(4, 24)[None]).logits, 'logits.pt')\nprint(tokenizer('abc'))"
    assert "input_ids" in run_fresh(code, folder=tmp_path, hub=hub.url)
    with torch.no_grad():
        expected = load_model(short)(torch.arange(4, 24)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)

    (command,) = re.findall(r"```sh\nshortcut (.*?)\n```", text)
    monkeypatch.chdir(tmp_path)
    for words in (shlex.split(command), ["cut", "org/short", "OUT2", "--drop", "0"]):
        assert main([*words, "--quiet"]) == 0
    shortcut.cut(short, tmp_path / "OUT3", drop="0", quiet=True)
    for one, other in (("OUT", "short"), ("OUT2", "OUT3")):
        difference = shortcut.diff(tmp_path / one, tmp_path / other)
        assert difference.matches == tuple(range(len(difference.matches)))
        assert difference.only_one == difference.differing == ()


def test_halves_and_a_base_elsewhere(hub: Hub, tmp_path: Path) -> None:
    """Blocks that lost a half bring their modeling file and say how to load it; a copy of the base checks them too."""
    shortcut.cut("org/tiny", tmp_path / "half", drop="1", attention_only="3", quiet=True)
    shortcut.push(tmp_path / "half", "org/half", **FEW)
    text = read_card(hub.repositories["org/half"] / "README.md")[1]
    assert (hub.repositories["org/half"] / "modeling_hollow.py").exists()
    assert 'AutoModelForCausalLM.from_pretrained("org/half", trust_remote_code=True)' in text
    assert f"\nshortcut cut org/tiny OUT --drop 1 --attention-only 3 --revision {SHA}\n" in text
    assert "1 are deleted and 3 have lost their MLP (`attention-only`); chosen by hand." in text
    copy = str(hub.repositories["org/tiny"])
    assert shortcut.check(tmp_path / "half", base=copy, **FEW).logit_difference == 0
    shortcut.push(tmp_path / "half", "org/half", base=copy, **FEW)
    assert len(hub.commits) == 1  # it is the same to the byte, with the same base in its card


def test_an_interrupted_push_goes_on(hub: Hub, short: Path) -> None:
    """A Hub that fails in the middle has no half a model, and gets what it lacks, once; a third push sends nothing."""
    sizes = [path.stat().st_size for path in short.glob("*.safetensors")]
    hub.accepts = len(sizes) // 2
    with pytest.raises(ShortcutError, match=r"^cannot push to org/short: .*507.*run the same command again[^\n]*$"):
        shortcut.push(short, "org/short", **FEW)
    assert hub.commits == []
    assert 0 < len(hub.sent) <= hub.accepts
    hub.accepts = None
    shortcut.push(short, "org/short", **FEW)
    assert sorted(hub.sent) == sorted(sizes)
    shortcut.push(short, "org/short", **FEW)
    assert (len(hub.sent), len(hub.commits)) == (len(sizes), 1)


def test_another_model_in_its_place(hub: Hub, short: Path, tmp_path: Path) -> None:
    """Weights of an earlier push that no longer belong to the model go; branches and pull requests are served."""
    shortcut.push(short, "org/short", private=True, **FEW)
    assert hub.private == {"org/short"}
    shortcut.cut("org/tiny", tmp_path / "one", drop="1", max_shard_size="5GB", quiet=True)
    for where in ({"revision": "v2"}, {"create_pr": True}):
        report = shortcut.push(tmp_path / "one", "org/short", **where, **FEW)
        old = {path.name for path in short.glob("*.safetensors*")}
        assert set(hub.commits[-1]["deleted"]) == old
        assert old
        assert "model.safetensors" in hub.commits[-1]["files"]
    assert "v2" in hub.branches
    assert [(commit["branch"], commit["pull_request"]) for commit in hub.commits] == [
        ("main", False),
        ("v2", False),
        ("main", True),
    ]
    assert f"pull request {hub.url}/org/short/discussions/1" in str(report)


def test_no_path_of_this_machine_goes_up(hub: Hub, tmp_path: Path) -> None:
    """A base in a folder is called by its name, or by the id on the Hub that --base gives and that was compared."""
    shutil.copytree(hub.repositories["org/tiny"], tmp_path / "Tiny-1.5B")
    shortcut.cut(tmp_path / "Tiny-1.5B", tmp_path / "first", drop="6", quiet=True)
    shortcut.prune(tmp_path / "Tiny-1.5B", tmp_path / "short", count=2, samples=2, length=32, quiet=True)
    shortcut.cut(tmp_path / "first", tmp_path / "twice", drop="2", quiet=True)
    for name, base, called in (
        ("short", None, "Tiny-1.5B"),
        ("short", "org/tiny", "org/tiny"),
        ("twice", None, "first"),
    ):
        hub.repositories.pop("org/new", None)
        shortcut.push(tmp_path / name, "org/new", base=base, **FEW)
        files = hub.commits[-1]["files"]
        assert not [file for file, content in files.items() if str(tmp_path).encode() in content]
        assert json.loads(files["shortcut.json"])["plan"]["base"]["model"] == called
        front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
        assert front.get("base_model") == base
        if name == "short":
            assert yaml.safe_load(files["plan.yaml"])["base"]["model"] == called
            assert json.loads(files["scores.json"])["base"]["model"] == called
        shutil.rmtree(hub.repositories.pop("org/new"))


def test_what_was_written_by_hand_stays(hub: Hub, short: Path) -> None:
    """Text by hand stays and gets the id; entries by hand win, missing ones come; the folder's own card stays as is."""
    card = (short / "README.md").read_text()
    mine = re.sub(r"license: other\n(license_.*\n)+", "license: mit # asked them\n", card).replace(
        "datasets: org/prose\n", ""
    )
    mine += "\nBetter than it looks.\n"
    (short / "README.md").write_text(mine)
    shortcut.push(short, "org/short", **FEW)
    assert (short / "README.md").read_text() == mine
    pushed = (hub.repositories["org/short"] / "README.md").read_text()
    body = mine.split("---\n", 2)[2]
    assert PLACEHOLDER in body
    assert pushed.split("---\n", 2)[2] == body.replace(PLACEHOLDER, "org/short")
    assert pushed.startswith("---\nlicense: mit # asked them\n")
    assert yaml.safe_load(pushed.split("---\n")[1])["datasets"] == "org/prose"


@pytest.fixture
def evaluated(hub: Hub, short: Path, tmp_path: Path) -> Path:
    """That checkpoint with what `eval` found of it, on two tasks whose data might have come from the Hub."""
    lines = [json.dumps({"goal": "a", "sol1": "b", "sol2": letter, "label": 1}) for letter in "cdef"]
    how = {"mine": PIQA, "theirs": PIQA, "prose": ROLLING}
    lines.append(json.dumps({"goal": "a", "sol1": "c", "sol2": "b", "label": 0, "text": "lorem ipsum"}))
    tasks = [task_of(tmp_path, name, lines[-1:] if how[name] is ROLLING else lines, **how[name]) for name in how]
    few: dict[str, Any] = {"questions": "none", "tasks": ",".join(tasks), "out": short / "eval.json"}
    shortcut.eval(short, base=str(hub.repositories["org/tiny"]), **few, **FEW)
    found = json.loads((short / "eval.json").read_text())
    found["settings"]["tasks"]["mine"] |= {"dataset": "org/bench", "config": "hard"}
    found["settings"]["tasks"]["theirs"] |= {"dataset": "org/other"}
    found["settings"]["tasks"]["prose"] |= {"dataset": "org/bench", "config": "easy"}  # no share of right answers
    (short / "eval.json").write_text(json.dumps(found))
    bench = hub.repositories["org/tiny"].with_name("bench")
    bench.mkdir(exist_ok=True)
    listed = [{"id": "bench_easy", "config": "easy"}, {"id": "bench_hard", "config": "hard"}]
    (bench / "eval.yaml").write_text(yaml.safe_dump({"name": "Bench", "tasks": listed}))
    hub.repositories["org/bench"] = bench
    return short


def test_evaluations_go_along(hub: Hub, evaluated: Path, tmp_path: Path) -> None:
    """The card shows them; what was measured on a benchmark of the Hub is in its own format as well, and no path is."""
    found = json.loads((evaluated / "eval.json").read_text())
    shortcut.push(evaluated, "org/short", **FEW)
    remote = hub.repositories["org/short"]
    (entry,) = parse_eval_result_entries(yaml.safe_load((remote / ".eval_results" / "shortcut.yaml").read_text()))
    figures = {row["name"]: row["model"] for row in found["figures"]}
    assert (entry.dataset_id, entry.task_id) == ("org/bench", "bench_hard")
    assert entry.value == round(100 * figures["mine acc"]["value"], 2)
    assert entry.date == found["settings"]["date"]
    assert entry.source_url == f"{hub.url}/org/short/blob/main/eval.json"
    assert entry.notes.startswith("mine acc of lm-evaluation-harness 0.")
    assert str(tmp_path) not in (remote / "eval.json").read_text()
    (table,) = re.findall(
        r"\[eval.json\]\(eval.json\) says on what:\n\n```\n(.*?)```", (remote / "README.md").read_text(), re.S
    )
    head, first, *rest = table.splitlines()
    assert head.split() == ["base", "95", "%", "model", "95", "%"]
    assert first.split()[5] == f"{figures['perplexity']['value']:.2f}"
    assert [row.split()[0] for row in rest[:2]] == ["mine", "theirs"]
    pushed = shutil.copytree(remote, tmp_path / "pushed")
    assert read_evaluation(pushed)["figures"] == found["figures"]  # whoever has it may push it on
    shortcut.cut(evaluated, tmp_path / "twice", drop="0", quiet=True)
    assert not (tmp_path / "twice" / "eval.json").exists()
    (evaluated / "eval.json").unlink()
    shortcut.push(evaluated, "org/short", **FEW)
    assert hub.commits[-1]["deleted"] == [".eval_results/shortcut.yaml", "eval.json"]


def test_evaluations_that_do_not(hub: Hub, evaluated: Path) -> None:
    """Parts of a task are no result of a benchmark; figures of another checkpoint are refused before anything goes."""
    found = json.loads((evaluated / "eval.json").read_text())
    found["settings"]["limit"] = 1
    (evaluated / "eval.json").write_text(json.dumps(found))
    shortcut.push(evaluated, "org/short", **FEW)
    assert not (hub.repositories["org/short"] / ".eval_results").exists()
    shortcut.cut("org/tiny", evaluated, drop="0", overwrite=True, quiet=True)
    (evaluated / "eval.json").write_text(json.dumps(found))
    with pytest.raises(
        ShortcutError, match=r"eval\.json was not measured of this checkpoint: run `shortcut eval` again"
    ):
        shortcut.push(evaluated, "org/other", **FEW)
    assert "org/other" not in hub.repositories


def test_cards_are_completed() -> None:
    """Of the text, only what shortcut itself wrote is replaced; a card without front matter gets one."""
    new = "---\nlicense: mit\nlanguage: 'no'\n---\n\nnew\n<!-- shortcut wrote the text above: 0 -->\n"
    assert complete_card("", new, "org/x") == new
    assert complete_card("mine\n", new, "org/x") == "---\nlicense: mit\nlanguage: 'no'\n---\nmine\n"
    assert complete_card("---\nlicense: [a\n# b\n", new, "org/x").endswith("---\n---\nlicense: [a\n# b\n")
    with pytest.raises(ShortcutError, match="the front matter of README.md is not YAML"):
        complete_card("---\nlicense: [a\n---\nb\n", new, "org/x")


def test_the_card_of_a_healed_checkpoint(hub: Hub, short: Path) -> None:
    """It says that, how and how much; without a card of its own it gets a whole one."""
    (short / "README.md").unlink()
    tensor = read_checkpoint(short).tensors["model.layers.2.mlp.down_proj.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\0" * 40)
    record = json.loads((short / "shortcut.json").read_text())
    (short / "shortcut.json").write_text(
        json.dumps({**record, "healed": {"steps": [{"method": "fold"}], "tensors": [tensor.name]}}, indent=2)
    )
    shortcut.push(short, "org/short", **FEW)
    text = read_card(hub.repositories["org/short"] / "README.md")[1]
    assert "Then it was healed by `fold`: 1 tensors have new values, and every other one is the base's." in text
    assert "nothing was trained" not in text


READS = {**ALICE, "auth": {"accessToken": {"role": "read"}}}
FINE = {**ALICE, "auth": {"accessToken": {"role": "fineGrained"}}}
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "not logged in": ({"HF_TOKEN": ""}, "org/short", "not logged in: log in with `hf auth login`, or set HF_TOKEN"),
    "unknown token": ({"account": None}, "org/short", "the Hub does not know this login: log in with"),
    "may only read": ({"account": READS}, "org/short", "the token of alice may only read: log in with"),
    "no such organisation": ({}, "acme/short", "alice can make models as alice, org, and not as acme"),
    "refused": (
        {"account": FINE, "refused": {"/api/repos/create": (403, "no rights in this namespace")}},
        "acme/short",
        r"the Hub refuses it \(.*no rights in this namespace.*\): log in",
    ),
    "offline": ({"HF_HUB_OFFLINE": True}, "org/short", "HF_HUB_OFFLINE is set"),
    "unreachable": ({"ENDPOINT": "http://127.0.0.1:9"}, "org/short", "the Hub cannot be reached, or was lost"),
    "taken": ({}, "org/tiny", "it holds a model that shortcut did not write: name another"),
    "public": ({}, "org/tiny --private", "it is there already, and public: leave out --private"),
    "no model": ({}, "org/short --create-pr", "there is no such model to open a pull request at"),
    "both": ({}, "org/tiny --create-pr --revision v2", "--create-pr opens a pull request at the main branch"),
    "name": ({}, "org/sh:ort", "a model on the Hub is called org/name, of letters"),
    "no organisation": ({}, "short", "a model on the Hub is called org/name, of letters"),
    "at the end": (
        {"refused": {"/api/models/org/short/commit": (413, "too large")}},
        "org/short",
        "too large.*; run the same command again",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_why_not_in_one_line(
    name: str,
    hub: Hub,
    short: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each mistake is one line and code 1, and no commit is made."""
    changes, line, message = MISTAKES[name]
    for key, value in changes.items():
        if hasattr(hub, key):
            setattr(hub, key, value)
        elif key == "HF_TOKEN":
            monkeypatch.setenv(key, value)
        else:
            monkeypatch.setattr(constants, key, value)
    assert main(["push", str(short), *line.split(), "--samples", "2", "--length", "32", "--quiet"]) == 1
    said = capsys.readouterr()
    assert re.search(message, said.err)
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert hub.commits == []


def test_what_does_not_verify_stays_here(hub: Hub, short: Path, tmp_path: Path) -> None:
    """One wrong byte, or no record of a cut: nothing is made on the Hub, not even an empty repository."""
    tensor = read_checkpoint(short).tensors["model.layers.2.mlp.down_proj.weight"]
    with tensor.file.open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\1")
    with pytest.raises(ShortcutError, match="down_proj"):
        shortcut.push(short, "org/short", **FEW)
    with pytest.raises(ShortcutError, match="has no record .* push is for what shortcut wrote"):
        shortcut.push(hub.repositories["org/tiny"], "org/short", **FEW)
    with pytest.raises(ShortcutError, match="no folder"):
        shortcut.push(tmp_path / "gone", "org/short", **FEW)
    (short / "README.md").write_bytes(b"caf\xe9")
    with pytest.raises(ShortcutError, match=r"cannot read .*README.md: 'utf-8' codec"):
        shortcut.push(short, "org/short", **FEW)
    assert hub.repositories.keys() == {"org/tiny"}
    assert (hub.commits, hub.sent) == ([], [])


OLD = '# Edition 1\n"""An older file."""\n'


@pytest.mark.parametrize("propose", [True, False])
def test_a_modeling_file_is_renewed_on_the_hub(
    propose: bool, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`refresh` of a Hub id uploads that one file, in a commit or as a proposal, and only where it is an old one."""
    shortcut.cut("org/tiny", tmp_path / "half", drop="1", attention_only="3", quiet=True)
    shortcut.push(tmp_path / "half", "org/half", **FEW)
    shutil.rmtree(constants.HF_HUB_CACHE)  # this Hub calls every version by the same name
    words = ["refresh", "org/half", *(["--create-pr"] if propose else [])]
    assert main(words) == 0
    assert "the current one: nothing to do" in capsys.readouterr().out
    (hub.repositories["org/half"] / "modeling_hollow.py").write_text(OLD)
    shutil.rmtree(constants.HF_HUB_CACHE)
    monkeypatch.setattr(editions, "_editions", lambda: {editions.hash_of(OLD): 1})
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert f"modeling_hollow.py of org/half: edition 1 -> edition {editions.EDITION}" in printed
    assert ("pull request" in printed) is propose
    commit = hub.commits[-1]
    assert (commit["branch"], commit["pull_request"]) == ("main", propose)
    assert (list(commit["files"]), commit["deleted"]) == (["modeling_hollow.py"], [])
    if not propose:
        pushed = (hub.repositories["org/half"] / "modeling_hollow.py").read_bytes()
        assert pushed == (tmp_path / "half" / "modeling_hollow.py").read_bytes()
