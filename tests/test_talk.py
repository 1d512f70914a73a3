"""Talking with a model in the terminal."""

import io
from pathlib import Path

import pytest

import shortcut
from shortcut.cli import main
from shortcut.scoring.drawings import draw
from shortcut.sources import EMBEDDED_VISION


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
