"""Healing by training: the whole road on tiny models, what stops it, and what it goes on from."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import shortcut
from shortcut.checking import speed
from shortcut.checkpoint.checkpoint import Checkpoint, read_checkpoint
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.healing import loop
from shortcut.healing.loop import Pace, State, order
from shortcut.healing.saved import BEST, STATE
from shortcut.options.presets import HEAL_PRESETS
from tests.conftest import make_tokenizer
from tests.healing.test_refit import cheaper_each_time
from tests.publish.test_report import read_page
from tests.surgery.test_faults import small_disk as small_disk

pytestmark = pytest.mark.thorough

TEXT: dict[str, Any] = {
    "samples": 20,
    "length": 24,
    "quiet": True,
    "learning_rate": 3e-3,
    "rank": 3,
    "questions": "none",
}


@pytest.fixture(scope="module")
def base(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama after half a minute of schooling: it knows letters, and a teacher has to know something."""
    folder = tmp_path_factory.mktemp("schooled") / "base"
    fresh = checkpoint_of("llama", max_position_embeddings=1024)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(fresh), AutoTokenizer.from_pretrained(fresh)
    ids = torch.tensor(tokenizer(files("shortcut").joinpath("data", "calibration.txt").read_text())["input_ids"])
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.3 if weight.dim() > 1 else 1)
    for _ in range(150):
        starts = torch.randint(len(ids) - 32, (16,), generator=generator)
        batch = torch.stack([ids[start : start + 32] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def short(base: Path, tmp_path: Path) -> Path:
    """Without three blocks of seven."""
    shortcut.cut(base, tmp_path / "short", drop="2-3,5", quiet=True)
    return tmp_path / "short"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"method": "lora"}, 4 * 7),
        ({"method": "lora", "tune": "mlp", "dropout": 0.1, "accumulate": 2, "batch_size": 2}, 4 * 3),
        ({"method": "distill", "match": 0.5, "gradient_checkpointing": True}, 4 * 7),
        ({"method": "distill", "top_k": 20, "temperature": 2.0, "full": True}, 4 * 7),
        ({"method": "distill", "tune": "attention", "bf16": True}, 4 * 4),
    ],
    ids=["lora", "half", "matched", "noted", "bf16"],
)
def test_the_road(options: dict[str, Any], changed: int, short: Path, tmp_path: Path) -> None:
    """Projections change and nothing else, SHORT stays as it is, and what comes out is better and sound."""
    before = weights(short)
    report = shortcut.heal(short, tmp_path / "out", **TEXT, **options)
    after = weights(tmp_path / "out")
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == set(report.check.healed)
    assert len(differing) == changed
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(short).items())
    assert report.cut.perplexity > report.check.perplexity
    assert not (tmp_path / "out.training").exists()
    assert shortcut.check(tmp_path / "out", samples=4, length=24, quiet=True).healed == report.check.healed
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    (step,) = json.loads((tmp_path / "out" / "shortcut.json").read_text())["healed"]["steps"]
    assert {**step, **options} == step
    if options.get("bf16"):  # what is stored is not rounded on the way: the change is of low rank
        for name in differing:
            singular = torch.linalg.svdvals((after[name] - before[name]).double())
            assert singular[TEXT["rank"]] < 1e-4 * singular[0]
    assert step["best"] < step["first"]


