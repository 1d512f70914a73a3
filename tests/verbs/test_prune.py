"""prune, and what it leaves behind."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import shortcut
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.records.plan import read_plan
from shortcut.records.scores import read_scores
from tests.conftest import DEPTH

SMALL = ["--samples", "3", "--length", "32", "--quiet"]


def test_prune_leaves_everything_behind(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, tokenizer, plan, scores, picture, record and card are in OUT; the plan is what the scores say."""
    out = tmp_path / "short"
    argv = ["prune", str(llama), str(out), "--count", "2", "--metric", "block-influence,angular", *SMALL, "--json"]
    assert main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "plan.yaml", "scores.json", "scores.png", "report.html", "shortcut.json"),
    }
    plan, scores = read_plan(out / "plan.yaml"), read_scores(out / "scores.json")
    values = scores.of_blocks("block-influence")
    assert plan.dropped == tuple(sorted(sorted(range(DEPTH), key=values.__getitem__)[:2]))
    assert plan.why["calibration"] == scores.calibration
    assert plan.to_dict() == printed["cut"]["plan"] == json.loads((out / "shortcut.json").read_text())["plan"]
    assert printed["check"]["logit_difference"] == 0
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert f"{DEPTH - 2} of {DEPTH} blocks" in card.text
    assert f"{printed['check']['perplexity']:.2f}" in card.text


def test_prune_and_the_stations_agree(llama: Path, tmp_path: Path) -> None:
    """score, plan and cut one by one give the same weights as prune."""
    options = {"samples": 3, "length": 32, "quiet": True}
    pruned = shortcut.prune(llama, tmp_path / "a", ratio="30%", select="span", metric="angular", **options)
    scores = shortcut.score(llama, metric="angular", **options)
    plan = shortcut.plan(scores, ratio="30%", select="span")
    shortcut.cut(llama, tmp_path / "b", plan=plan, quiet=True)
    assert pruned.cut.plan == plan
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    gone = 1 - pruned.cut.parameters_after / pruned.cut.parameters_before
    assert gone >= 0.3 > gone - scores.block_parameters[0] / scores.parameters


def test_prune_on_conversations_and_prose(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores and plan record every domain, without what was set aside; a model without a chat template is refused."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "word " * 99}]}) + "\n")
    data, out = f"3*{tmp_path}/chats.jsonl,default", tmp_path / "short"
    argv = ["--count", "2", "--select", "lowest,span", "--samples", "8", "--length", "32", "--quiet", "--data", data]
    assert main(["prune", str(llama), str(out), *argv, "--chat-template"]) == 1
    assert (
        capsys.readouterr().err == "shortcut: the model's tokenizer has no chat template: leave out --chat-template\n"
    )
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert main(["prune", str(base), str(out), *argv, "--chat-template"]) == 0
    record = read_plan(out / "plan.yaml").why["calibration"]
    assert record == read_scores(out / "scores.json").calibration
    assert (record["data"], record["chat_template"], record["samples"]) == (data, True, 8)
    assert record["domains"] == [
        {"data": f"{tmp_path}/chats.jsonl", "weight": 3, "samples": 6},
        {"data": "default", "weight": 1, "samples": 2},
    ]
    assert (out / "chat_template.jinja").exists()
    assert "perplexity on heldout text by the chat template" in (out / "README.md").read_text().lower()


def test_prune_without_scores(llama: Path, tmp_path: Path) -> None:
    """Blocks by hand, and the deepest, need no scoring and leave no scores."""
    by_hand = shortcut.prune(llama, tmp_path / "a", drop="1,5", quiet=True, length=32)
    deepest = shortcut.prune(llama, tmp_path / "b", count=2, select="deepest", quiet=True, length=32)
    assert (by_hand.cut.plan.dropped, deepest.cut.plan.dropped) == ((1, 5), (4, 5))
    assert by_hand.scores is deepest.scores is None
    assert not (tmp_path / "a" / "scores.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "40"], "cannot drop 40 of 7 blocks: 1 to 6 can go"),
        (["--count", "4", "--protect", "plus"], "cannot drop 4 of 7 blocks: 1 to 1 can go"),
        (["--drop", "40"], "no block 40: the model has blocks 0-6"),
        (["--count", "2", "--metric", "importance"], "unknown metric 'importance': there are block-influence,"),
        (["--count", "2", "--device", "cuda:7"], "no device 'cuda:7' on this machine: there are cpu"),
        (["--count", "2", "--dtype", "int3"], "unknown dtype 'int3': there are auto,"),
        (["--count", "2", "--data", "gone.txt"], "no file gone.txt"),
        (["--count", "2", "--ratio", "25%"], "say what goes with one of --count, --ratio and --drop"),
        ([], "say what goes with one of --count, --ratio and --drop"),
        (["--ratio", "99%"], "cannot remove 99.00% of the parameters: the blocks that may go hold"),
        (["--count", "2", "--max-shard-size", "5 apples"], "cannot read the size '5 apples'"),
    ],
)
def test_prune_says_what_is_wrong(
    options: list[str], message: str, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each mistake is one line on stderr and exit code 1, and nothing is written."""
    assert main(["prune", str(llama), str(tmp_path / "short"), *options, *SMALL]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_check_that_fails_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the shortened model is not what it should be, OUT does not appear."""
    monkeypatch.setattr("shortcut.checking.verify.LOGIT_TOLERANCE", -1.0)
    with pytest.raises(ShortcutError, match="this family cannot be cut exactly"):
        shortcut.prune(llama, tmp_path / "short", drop="1", quiet=True, length=32)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_only_what_shortcut_wrote(llama: Path, tmp_path: Path) -> None:
    """--overwrite puts the new result in place of the old; a folder of somebody else is never touched."""
    out = tmp_path / "short"
    shortcut.cut(llama, out, drop="1", quiet=True)
    with pytest.raises(ShortcutError, match="is not empty: name another folder, or --overwrite it"):
        shortcut.cut(llama, out, drop="1-2", quiet=True)
    shortcut.cut(llama, out, drop="1-2", overwrite=True, quiet=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == DEPTH - 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    with pytest.raises(ShortcutError, match="was not written by shortcut"):
        shortcut.cut(llama, tmp_path / "mine", drop="1", overwrite=True, quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"short", "mine"}
