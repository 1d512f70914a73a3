"""Text that a model writes itself is as likely as the model says, and what was cut from it can learn from it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.healing import own_text
from shortcut.healing.own_text import starts_of, write_sequences
from shortcut.live.load import load_model, load_tokenizer
from tests.conftest import VOCABULARY
from tests.verbs.test_heal import TEXT
from tests.verbs.test_heal import base as base
from tests.verbs.test_heal import short as short

pytestmark = pytest.mark.thorough

HOW: dict[str, Any] = {"seed": 3, "quiet": True}


def test_as_likely_as_the_model_says(llama: Path, tmp_path: Path) -> None:
    """Of many pairs, second tokens are as frequent as a plain forward pass predicts, whatever the model's own settings.

    The first one is that which ends texts.
    """
    model, tokenizer, count = load_model(llama), load_tokenizer(llama), 20000
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.3  # every token comes up at times
    model.generation_config.update(do_sample=False, top_k=1, temperature=0.1, repetition_penalty=9.0)
    rows = torch.tensor(write_sequences(lambda: model, tokenizer, count, 2, tmp_path, **HOW))
    assert rows.shape == (count, 2)
    with torch.no_grad():
        expected = torch.softmax(model(rows[:, :1]).logits[:, 0].double(), dim=-1).sum(0)
    assert set(rows[:, 0].tolist()) == {tokenizer.eos_token_id}
    often = expected > 5
    assert often.sum() > 50
    assert far_apart(torch.bincount(rows[:, 1], minlength=VOCABULARY).double()[often], expected[often]) < 5


def far_apart(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square, in standard deviations from its mean."""
    freedom = len(counts)
    return (((counts - expected).square() / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


def test_sequences_are_whole(
    checkpoint_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of the length, behind BOS where text is; past the ends of texts; the same again, whatever was lost."""
    monkeypatch.setattr(own_text, "TOKENS_AT_ONCE", 100)
    folder = checkpoint_of("llama", bos=True)
    (tmp_path / "few").mkdir()
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with torch.no_grad():  # all positions alike: the end of a text is as likely as anything
        model.get_output_embeddings().weight.zero_()
    rows = write_sequences(lambda: model, tokenizer, 70, 30, tmp_path, **HOW)
    assert [len(row) for row in rows] == [30] * 70
    assert {len(row) for row in write_sequences(lambda: model, tokenizer, 3, 2, tmp_path / "few", **HOW)} == {2}
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert any(tokenizer.eos_token_id in row[2:-1] for row in rows)
    assert len(set(rows)) == 70
    assert len(list(tmp_path.glob("own*"))) == 24
    assert write_sequences(lambda: pytest.fail("all is there"), tokenizer, 70, 30, tmp_path, **HOW) == rows
    monkeypatch.setattr(own_text, "add_up", lambda _: None)
    for first in (0, 1):  # of two processes each writes every other file
        monkeypatch.setattr(own_text, "share", lambda files, first=first: files[first::2])
        shared = tmp_path / "shared"
        shared.mkdir(exist_ok=True)
        if first:
            assert write_sequences(lambda: model, tokenizer, 70, 30, shared, **HOW) == rows
        else:
            with pytest.raises(FileNotFoundError):  # nobody waited for the other
                write_sequences(lambda: model, tokenizer, 70, 30, shared, **HOW)
            assert len(list(shared.iterdir())) == 12
    monkeypatch.setattr(own_text, "share", lambda files: files)
    (tmp_path / "own-30-0-0000003-3.safetensors").unlink()
    (tmp_path / "own-30-0-0000006-3.safetensors").write_bytes(b"damaged")
    assert write_sequences(lambda: model, tokenizer, 70, 30, tmp_path, **HOW) == rows
    (tmp_path / "other").mkdir()
    assert write_sequences(lambda: model, tokenizer, 70, 30, tmp_path / "other", seed=4, quiet=True) != rows


def test_chats_are_among_it(llama: Path, tmp_path: Path) -> None:
    """Every fourth sequence starts as a user's turn does, and the others with a token that such turns do not have."""
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    tokenizer.chat_template = "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    user = tuple(tokenizer("<s>user: ", add_special_tokens=False)["input_ids"])
    assert starts_of(tokenizer) == [(tokenizer.pad_token_id,)] * 3 + [user]
    rows = write_sequences(lambda: model, tokenizer, 9, 30, tmp_path, **HOW)
    assert sum(row[: len(user)] == user for row in rows) == 2
    assert sum(row[0] == tokenizer.pad_token_id for row in rows) == 7
    assert {len(row) for row in rows} == {30}
    assert set(write_sequences(lambda: model, tokenizer, 8, 3, tmp_path, **HOW)) >= {user[:3]}


def test_sequences_are_made_of_short_texts(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fill it, the last one cut off."""
    monkeypatch.setattr(own_text, "SHORT", 10)
    model, tokenizer = load_model(llama), load_tokenizer(llama)
    rows = write_sequences(lambda: model, tokenizer, 3, 24, tmp_path, **HOW)
    assert [len(row) for row in rows] == [24] * 3
    assert {row[place] for row in rows for place in (0, 10, 20)} == {tokenizer.eos_token_id}
    assert len({row[start : start + 10] for row in rows for start in (0, 10)}) == 6


@pytest.mark.parametrize("method", ["lora", "distill"])
def test_healing_on_own_text(method: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is trained on beside the data, set aside in proportion, and noted; it needs no more data than there is."""
    (tmp_path / "few.txt").write_text("Whales are not fish. " * 20)
    few = {**TEXT, "data": str(tmp_path / "few.txt"), "quiet": False}
    report = shortcut.heal(short, tmp_path / "out", method=method, own=60, **few)
    assert report.check.perplexity < report.cut.perplexity
    told = capsys.readouterr().err
    assert report.changes[0].startswith(f"{method}, also on 60 sequences that the base wrote: ")
    (step,) = json.loads((tmp_path / "out" / "shortcut.json").read_text())["healed"]["steps"]
    assert (step["own"], step["data"]["samples"]) == (60, 17)
    assert f"training on {70 * 24} tokens, with {7 * 24} others set aside" in told
    assert not (tmp_path / "out.training").exists()


def test_only_models_that_write(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model says that cannot is one line; what was written before a full disk is kept."""
    model, tokenizer = load_model(short), load_tokenizer(short)

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("this model\nreads only")

    monkeypatch.setattr(type(model), "generate", refuse)
    with pytest.raises(
        ShortcutError, match="the base cannot write text to learn from: this model reads only; use --own 0"
    ):
        write_sequences(lambda: model, tokenizer, 1, 9, tmp_path, **HOW)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(ShortcutError, match=r"cannot write .*own-9-.*safetensors \(No space left on device\)"):
        write_sequences(lambda: model, tokenizer, 1, 9, tmp_path, **HOW)
    assert not list(tmp_path.glob("own*"))


def test_what_cannot_be_done_leaves_nothing(short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice of an error can be followed: no state of another training is in its way."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ShortcutError("use --own 0")

    monkeypatch.setattr(own_text, "_draw", refuse)
    with pytest.raises(ShortcutError, match="use --own 0"):
        shortcut.heal(short, tmp_path / "out", method="lora", own=3, **TEXT)
    with pytest.raises(ShortcutError, match="cannot set 1 of 2 sequences aside .* use more --samples"):
        shortcut.heal(short, tmp_path / "out", method="lora", **{**TEXT, "samples": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short"]