def test_one_after_the_other(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fold,distill is distill of what fold gave; a healed checkpoint can be trained on, not fitted again."""
    cheaper_each_time(monkeypatch)
    both = shortcut.heal(short, tmp_path / "both", method="fold,distill", **TEXT)
    assert both.methods == ("fold", "distill")
    assert [line.partition(":")[0].partition(",")[0] for line in both.changes] == ["fold", "fold", "distill"]
    fitting = {name: value for name, value in TEXT.items() if name not in ("learning_rate", "rank")}
    cheaper_each_time(monkeypatch)
    shortcut.heal(short, tmp_path / "first", method="fold", **fitting)
    shortcut.heal(tmp_path / "first", tmp_path / "second", method="distill", **TEXT)
    one, other = weights(tmp_path / "both"), weights(tmp_path / "second")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)
    healed = json.loads((tmp_path / "second" / "shortcut.json").read_text())["healed"]
    assert [step["method"] for step in healed["steps"]] == ["fold", "distill"]
    with pytest.raises(ShortcutError, match="second was healed already: refit takes the checkpoint that it was made"):
        shortcut.heal(tmp_path / "second", tmp_path / "third", **fitting)


def test_prune_goes_on_with_healing(base: Path, tmp_path: Path) -> None:
    """One command from the model to the healed checkpoint; its page says how to make it again."""
    (tmp_path / "few.txt").write_text(files("shortcut").joinpath("data", "calibration.txt").read_text()[:2500])
    how: dict[str, Any] = {"data": str(tmp_path / "few.txt"), "samples": 8, "length": 24, "quiet": True}
    report = shortcut.prune(base, tmp_path / "out", count=2, heal="lora", minutes=0.03, own=4, bf16=True, **how)
    assert report.healed is not None
    assert report.check.perplexity == report.healed.cut.perplexity > report.healed.check.perplexity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.txt", "out"]
    page = read_page(tmp_path / "out" / "report.html")
    assert list(page["columns"]) == ["base", "cut", "healed"]
    values = [page["columns"][name]["perplexity"] for name in page["columns"]]
    assert values == [report.check.perplexity_base, report.check.perplexity, report.healed.check.perplexity]
    assert page["how"]["command"].startswith(f"shortcut prune {base} {tmp_path / 'out'} --count 2 --data")
    assert "--heal lora --minutes 0.03 --bf16 --own 4" in page["how"]["command"]
    (step,) = json.loads((tmp_path / "out" / "shortcut.json").read_text())["healed"]["steps"]
    assert (step["own"], step["bf16"]) == (4, True)
    assert page["how"]["changes"] == list(report.healed.changes)
    assert page["scores"] == json.loads((tmp_path / "out" / "scores.json").read_text())
    assert "healed by `lora`" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(
        ShortcutError, match=r"nothing is written; .*bad\.cut holds the shortened checkpoint, not healed"
    ):
        shortcut.prune(base, tmp_path / "bad", drop="0-1", heal="fold", **how)
    assert (tmp_path / "bad.cut" / "config.json").exists()
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ShortcutError, match="--method folding: there are refit, fold, scale, lora, distill"):
        shortcut.prune(base, tmp_path / "other", drop="2", heal="folding", **how)
    with pytest.raises(
        ShortcutError, match="--minutes, --bf16, --learning-rate, --full are for lora and distill, and scale"
    ):
        shortcut.prune(base, tmp_path / "other", drop="2", heal="scale", minutes=1.0, **how)
    with pytest.raises(ShortcutError, match=r"bad\.cut is not empty"):
        shortcut.prune(base, tmp_path / "bad", drop="0-1", heal="fold", **how)
    with pytest.raises(ShortcutError, match="--bf16, --learning-rate, --full and --own say how to heal: name a way"):
        shortcut.prune(base, tmp_path / "other", drop="2", minutes=1.0, **how)


def test_prune_and_heal_take_the_same_revision(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is healed is compared with the revision of the base that was cut."""
    opened: list[tuple[str, str | None]] = []

    def open_on_hub(model: str, revision: str | None = None, **_: Any) -> Checkpoint:
        opened.append((model, revision))
        return replace(read_checkpoint(llama), name="org/tiny", revision="abc123")

    monkeypatch.setattr("shortcut.verbs.prune.open_model", open_on_hub)
    monkeypatch.setattr("shortcut.checkpoint.open.open_model", open_on_hub)
    how: dict[str, Any] = {"samples": 8, "length": 24, "quiet": True}
    with suppress(ShortcutError):  # where random weights are not the better for it
        shortcut.prune("org/tiny", tmp_path / "out", drop="2", revision="v1", heal="fold", **how)
    assert opened == [("org/tiny", "v1"), ("org/tiny", "abc123")]


def test_questions_and_speed(short: Path, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Base, cut and healed answer the same questions; base and healed are timed."""
    lines = [
        {"question": question, "choices": ["of the", "zqx jk"], "answer": place}
        for place, question in ((0, "It was the end"), (0, "He spoke"), (0, "At the door"), (1, "Nobody says"))
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    how = {**TEXT, "questions": str(tmp_path / "q.jsonl"), "check": "full"}
    report = shortcut.heal(short, tmp_path / "out", method="lora", **how)
    found = report.to_dict()
    assert {name: each["share"] for name, each in found["questions"].items()} == dict.fromkeys(
        ("base", "cut", "healed"), 0.75
    )
    assert list(found["speed"]) == ["base", "healed"]
    assert all(value > 0 for speed in found["speed"].values() for value in speed.values())
    assert "questions right" in str(report)
    page = read_page(tmp_path / "out" / "report.html")
    assert page["columns"]["healed"]["questions right"] == 0.75
    with pytest.raises(ShortcutError, match="no file nowhere.jsonl"):
        shortcut.heal(short, tmp_path / "two", method="lora", **{**how, "questions": "nowhere.jsonl"})
    shortcut.cut(checkpoint_of("llama"), tmp_path / "narrow", drop="2", quiet=True)
    with pytest.raises(ShortcutError, match="is longer than the 128 tokens that the model takes"):
        shortcut.heal(tmp_path / "narrow", tmp_path / "two", method="lora", **{**how, "questions": "default"})
    assert not (tmp_path / "two.training").exists()


def test_the_adapter_can_be_kept(short: Path, tmp_path: Path, token_ids: torch.Tensor) -> None:
    """PEFT loads it on top of SHORT, and gives the logits of OUT; cutting OUT leaves it behind."""
    shortcut.heal(short, tmp_path / "out", method="lora", keep_adapter=True, **TEXT)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(token_ids).logits
        plain = AutoModelForCausalLM.from_pretrained(short)
        before = plain(token_ids).logits
        found = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")(token_ids).logits
    torch.testing.assert_close(found, merged, rtol=0, atol=1e-4 * float(merged.abs().max()))
    assert (before - merged).abs().max() > 0.01
    shortcut.cut(tmp_path / "out", tmp_path / "again", drop="1", quiet=True)
    assert not (tmp_path / "again" / "adapter").exists()


def test_halves_and_experts(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Blocks that lost a half are trained in what is left of them; of experts in one tensor only the attention is."""
    shortcut.cut(checkpoint_of("qwen3_moe"), tmp_path / "half", mlp_only="1,4", attention_only="3", quiet=True)
    report = shortcut.heal(tmp_path / "half", tmp_path / "out", method="lora", **TEXT)
    assert report.cut.perplexity > report.check.perplexity
    numbers = {name.split(".")[2] for name in report.check.healed}
    assert numbers == {"0", "2", "3", "5", "6"}  # 1 and 4 have nothing but experts


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_an_interrupted_run_goes_on(
    method: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed twice, at a look and between looks, it ends with the same bytes; with dropout, and over several epochs."""
    how = {**TEXT, "method": method, "dropout": 0.2, "epochs": 2.0, "own": 3 if method == "distill" else 0}
    expected = shortcut.heal(short, tmp_path / "whole", **how)
    real, limits = loop._step, [4, 6]
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)

    def interrupted(*args: Any) -> Any:
        if limits and args[5].step == limits[0]:
            limits.pop(0)
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "_step", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            shortcut.heal(short, tmp_path / "out", **how)
        assert not (tmp_path / "out").exists()
    found = shortcut.heal(short, tmp_path / "out", **{**how, "quiet": False})
    assert "going on from step 6" in capsys.readouterr().err
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert found.check.perplexity == expected.check.perplexity


def test_another_run_is_not_gone_on_with(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More time and another learning rate are welcome, other options are not; nor is a folder of something else."""
    real = loop._step
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)
    monkeypatch.setattr(loop, "_step", lambda *args: pytest.fail("stop") if args[5].step == 3 else real(*args))
    with pytest.raises(pytest.fail.Exception):
        shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)
    monkeypatch.setattr(loop, "_step", real)
    with pytest.raises(ShortcutError, match=r"out\.training holds the state of another training \(of another rank\)"):
        shortcut.heal(short, tmp_path / "out", method="lora", **{**TEXT, "rank": 4})
    (tmp_path / "out.training" / STATE).write_bytes(b"x")
    with pytest.raises(ShortcutError, match=r"state\.pt is damaged"):
        shortcut.heal(short, tmp_path / "out", method="lora", **{**TEXT, "learning_rate": 1e-3, "epochs": 2.0})
    shutil.rmtree(tmp_path / "out.training")
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training" / "mine").touch()
    with pytest.raises(ShortcutError, match="where the state of the training goes, holds something else"):
        shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line; what was good before is kept, and a lower learning rate goes on from there."""
    real = loop.Student.forward
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)

    def spoilt(self: Any, places: Any, batch: Any) -> torch.Tensor:
        loss = real(self, places, batch)
        return loss * float("nan") if (tmp_path / "out.training" / BEST).exists() else loss

    with monkeypatch.context() as patch:
        patch.setattr(loop.Student, "forward", spoilt)
        with pytest.raises(ShortcutError, match=r"the loss is nan at step \d+: use a lower --learning-rate; .* keeps"):
            shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)
    assert not (tmp_path / "out").exists()
    kept = load_file(tmp_path / "out.training" / BEST)
    assert all(tensor.isfinite().all() for tensor in kept.values())
    report = shortcut.heal(short, tmp_path / "out", method="lora", **{**TEXT, "learning_rate": 1e-3})
    assert report.check.perplexity < report.cut.perplexity


def test_a_disk_that_fills_up(short: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and what was kept before stays whole; with room again, the same command goes on."""
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)
    real = loop._step

    def filling(*args: Any) -> Any:
        if args[5].step == 3:
            room = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(b"x" * (room - 9000))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", filling)
        with pytest.raises(ShortcutError, match=r"cannot write .*out\.training keeps what was good before"):
            shortcut.heal(short, small_disk / "out", method="lora", **TEXT)
    assert not list((small_disk / "out.training").glob("*.partial"))
    assert not (small_disk / "out").exists()
    (small_disk / "filler").unlink()
    report = shortcut.heal(short, small_disk / "out", method="lora", **TEXT)
    assert report.check.perplexity < report.cut.perplexity


