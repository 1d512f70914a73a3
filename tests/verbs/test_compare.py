"""Models side by side: what the columns say, what the page is told, and the page itself in a real browser."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION, open_model
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_count, format_size
from shortcut.material.drawings import draw
from shortcut.options.groups import Loading
from shortcut.records.plan import Base, Plan
from shortcut.surgery.preview import preview
from shortcut.talk.page import fill, note, serving
from shortcut.talk.side_by_side import Answer, Column, answer_in_turn, load_column, without
from shortcut.talk.speech import ask, speak
from tests.browser import PROGRAM, SECONDS, Browser, browse
from tests.conftest import DEPTH, make_tokenizer
from tests.reference import logits

PROMPT, NEW = "Whales are", 12


def open_column(folder: Path | str) -> Column:
    return load_column(open_model(folder, quiet=True), Loading(device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def columns(
    checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Column, Column, Column]:
    """The tiny Llama, and without blocks 1 and 4, and without block 2."""
    base, home = checkpoint_of("llama"), tmp_path_factory.mktemp("compared")
    for name, drop in (("short", "1,4"), ("shorter", "2")):
        shortcut.cut(base, home / name, drop=drop, quiet=True)
    return open_column(base), open_column(home / "short"), open_column(home / "shorter")


def continuation(model: Any, prompt: str) -> tuple[str, int]:
    """What a model says by a plain loop without cache, and in how many tokens."""
    tokenizer = make_tokenizer()
    ids = start = tokenizer(prompt, return_tensors="pt").input_ids
    while ids.shape[1] - start.shape[1] < NEW and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    new = ids[0, start.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)), len(new)


def test_answers_in_turn(columns: tuple[Column, ...]) -> None:
    """Every column says what its model says alone, a preview what the cut model says; one after the other, growing."""
    base, short, shorter = columns
    asked = [*columns, without(base, [1, 4]), without(base, [2])]
    steps = list(answer_in_turn(asked, PROMPT, new_tokens=NEW))
    expected = [continuation(column.model, PROMPT) for column in (base, short, shorter, short, shorter)]
    assert len({text for text, _ in expected}) == 3
    assert [(answer.text, answer.tokens) for answer in steps[-1]] == expected
    assert all(answer.speed is not None and answer.speed > 0 for answer in steps[-1])
    assert [answer.text for answer in steps[0]] == [""] * 5
    turns = [place for step in pairwise(steps) for place in range(5) if step[0][place] != step[1][place]]
    assert turns == sorted(turns)
    for before, after in pairwise(steps):
        assert all(new.text.startswith(old.text) for old, new in zip(before, after, strict=True))
    assert len(steps) > sum(answer.tokens for answer in steps[-1])  # a step for every token, at least
    assert list(answer_in_turn(asked, " ", new_tokens=NEW)) == steps[:1]


def test_facts(columns: tuple[Column, ...]) -> None:
    """Parameters and memory are those of the weights, and of a preview those of the model that is really cut."""
    for column in columns:
        weights = list(column.model.state_dict().values())
        count, size = sum(each.numel() for each in weights), sum(each.numel() * 4 for each in weights)
        assert column.facts == f"{format_count(count)} parameters, {format_size(size)}"
    base, short, _ = columns
    assert without(base, [1, 4]).facts == short.facts != base.facts


def test_sampling(columns: tuple[Column, ...]) -> None:
    """With a temperature tokens are drawn at random, by torch's seed."""

    def draw_some(seed: int, temperature: float) -> str:
        torch.manual_seed(seed)
        return [*answer_in_turn(columns[:1], PROMPT, new_tokens=NEW, temperature=temperature)][-1][0].text

    assert draw_some(0, 2.0) == draw_some(0, 2.0)
    assert len({draw_some(seed, 2.0) for seed in range(3)}) == 3
    assert draw_some(0, 0.001) == draw_some(0, 0)


