"""report.html: it says what the records say, needs nothing else, and works as a page: seen through a real browser."""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortcut
from shortcut.checking.benchmark import Benchmark
from shortcut.checking.samples import PROMPTS, SHOWN_QUESTIONS, Sample, as_uri, pair_samples, write_on
from shortcut.checking.speed import Speed
from shortcut.checking.trials import Trial, Trials
from shortcut.cli import _parse
from shortcut.material.drawings import draw
from shortcut.material.pictures import Pair, Pictures
from shortcut.publish.heal_report import HealReport
from shortcut.publish.report import Report, write_report
from shortcut.records.actions import Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan
from shortcut.verbs.demo import Curves, DemoReport, VisionReport
from shortcut.verbs.prune import PruneReport
from tests.browser import PROGRAM, Browser, browse, read_page
from tests.conftest import DEPTH

HOSTILE = (
    """</script><script>document.title='lost'</script><!-- {{script}} " ' & <img src=x onerror=alert(1)> \u2028é"""
)
WIDTHS = (400, 900, 1600)


@pytest.fixture(scope="module")
def pruned(checkpoint_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> PruneReport:
    """What `prune` says of the tiny Llama without two blocks, chosen by the first of two metrics."""
    out, text = tmp_path_factory.mktemp("report") / "short", {"samples": 3, "length": 32}
    base = checkpoint_of("llama")
    return shortcut.prune(base, out, count=2, metric="block-influence,angular", quiet=True, **text)


@pytest.fixture(scope="module")
def full(pruned: PruneReport) -> Report:
    """The same with everything else that a page can show: other actions, trials, images, a hostile name and prompt."""
    page = pruned.page
    actions: dict[int, Action] = {1: "drop", 2: "attention-only", 4: "mlp-only", 5: "last-token"}
    plan = Plan.of(replace(page.plan.base, model=HOSTILE), actions, page.plan.why)
    tried = tuple(
        Trial(rule, HOSTILE, "1-2", 2, 900, 10.0 * 30**n) for n, rule in enumerate(("lowest", "span", "deepest"))
    )
    sample = Sample(HOSTILE, {"base": HOSTILE, "shortened": ""}, HOSTILE, (as_uri(draw(1, 0)[0].image),))
    how = {**page.how, "command": HOSTILE, "changes": [HOSTILE]}
    return replace(page, plan=plan, trials=Trials(HOSTILE, HOSTILE, 1000, 5.0, tried), samples=(sample,), how=how)


def test_it_holds_the_records(pruned: PruneReport) -> None:
    """Plan and scores are those of the files beside it, and every figure is that of the reports."""
    folder = Path(pruned.cut.out)
    data, told = read_page(folder / "report.html"), pruned.to_dict()
    assert data["plan"] == yaml.safe_load((folder / "plan.yaml").read_text())
    assert data["scores"] == json.loads((folder / "scores.json").read_text())
    assert data["trials"] is None
    before, after = data["columns"]["base"], data["columns"]["shortened"]
    for row in ("parameters", "bytes"):
        assert (before[row], after[row]) == (told["cut"][f"{row}_before"], told["cut"][f"{row}_after"])
    assert (before["perplexity"], after["perplexity"]) == (
        told["check"]["perplexity_base"],
        told["check"]["perplexity"],
    )
    assert after["largest difference of logits"] == told["check"]["logit_difference"] == 0
    assert (before["blocks"], after["blocks"]) == (DEPTH, DEPTH - 2)
    key_and_value, heads, width, half_precision = 2, 2, 10, 2
    assert before["KV cache per token"] == DEPTH * key_and_value * heads * width * half_precision
    assert after["KV cache per token"] * DEPTH == before["KV cache per token"] * (DEPTH - 2)
    assert [sample["written"] for sample in data["samples"]] == [s["written"] for s in told["check"]["samples"]]


def test_what_people_read_page(pruned: PruneReport) -> None:
    """Title and first sentence say how much, which blocks and why; panels mark the blocks that went."""
    view, plan = read_page(Path(pruned.cut.out) / "report.html")["view"], pruned.cut.plan
    assert view["title"].endswith(f": {DEPTH - 2} of {DEPTH} blocks")
    blocks = format_blocks(plan.dropped).replace(",", ", ")
    assert f"Blocks {blocks} are deleted: those that score lowest by block-influence" in view["lead"]
    assert "on 3 sequences of 32 tokens (prose that comes with shortcut)" in view["lead"]
    assert view["actions"] == ["drop" if block in plan.dropped else "keep" for block in range(DEPTH)]
    assert pruned.scores is not None
    assert [panel["name"] for panel in view["panels"]] == ["block-influence", "angular"]
    assert [panel["spans"] is None for panel in view["panels"]] == [True, False]
    for panel in view["panels"]:
        assert panel["values"] == list(pruned.scores.of_blocks(panel["name"]))
        assert panel["marked"] == list(plan.dropped)
    rows = {row["name"]: row for row in view["table"]}
    assert rows["blocks"] | {"note": ""} == {"name": "blocks", "note": "", "texts": ["7", "5"], "change": "−28.6%"}
    assert rows["perplexity"]["texts"][1] == f"{pruned.check.perplexity:.2f}"


def test_the_command_makes_it_again(pruned: PruneReport) -> None:
    """Read by the command line, it is the call that was made; what is at its default is not in it."""
    line = pruned.page.how["command"]
    asked = {"count": 2, "metric": "block-influence,angular", "samples": 3, "length": 32}
    call: Any = _parse(shlex.split(line)[1:])
    assert call.keywords == {"model": pruned.cut.plan.base.model, "out": pruned.cut.out, **asked}
    assert call.func is shortcut.prune


def test_samples_are_what_the_models_write(pruned: PruneReport) -> None:
    """Token by token, the most likely one, without a cache; base and result each their own."""
    folders = {"base": pruned.cut.plan.base.model, "shortened": pruned.cut.out}
    assert [sample.prompt for sample in pruned.check.samples] == [beginning for _, beginning in PROMPTS]
    for name, folder in folders.items():
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        for sample in pruned.check.samples:
            ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(4):  # as many as conftest.py has models write
                with torch.no_grad():
                    following = model(input_ids=ids).logits[:, -1:].argmax(-1)
                ids = torch.cat([ids, following], 1)
                if following.item() == model.config.eos_token_id:
                    break
            assert sample.written[name] == tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_a_model_that_cannot_write(pruned: PruneReport, tmp_path: Path) -> None:
    """A context that is full, and a template that refuses the question, cost the samples, not the checkpoint."""
    folder = shutil.copytree(pruned.cut.out, tmp_path / "short")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(write_on(model, folder)) == len(PROMPTS)
    (folder / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert [prompt for prompt, _ in write_on(model, folder)] == [question for question, _ in PROMPTS]
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    assert write_on(model, folder) == []
    (folder / "chat_template.jinja").unlink()
    model.config.max_position_embeddings = 8
    assert write_on(model, folder) == []
    assert pair_samples(SimpleNamespace(), {"base": [("a", "b")], "shortened": []}) == ()  # type: ignore[arg-type]


def test_questions_are_shown_with_their_images() -> None:
    """First those that are not answered alike, each with its image, whatever its size, inside the page."""
    pairs = tuple(Pair((drawn.image,), drawn.question, drawn.answer) for drawn in draw(9, 0))
    pairs = (*pairs[:8], replace(pairs[8], images=(pairs[8].images[0].resize((900, 600)),)))
    pictures = Pictures(None, 0, None, (), pairs)  # type: ignore[arg-type]
    base = [pair.answer or "" for pair in pairs]
    samples = pair_samples(pictures, {"base": base, "shortened": [*base[:4], "no", *base[5:8], "never"]})
    places = [4, 8, 0, 1, 2, 3]
    assert len(samples) == SHOWN_QUESTIONS == len(places)
    assert [(s.prompt, s.right) for s in samples] == [(pairs[n].question, pairs[n].answer) for n in places]
    assert [s.written["shortened"] for s in samples[:2]] == ["no", "never"]
    kinds = [re.match("data:image/(png|jpeg);base64,", sample.images[0])[1] for sample in samples]  # type: ignore[index]
    assert kinds == ["png", "jpeg", *["png"] * 4]
    assert len(samples[1].images[0]) < 20_000


def test_demos_end_with_its_path(pruned: PruneReport) -> None:
    """The last line of both demonstrations names the report."""
    sizes = (pruned.cut.parameters_before, pruned.cut.parameters_after), (1, 1)
    healed = HealReport(pruned.cut.out, ("refit",), (), *sizes, pruned.check, pruned.check, Benchmark({}, {}))
    text = (
        DemoReport(pruned, healed, Speed(1, 2), Speed(3, 4)),
        VisionReport(pruned, Curves(1, (0,), {}, {"random 0": (0.5,)})),
    )
    for report in text:
        path = str(report).splitlines()[-1].removeprefix("the whole report: ")
        assert Path(path).samefile(Path(pruned.cut.out) / "report.html")


class Elements(HTMLParser):
    """All elements of a page, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_needs_no_other_file(pruned: PruneReport, full: Report, tmp_path: Path) -> None:
    """No element, style or script takes anything from anywhere, and hostile text stays text."""
    write_report(tmp_path / "report.html", full)
    tags = None
    for path in (Path(pruned.cut.out) / "report.html", tmp_path / "report.html"):
        text = path.read_text("utf-8")
        elements = Elements(text).found
        assert not [names for _, names in elements if {"src", "href", "srcset", "data", "action"} & set(names)]
        assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in elements}
        assert "default-src 'none'" in text
        page = re.sub(r'id="data">.*?</script>', "", text, flags=re.DOTALL)
        assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)
        tags = tags or [tag for tag, _ in elements]
        assert [tag for tag, _ in elements] == tags
    assert read_page(tmp_path / "report.html") | {"view": None} == json.loads(
        json.dumps({**full.to_dict(), "view": None})
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("needs Chromium, such as Debian's: apt-get install chromium")
    with browse(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def full_page(full: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "report.html"
    write_report(path, full)
    return path


@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits(browser: Browser, pruned: PruneReport, full_page: Path, width: int) -> None:
    """At any width nothing sticks out, nothing is loaded, and the console stays silent; in light and in dark."""
    for path in (Path(pruned.cut.out) / "report.html", full_page):
        for dark in (False, True):
            browser.requests.clear()
            browser.open(path, width, dark=dark)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run("document.querySelectorAll('.strip .block').length") == DEPTH
            assert browser.run("document.querySelectorAll('.facts dt').length") == 6  # the end of the page was reached
            assert {url for url in browser.requests if not url.startswith("data:")} == {path.resolve().as_uri()}
    assert browser.complaints == []


def test_hostile_text_is_shown(browser: Browser, full_page: Path) -> None:
    """Names, prompts and commands appear letter by letter, and nothing of them runs."""
    browser.open(full_page)
    assert browser.run("document.querySelector('h1').textContent").startswith(Path(HOSTILE).name)
    assert browser.run("document.title").startswith("script><!--")
    assert browser.run("document.querySelectorAll('img').length") == 1  # that of the question
    assert browser.run("document.querySelector('.prompt').textContent") == HOSTILE
    assert HOSTILE in browser.run("[...document.querySelectorAll('pre')].map(p => p.textContent)")
    assert browser.run("document.querySelectorAll('tr.best').length") == 1
    assert browser.run("document.querySelectorAll('.legend li').length") == 5
    assert browser.complaints == []


def test_blocks_answer_mouse_and_keys(browser: Browser, pruned: PruneReport) -> None:
    """A block that is pointed at or focused shows its number, what was done to it, and all its scores."""
    browser.open(Path(pruned.cut.out) / "report.html")
    assert pruned.scores is not None

    def reads(block: int) -> None:
        text = browser.run("document.getElementById('readout').textContent")
        assert text.startswith(f"Block {block} {'deleted' if block in pruned.cut.plan.dropped else 'kept'}")
        for name, values in pruned.scores.columns.items():
            shown = float(re.search(rf"{name} (\S+) rank {1 + sorted(values).index(values[block])} of 7", text)[1])
            assert shown == pytest.approx(values[block], rel=1e-3)

    for block in (2, pruned.cut.plan.dropped[0]):
        browser.point(f".block[data-block='{block}']")
        reads(block)
    browser.point(".block[data-block='3']", click=True)
    reads(3)
    for key, block in (("ArrowRight", 4), ("ArrowLeft", 3), ("End", 6), ("ArrowRight", 6), ("Home", 0)):
        browser.press(key)
        reads(block)
        assert browser.run("document.activeElement.getAttribute('aria-label')").startswith(f"block {block}, ")
    browser.point(".bar[data-block='5']")
    reads(5)
    browser.point(".map")
    assert re.search(r"^Blocks? \d", browser.run("document.querySelector('.map + p').textContent"))


def test_the_metric_is_chosen(browser: Browser, pruned: PruneReport) -> None:
    """Bars are those of the metric that is selected, longer where the score is higher, and marked where blocks went."""
    browser.open(Path(pruned.cut.out) / "report.html")
    assert pruned.scores is not None
    for place, name in enumerate(pruned.scores.names):
        browser.run(f"m = document.getElementById('metric'); m.value = {place}; m.dispatchEvent(new Event('change'))")
        values = list(pruned.scores.of_blocks(name))
        assert browser.run("[...document.querySelectorAll('.bar')].map(b => Number(b.dataset.value))") == values
        heights = browser.run("[...document.querySelectorAll('.bar i')].map(b => b.getBoundingClientRect().height)")
        order = sorted(range(DEPTH), key=values.__getitem__)
        assert sorted(heights) == [heights[block] for block in order]
        marked = browser.run("[...document.querySelectorAll('.bar')].map(b => b.classList.contains('marked'))")
        assert marked == [block in pruned.cut.plan.dropped for block in range(DEPTH)]


def test_light_and_dark(browser: Browser, pruned: PruneReport, tmp_path: Path) -> None:
    """It follows the system, the button turns it over, and text is readable on both grounds; it prints."""
    path = Path(pruned.cut.out) / "report.html"
    grounds = []
    for dark in (False, True):
        browser.open(path, dark=dark)
        for _ in range(2):
            style = "getComputedStyle(document.querySelector('%s')).%s"
            ground = luminance(browser.run(style % ("body", "backgroundColor")))
            for part in ("p", ".note", ".glance dt", "th", "a", "button"):
                text = luminance(browser.run(style % (part, "color")))
                low, high = sorted((ground, text))
                assert (high + 0.05) / (low + 0.05) >= 4.5, part  # WCAG 2.2, success criterion 1.4.3
            grounds.append(ground > 0.5)
            browser.point("#theme", click=True)
    assert grounds == [True, False, False, True]
    browser.print(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def luminance(colour: str) -> float:
    """Relative luminance of a colour such as "rgb(12, 34, 56)", from 0 to 1, as WCAG defines it."""
    channels = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