def test_what_does_not_help_is_not_written(short: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: training ends early, says so, and another one can be tried at once."""
    with pytest.raises(ShortcutError, match=r"training did not lower the perplexity .*: nothing is written"):
        shortcut.heal(short, tmp_path / "out", method="lora", **{**TEXT, "learning_rate": 30.0, "patience": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short"]
    report = shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)
    assert report.check.perplexity < report.cut.perplexity


def test_another_base_is_refused(base: Path, short: Path, tmp_path: Path) -> None:
    """Before anything is trained: afterwards nobody could tell what was changed from what was never the base's."""
    shutil.copytree(base, tmp_path / "other")
    changed = weights(base)
    changed["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(changed, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortcutError, match="differs from the base's"):
        shortcut.heal(short, tmp_path / "out", method="lora", base=str(tmp_path / "other"), **TEXT)
    assert not (tmp_path / "out.training").exists()


def test_infinite_gradients_change_nothing(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite loss with a gradient that is not: as a loss that is not finite, and the state that is kept is sound."""
    real = loop.Student.forward
    monkeypatch.setattr(loop, "SAVE_AFTER", 0)

    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf

    def spoilt(self: Any, places: Any, batch: Any) -> torch.Tensor:
        loss = real(self, places, batch)
        return Steep.apply(loss) if (tmp_path / "out.training" / BEST).exists() else loss

    with monkeypatch.context() as patch:
        patch.setattr(loop.Student, "forward", spoilt)
        with pytest.raises(ShortcutError, match=r"the loss is inf at step \d+: use a lower --learning-rate"):
            shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)
    kept = torch.load(tmp_path / "out.training" / STATE)["weights"]
    assert all(tensor.isfinite().all() for tensor in kept.values())
    shortcut.heal(short, tmp_path / "out", method="lora", **TEXT)


@pytest.mark.parametrize("keeps", [True, False])
def test_models_without_keys_and_values(
    keeps: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A state is timed as a cache is; what keeps neither is healed all the same, and it is said."""
    config = MambaConfig(vocab_size=263, hidden_size=24, state_size=4, num_hidden_layers=4, eos_token_id=2)
    torch.manual_seed(0)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    make_tokenizer().save_pretrained(tmp_path / "mamba")
    shortcut.cut(tmp_path / "mamba", tmp_path / "short", drop="1", quiet=True)
    if not keeps:
        monkeypatch.setattr(speed, "cache_in", lambda _: None)
    report = shortcut.heal(
        tmp_path / "short", tmp_path / "out", method="lora", check="full", **{**TEXT, "learning_rate": 1e-2}
    )
    assert report.check.perplexity < report.cut.perplexity
    assert bool(report.benchmark.speeds) is keeps
    assert ("not measured: " in capsys.readouterr().err) is not keeps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method fold,scale", "one of refit, fold, scale, then one of lora, distill, or one alone"),
        ("--method lora,fold", "one of refit, fold, scale, then one of lora, distill, or one alone"),
        ("--method sft", "--method sft: there are refit, fold, scale, lora, distill"),
        ("--method lora --rank 0", "--rank 0 is not a positive number"),
        ("--method lora --minutes 0", "--minutes 0.0 is not a positive number"),
        ("--method lora --dropout 1", "--dropout 1.0 is not between 0 and 1"),
        ("--method lora --top-k 5", "are for --method distill"),
        ("--method lora --keep-adapter --full", "leave out --full"),
        ("--method fold,lora --keep-adapter", "heal by fold first"),
        ("--method distill --top-k 5 --match 1", "--top-k is to do without them"),
        ("--method lora --tune norms", "choose from all, attention, mlp"),
        ("--method lora --preset alpaca", "choose from shortened-llama, deeper-layers"),
        ("--method lora --data nowhere.txt", "no file nowhere.txt"),
        ("--method lora --dtype float16", "training in float16 loses small gradients"),
        ("--method scale --rank 3", "--rank is for --method lora or distill"),
        ("--method scale --objective cosine", "--objective is for --method fold"),
        ("--method lora --own -1", "--own cannot be negative"),
        ("--method scale --minutes 9", "--minutes is for --method lora or distill"),
        ("--method lora --questions q.jsonl", "--questions are asked by --check full alone"),
        ("--method lora --offload", "--offload is for --method refit or fold or scale"),
        ("--method fold,lora --offload", "--offload is for what trains nothing"),
    ],
)
def test_what_is_refused(
    words: str, message: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit code 1 or 2, nothing written."""
    assert main(["heal", str(short), str(tmp_path / "out"), *words.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short"]


@pytest.mark.parametrize("preset", HEAL_PRESETS)
def test_presets_are_defaults(preset: str, short: Path, tmp_path: Path) -> None:
    """What is given beside a preset wins; its other options count, on text of every kind."""
    lines = [json.dumps({"text": "What one does is what one is, and what one says is not. " * n}) for n in range(9, 30)]
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    how: dict[str, Any] = {"data": str(tmp_path / "few.jsonl"), "length": 64, "tokens": 3000, "learning_rate": 3e-3}
    shortcut.heal(short, tmp_path / "out", preset=preset, questions="none", quiet=True, **how)
    (step,) = json.loads((tmp_path / "out" / "shortcut.json").read_text())["healed"]["steps"]
    options = HEAL_PRESETS[preset].options
    assert step["data"]["samples"] <= options["samples"]
    assert step["data"]["by_document"] == options.get("by_document", False)
    expected = {name: value for name, value in options.items() if name not in {*how, "samples", "by_document"}}
    assert {**step, **expected} == step


def test_the_budget() -> None:
    """Tokens or minutes, whichever is used up first; the learning rate rises, falls, and ends at nothing."""
    pace = Pace(1000, 2.0, 1e-3, 4, 1, 3, 0)
    state = State(tokens=250, seconds=90.0)
    assert state.fraction(pace) == 0.75
    assert replace(state, seconds=0.0).fraction(pace) == 0.25
    assert State(tokens=250).fraction(replace(pace, minutes=None)) == 0.25
    rates = [loop._rate(used / 1000) for used in range(1001)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert (max(rates), top, round(rates[-1], 6)) == (pytest.approx(1, abs=0.01), 50, 0)


def test_every_sequence_comes_once_an_epoch() -> None:
    """Two processes, three passes a step: together all sequences, once each, in another order every time."""
    pace = Pace(1000, None, 1e-3, 2, 3, 3, 5)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        for start in range(0, 24, 12):
            for rank in range(2):
                patch.setenv("RANK", str(rank))
                seen += [place for places in loop._own_places(12, start, pace) for place in places]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert order(12, 5, 0) != order(12, 5, 1)
    assert order(12, 5, 0) != order(12, 6, 0)


@pytest.fixture(scope="module")
def frozen_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of the package with all blocks frozen, which costs it much."""
    from shortcut.checkpoint.open import EMBEDDED_VISION

    folder = tmp_path_factory.mktemp("frozen") / "short"
    shortcut.cut(EMBEDDED_VISION, folder, freeze_visual="0-11", quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "distill"])
def test_images(method: str, frozen_llava: Path, tmp_path: Path) -> None:
    """The text decoder of a frozen model learns from questions with images and answers, and from nothing else."""
    with pytest.raises(ShortcutError, match="--own is text, and this model learns from questions about images"):
        shortcut.heal(frozen_llava, tmp_path / "out", method=method, own=3, samples=9, quiet=True)
    how: dict[str, Any] = {"samples": 176, "batch_size": 8, "rank": 8, "learning_rate": 1e-3, "quiet": True}
    report = shortcut.heal(frozen_llava, tmp_path / "out", method=method, **how)
    assert report.cut.answers is not None
    assert report.check.answers.right > report.cut.answers.right
    (step,) = json.loads((tmp_path / "out" / "shortcut.json").read_text())["healed"]["steps"]
    assert step["best"] < step["first"]


@pytest.mark.slow
def test_two_processes_train_as_one(short: Path, tmp_path: Path) -> None:
    """Each takes half of every step; the result is that of one process with steps twice as large."""
    shortcut.heal(short, tmp_path / "one", method="distill", **TEXT, batch_size=4, own=4)
    argv = ["heal", str(short), str(tmp_path / "two"), "--method", "distill", "--batch-size", "2", "--json"]
    argv += ["--questions", "none", "--samples", "20", "--length", "24", "--learning-rate", "3e-3", "--rank", "3"]
    argv += ["--own", "4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "shortcut"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"] == ["distill"]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    base = weights(short)
    changed = [name for name in one if not torch.equal(one[name], base[name])]
    assert len(changed) == 28
    for name in changed:
        change, other = one[name] - base[name], two[name] - base[name]
        assert (change - other).norm() < 0.02 * change.norm()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["refit", "fold"])
def test_two_processes_fit_as_one(method: str, short: Path, tmp_path: Path) -> None:
    """Each walks with half of the batches; sums and prices are of all."""
    how: dict[str, Any] = {"samples": 24, "length": 24, "own": 8}
    shortcut.heal(short, tmp_path / "one", method=method, quiet=True, **how)
    words = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "shortcut"]
    argv = ["heal", str(short), str(tmp_path / "two"), "--method", method, "--json", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*launch, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two, before = weights(tmp_path / "one"), weights(tmp_path / "two"), weights(short)
    assert sum(not torch.equal(one[name], before[name]) for name in one) >= (4 if method == "refit" else 1)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