def test_nobody_listens(columns: tuple[Column, ...]) -> None:
    """A model stops when its answer is not taken any more, and is as before; what fails while it runs is raised."""
    model, reader, passes = columns[0].model, columns[0].reader, [0]
    counting = model.register_forward_hook(lambda *_: passes.append(1))
    with closing(speak(model, reader, [ask(PROMPT)], new_tokens=100_000)) as pieces:
        next(pieces)
    made = len(passes)
    time.sleep(0.1)
    assert len(passes) == made < 10_000
    counting.remove()
    next(growing := answer_in_turn([without(columns[0], [0])], PROMPT, new_tokens=100_000))
    next(growing)
    growing.close()
    assert continuation(model, PROMPT)[0] == [*answer_in_turn(columns[:1], PROMPT, new_tokens=NEW)][-1][0].text
    wrong = preview(model, Plan.dropping(Base("", None, 5), [1]))
    with pytest.raises(ShortcutError, match="the plan is for 5 blocks and the model has 7"):
        list(speak(model, reader, [ask(PROMPT)], new_tokens=NEW, meanwhile=wrong))


def test_about_an_image(columns: tuple[Column, ...]) -> None:
    """A model that sees answers rightly, a preview of it as well, and one that does not says so; or all answer text."""
    drawing = next(drawing for drawing in draw(20, 1) if drawing.kind == "colour")
    seeing = open_column(EMBEDDED_VISION)
    asked = [seeing, columns[0], without(seeing, [10])]
    answers = [*answer_in_turn(asked, drawing.question, drawing.image, new_tokens=4)][-1]
    assert [answer.text for answer in answers[:2]] == [drawing.answer, "(sees no images)"]
    assert answers[2].tokens > 0
    assert all(answer.tokens for answer in [*answer_in_turn(asked, PROMPT, new_tokens=4)][-1])


def test_what_the_page_shows(columns: tuple[Column, ...]) -> None:
    """Text and note of every column, the preview's last, which is empty while no block is left out."""
    base, short, _ = columns
    *_, last = fill([base, short], base, [], PROMPT, None, NEW, 0)
    text, tokens = continuation(base.model, PROMPT)
    assert last[0] == text
    assert re.fullmatch(rf"{re.escape(base.facts)} · {tokens} tokens, [\d.]+ per second", last[1])
    assert last[4:] == ["", note(None)]
    *_, last = fill([], base, ["4", "1"], PROMPT, None, NEW, 0)
    assert last[0] == continuation(short.model, PROMPT)[0]
    assert last[1].startswith(f"without 1,4 · {short.facts} · ")
    assert list(fill([base], base, ["0"], "", None, NEW, 0)) == [["", base.facts, "", note(without(base, [0]))]]
    assert list(fill([], base, [], PROMPT, None, NEW, 0)) == [["", note(None)]]
    assert [*fill([base], base, [], PROMPT, None, 1, 0)][-1][1].endswith(" · 1 token")
    with pytest.raises(ShortcutError, match="the plan drops all 7 blocks: at least one has to stay"):
        next(fill([base], base, list("0123456"), PROMPT, None, NEW, 0))


