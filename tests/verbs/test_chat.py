"""Talking with a model in the terminal."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.material.drawings import draw
from shortcut.records.plan import Base, Plan


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[str, str, str]:
    """An image file, a question about it, and the right answer."""
    drawing = next(drawing for drawing in draw(20, 1) if drawing.kind == "colour")
    drawing.image.save(tmp_path / "drawn.png")
    return str(tmp_path / "drawn.png"), drawing.question, drawing.answer


def test_about_an_image(drawn: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    """The answer is printed, and given as messages."""
    image, question, answer = drawn
    said = shortcut.chat(EMBEDDED_VISION, image=image, prompt=question, new_tokens=4, quiet=True)
    assert [message["role"] for message in said.messages] == ["user", "assistant"]
    assert said.messages[1]["content"] == [{"type": "text", "text": answer}]
    assert answer in capsys.readouterr().out


def test_line_by_line(
    drawn: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line gets an answer, the image is shown once, and an empty line ends it."""
    image, question, _ = drawn
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n{question}\n\n{question}\n"))
    said = shortcut.chat(EMBEDDED_VISION, image=image, new_tokens=2)
    assert len(said.messages) == 4
    assert [sum(part["type"] == "image" for part in message["content"]) for message in said.messages] == [1, 0, 0, 0]
    assert "an empty line ends the conversation" in capsys.readouterr().err


def test_without_a_template(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model without a chat template goes on with the lines."""
    said = shortcut.chat(llama, prompt="one two", new_tokens=3, quiet=True)
    assert isinstance(said.messages[1]["content"], str)
    capsys.readouterr()
    assert main(["chat", str(llama), "--image", "x.png", "--prompt", "a"]) == 1
    assert "sees no images" in capsys.readouterr().err
    assert main(["chat", EMBEDDED_VISION, "--image", __file__, "--prompt", "a"]) == 1
    assert "is no image that can be read" in capsys.readouterr().err
    assert main(["chat", str(llama), "--prompt", "a", "--new-tokens", "0"]) == 1
    assert "--new-tokens 0 is not a positive number" in capsys.readouterr().err


Talk = Callable[..., tuple[list[str], str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Says lines to a model, and gives what it answered and what stderr says."""

    def say(model: Path, *lines: str, **options: Any) -> tuple[list[str], str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        said = shortcut.chat(model, new_tokens=6, **options)
        printed = capsys.readouterr()
        answers = [message["content"] for message in said.messages[1::2]]
        assert "".join(printed.out.split()) == "".join("".join(answers).split())
        return answers, printed.err

    return say


def test_a_plan_is_previewed(llama: Path, tmp_path: Path, talk: Talk) -> None:
    """With --drop or --plan the base says what the cut checkpoint says, from the first line on; nothing is written."""
    shortcut.cut(llama, tmp_path / "short", drop="1,4", quiet=True)
    shortcut.plan(llama, drop="1,4", out=tmp_path / "plan.yaml", quiet=True)
    here = sorted(tmp_path.rglob("*"))
    cut, _ = talk(tmp_path / "short", "one", "two")
    assert talk(llama, "one", "two", drop="1,4")[0] == cut
    assert talk(llama, "one", "two", plan=tmp_path / "plan.yaml")[0] == cut
    assert talk(llama, "one", "two")[0][0] != cut[0]
    assert sorted(tmp_path.rglob("*")) == here


def test_switching(llama: Path, tmp_path: Path, talk: Talk) -> None:
    """/base, /short and /drop change who goes on; the base of a shortened checkpoint is loaded once, when asked for."""
    shortcut.cut(llama, tmp_path / "short", drop="1,4", quiet=True)
    cut, base, other = (talk(llama, "one", **how)[0][0] for how in ({"drop": "1,4"}, {}, {"drop": "0,5"}))
    assert len({cut, base, other}) == 3
    short = tmp_path / "short"
    for model in (llama, short):
        assert talk(model, "/drop 0,5", "one")[0] == [other]
        assert talk(model, "/drop 1,4", "/base", "one", "/quit", "two")[0] == [base]
        assert talk(model, "/drop 1,4", "/base", "/short", "one")[0] == [cut]
    answers, err = talk(short, "/short", "one", "/base", "two", "/short", "/base", "three")
    assert answers[0] == cut
    assert err.count(f"loading {llama}, the base\n") == 1
    assert err.count("now the whole model\n") == 2
    assert err.count("now without 1,4\n") == 2
    assert "loading" not in talk(short, "one")[1]


def test_wrong_commands(llama: Path, talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be done is one line, and the conversation goes on as before."""
    answers, err = talk(llama, "/shrot", "/short", "/drop 9", "/help", "/base 3", "/etc/hosts")
    assert len(answers) == 1
    lines = [line.removeprefix("> ") for line in err.splitlines()]
    assert lines[1].startswith("no command /shrot; /base: the whole model; ")
    assert lines[2] == "nothing is shortened so far: /drop 3,5 leaves out blocks 3 and 5"
    assert lines[3] == "no block 9: the model has blocks 0-6"
    assert lines[4].startswith("/base: the whole model; /short: ")
    assert lines[5].startswith("no command /base 3; ")
    assert main(["chat", str(llama), "--prompt", "a", "--drop", "1", "--plan", "p.yaml"]) == 1
    assert capsys.readouterr().err == "shortcut: say what goes with one of --plan and --drop\n"
    with pytest.raises(ShortcutError, match="the plan is for 5 blocks and the model has 7"):
        shortcut.chat(llama, prompt="a", plan=Plan.dropping(Base("", None, 5), (1,)), quiet=True)