def test_the_command(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It loads the models, serves them by names that tell them apart, and ends with Ctrl-C."""
    served: list[Any] = []

    @contextmanager
    def serve(columns: dict[str, Column], *where: Any, **how: Any) -> Iterator[str]:
        served.append((list(columns), *where, how))
        yield "http://here"

    def wait() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shortcut.verbs.compare.find_spec", lambda _: True)
    monkeypatch.setattr("shortcut.verbs.compare.serving", serve)
    monkeypatch.setattr("shortcut.verbs.compare.Event", lambda: SimpleNamespace(wait=wait))
    for folder in (tmp_path / "short", tmp_path / "more" / "short"):
        shortcut.cut(llama, folder, drop="1", quiet=True)
    short, more = str(tmp_path / "short"), str(tmp_path / "more" / "short")
    assert main(["compare", str(llama), short, "--port", "7999", "--open"]) == 0
    assert capsys.readouterr().err == (
        f"loading {llama.name}\nloading short\nhttp://here compares {llama.name}, short; Ctrl-C ends it\n"
    )
    compared = shortcut.compare(llama, short, more, host="localhost", quiet=True)
    assert compared.to_dict() == {"url": "http://here", "models": (str(llama), short, more)}
    assert served == [
        ([llama.name, "short"], "127.0.0.1", 7999, {"browser": True}),
        ([str(llama), short, more], "localhost", 7860, {"browser": False}),
    ]


def test_mistakes(llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every mistake is one line, before any model is loaded."""

    def complaint(*words: str, code: int = 1) -> str:
        assert main(["compare", *words]) == code
        return capsys.readouterr().err

    monkeypatch.setattr("shortcut.verbs.compare.find_spec", lambda _: None)
    assert complaint(str(llama)) == 'shortcut: compare needs gradio: pip install "shortcut[demo]"\n'
    monkeypatch.setattr("shortcut.verbs.compare.find_spec", lambda _: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert re.fullmatch(
            rf"shortcut: cannot serve a page at 127.0.0.1:{port}: .*in use; choose with --host and --port\n",
            complaint(str(llama), "--port", str(port)),
        )
    assert complaint(str(llama), "--port", "99999").startswith("shortcut: cannot serve a page at 127.0.0.1:99999: ")
    assert complaint(str(llama), "./none").startswith("shortcut: no model at ./none: neither a folder, ")
    assert complaint("a", "b", "c", "d", code=2) == (
        "shortcut: unexpected argument 'd' to compare MODEL [SHORT] [OTHER] [options] (shortcut compare --help)\n"
    )


WRITE = """(text => { const area = document.querySelector('#prompt textarea'); area.value = text
area.dispatchEvent(new Event('input', {bubbles: true})) })"""
TEXTS = "[...document.querySelectorAll('.answer textarea')].map(area => area.value)"
NOTES = "[...document.querySelectorAll('.note p')].map(line => line.textContent)"


def see(browser: Browser, code: str, wanted: Callable[[Any], bool]) -> None:
    """Wait until what an expression of JavaScript gives is as it should be."""
    end = time.monotonic() + SECONDS
    while not wanted(found := browser.run(code)):
        assert time.monotonic() < end, f"{code} is {found}"
        time.sleep(0.1)


def see_answers(browser: Browser, *columns: Column | None) -> None:
    """Wait until the page shows what these models say, and nothing for None."""
    there = [column for column in columns if column]
    found = iter([*answer_in_turn(there, PROMPT, new_tokens=NEW)][-1])
    answers = [next(found) if column else Answer() for column in columns]
    texts = [re.sub("\r\n?", "\n", answer.text) for answer in answers]
    see(browser, NOTES, lambda n: all(f" {a.tokens} tokens, " in m for m, a in zip(n, answers, strict=True) if a.text))
    see(browser, TEXTS, lambda found: found == texts)


@pytest.mark.slow
@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium, such as Debian's: apt-get install chromium")
def test_in_a_browser(columns: tuple[Column, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any width columns fill, toggles preview, Clear stops and clears; nothing sticks out or is foreign."""
    pytest.importorskip("gradio", reason='needs gradio: pip install "shortcut[demo]"')
    monkeypatch.setattr("shortcut.talk.page.PAGE_TOKENS", NEW)
    base, short, _ = columns
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = serving({"base": base, "short": short}, "127.0.0.1", port)
    with page as url, browse(tmp_path / "profile") as browser:
        for width in (400, 900, 1600):
            browser.open(url, width, dark=width == 900)
            see(browser, NOTES, lambda found: found == [base.facts, short.facts, note(None)])
            assert browser.run("document.querySelectorAll('#drop input').length") == DEPTH
            browser.run(f"{WRITE}({PROMPT!r})")
            browser.point("#go", click=True)
            see_answers(browser, base, short, None)
            for block, dropped in ((1, [1]), (4, [1, 4])):
                browser.point(f"#drop label:nth-of-type({block + 1}) input", click=True)
                see_answers(browser, base, short, without(base, dropped))
            assert browser.run("document.documentElement.scrollWidth") <= width
        slowed = base.model.register_forward_pre_hook(lambda *_: time.sleep(0.3))
        browser.point("#go", click=True)
        see(browser, NOTES, lambda found: "tokens" in found[0] and "tokens" not in found[1])
        browser.point("#clear", click=True)
        facts = [base.facts, short.facts, note(without(base, [1, 4]))]
        see(browser, NOTES, lambda found: found == facts)
        slowed.remove()
        assert browser.run(TEXTS) == ["", "", ""]
        assert browser.run("document.querySelector('#prompt textarea').value") == ""
        browser.run(f"{WRITE}({PROMPT!r})")
        browser.point("#go", click=True)
        see_answers(browser, base, short, short)
        assert browser.complaints == []
        assert {address for address in browser.requests if not address.startswith((url, "data:"))} == set()
