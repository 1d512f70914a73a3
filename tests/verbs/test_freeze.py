"""Freezing images from end to end: the command, what it refuses, what it saves, and the demonstration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.material.take import HELDOUT_SAMPLES
from shortcut.records.plan import Base, Plan
from shortcut.surgery.savings import prefill
from shortcut.verbs import demo
from shortcut.verbs.freeze import LISTS
from tests.browser import read_page
from tests.fresh import run_fresh
from tests.hub_server import serve
from tests.vision import FAMILIES, IMAGE, make_inputs, make_vision_model

pytestmark = pytest.mark.thorough

FEW: dict[str, Any] = {"samples": 8, "batch_size": 4, "quiet": True}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model of the package, with images frozen in the four blocks that do least with them."""
    out = tmp_path_factory.mktemp("frozen") / "out"
    shortcut.freeze(EMBEDDED_VISION, out, count=4, **FEW)
    return out


def test_the_road(frozen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores, plan, checkpoint, model card; the blocks are those that score lowest; check confirms it all."""
    config = json.loads((frozen / "config.json").read_text())
    scores = json.loads((frozen / "scores.json").read_text())["halves"]["freeze-visual"]["kl"]
    lowest = sorted(sorted(range(12), key=lambda block: (scores[block], -block))[:4])
    assert config["shortv"] == {"blocks": lowest, "token_ids": [4]}
    assert config["model_type"] == "shortv_llava"
    base, copied = Path(EMBEDDED_VISION) / "model.safetensors", frozen / "model.safetensors"
    assert copied.stat().st_size == base.stat().st_size
    assert "leave the tokens of images as they are" in (frozen / "README.md").read_text()
    assert main(["check", str(frozen), "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "images put back behind its frozen ones by" in text
    assert "right answers:" in text
    again = shortcut.plan(frozen / "scores.json", count=4, allow="freeze-visual")
    assert again.frozen == tuple(lowest)


def test_the_report(frozen: Path) -> None:
    """It says how many answers are right, what of a prompt is saved, and shows questions with image and answers."""
    data, config = read_page(frozen / "report.html"), json.loads((frozen / "config.json").read_text())
    assert data["view"]["title"] == "tiny-llava: 12 of 12 blocks, images frozen in 4"
    assert data["how"]["command"] == (
        f"shortcut freeze {EMBEDDED_VISION} {frozen} --count 4 --samples {FEW['samples']}"
    )
    assert data["view"]["actions"].count("freeze-visual") == 4
    assert [panel["marked"] for panel in data["view"]["panels"]] == [config["shortv"]["blocks"]]
    found = prefill(config["text_config"], config["shortv"]["blocks"], 64, 576)
    columns = data["columns"]
    assert [column["FLOPs of a prompt"] for column in columns.values()] == [found.dense, found.frozen]
    checked = shortcut.check(frozen, samples=64, data="heldout", quiet=True).answers
    assert checked is not None
    assert (columns["base"]["right answers"], columns["shortened"]["right answers"]) == (
        checked.right_base,
        checked.right,
    )
    assert len(data["samples"]) == 6
    for sample in data["samples"]:
        assert sample["images"][0].startswith("data:image/png;base64,")
        assert set(sample["written"]) == {"base", "shortened"}
        assert sample["right"]


def test_it_answers_as_anybody_loads_it(frozen: Path) -> None:
    """AutoProcessor and AutoModelForImageTextToText in another process that cannot see this package."""
    script = f"""
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({str(frozen)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(frozen)!r}, trust_remote_code=True)
image = Image.open({str(frozen.parent / "drawn.png")!r})
content = [{{"type": "image"}}, {{"type": "text", "text": sys.argv[1]}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(image, prompt, return_tensors="pt", add_special_tokens=False)
print(processor.decode(model.generate(**inputs, max_new_tokens=3)[0, inputs["input_ids"].shape[1]:]))
"""
    from shortcut.material.drawings import draw

    drawn = next(drawing for drawing in draw(20, 1) if drawing.kind == "colour")
    drawn.image.save(frozen.parent / "drawn.png")
    assert run_fresh(script, drawn.question, folder=frozen.parent).split()[0] == drawn.answer


PUSH_AND_PULL = """
from transformers import AutoModelForImageTextToText, AutoProcessor
for kind in (AutoModelForImageTextToText, AutoProcessor):
    kind.from_pretrained(sys.argv[1], trust_remote_code=True).push_to_hub("org/frozen")
model = AutoModelForImageTextToText.from_pretrained("org/frozen", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("org/frozen", trust_remote_code=True)
blocks = model.model.language_model.layers
print(type(processor).__name__, [number for number, block in enumerate(blocks) if block.frozen])
"""


def test_pushed_and_pulled(frozen: Path, tmp_path: Path) -> None:
    """push_to_hub takes code and processor along, and by its id the checkpoint loads with the same blocks frozen."""
    (tmp_path / "remote").mkdir()
    with serve("org/frozen", tmp_path / "remote") as hub:
        printed = run_fresh(PUSH_AND_PULL, frozen, folder=tmp_path, hub=hub.url)
    assert (tmp_path / "remote" / "modeling_shortv.py").exists()
    blocks = json.loads((frozen / "config.json").read_text())["shortv"]["blocks"]
    assert printed.strip() == f"LlavaProcessor {blocks}"


def test_without_trust_nothing_loads(frozen: Path) -> None:
    """Never a dense model by mistake."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForImageTextToText.from_pretrained(frozen, trust_remote_code=False)
    assert AutoProcessor.from_pretrained(frozen, trust_remote_code=False) is not None


def test_by_hand_by_ratio_and_by_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is frozen is what was said; blocks may be dropped as well, and the numbers are then those of the result."""
    report = shortcut.freeze(EMBEDDED_VISION, tmp_path / "hand", blocks="11,9-10", drop="8", **FEW)
    assert report.cut.plan.frozen == (9, 10, 11)
    config = json.loads((tmp_path / "hand" / "config.json").read_text())
    assert config["shortv"]["blocks"] == [8, 9, 10]
    assert config["text_config"]["num_hidden_layers"] == 11
    shortcut.cut(tmp_path / "hand", tmp_path / "less", drop="0,9", quiet=True, trust_remote_code=True)
    assert json.loads((tmp_path / "less" / "config.json").read_text())["shortv"]["blocks"] == [7, 8]
    report = shortcut.freeze(EMBEDDED_VISION, tmp_path / "ratio", ratio="60%", select="greedy", **FEW)
    assert len(report.cut.plan.frozen) == 7
    monkeypatch.setitem(LISTS, "llava-1.5-7b", "11,8,10")
    report = shortcut.freeze(EMBEDDED_VISION, tmp_path / "list", preset="llava-1.5-7b", count=2, **FEW)
    assert report.cut.plan.frozen == (8, 11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": "40"}, "no block 40: the model has blocks 0-11"),
        ({"count": 13}, "cannot drop 13 of 12 blocks: 1 to 12 can go"),
        ({"preset": "llava-1.5-7b"}, "no block 12,17-31: the model has blocks 0-11"),
        ({}, "say what is frozen with one of --count, --ratio, --blocks and --preset"),
        ({"count": 2, "blocks": "3"}, "say what is frozen with one of"),
        ({"count": 2, "drop": "3"}, "--drop goes with --blocks"),
        ({"count": 2, "metric": "taylor"}, "taylor is for text, and says nothing of images"),
        ({"count": 2, "data": "none.jsonl"}, "no file none.jsonl"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.freeze(EMBEDDED_VISION, tmp_path / "out", **options, **FEW)
    assert not (tmp_path / "out").exists()


def test_other_ways_to_freeze_wrongly(tmp_path: Path) -> None:
    """Freezing stands alone: it takes no parameters away, and goes with no halves."""
    text: dict[str, Any] = {"samples": 2, "quiet": True}
    with pytest.raises(ShortcutError, match="freezing takes no parameters away"):
        shortcut.score(EMBEDDED_VISION, metric="kl", allow="drop,freeze-visual", **text)
    with pytest.raises(ShortcutError, match="blocks cannot be frozen where others are attention-only"):
        shortcut.cut(EMBEDDED_VISION, tmp_path / "out", freeze_visual="3", mlp_only="4", quiet=True)
    with pytest.raises(ShortcutError, match="the format zeroed knows no freeze-visual blocks"):
        shortcut.cut(EMBEDDED_VISION, tmp_path / "out", freeze_visual="3", format="zeroed", quiet=True)
    with pytest.raises(ShortcutError, match="leave out --chat-template"):
        shortcut.score(EMBEDDED_VISION, metric="kl", data="drawings", chat_template=True, **text)
    shortcut.cut(EMBEDDED_VISION, tmp_path / "short", drop="5", quiet=True)
    with pytest.raises(ShortcutError, match="refitting is fitted on text, not on questions about images"):
        shortcut.heal(tmp_path / "short", tmp_path / "healed", data="drawings", **text)
    with pytest.raises(ShortcutError, match="perplexities say nothing of freeze-visual"):
        shortcut.sweep(EMBEDDED_VISION, allow="freeze-visual", **text)
    with pytest.raises(ShortcutError, match="unknown action 'freeze-text'"):
        Plan.of(Base("", None, 3), {0: "freeze-text"})


def test_text_blocks_are_chosen_with_images(tmp_path: Path) -> None:
    """Dropping blocks of a model that sees, scored on questions about images, and compared by its answers."""
    report = shortcut.prune(
        EMBEDDED_VISION, tmp_path / "out", count=1, metric="kl", data="drawings", heldout="drawings", **FEW
    )
    assert report.check.answers is not None
    assert report.check.answers.questions == HELDOUT_SAMPLES["text"]
    assert report.scores is not None
    assert report.scores.calibration["data"] == "drawings"


@pytest.mark.parametrize(
    ("hidden", "inner", "depth", "visual", "frozen_blocks", "dense", "frozen", "share"),
    [
        (4096, 11008, 32, 576, 19, 8.50, 4.69, 55.2),  # LLaVA-1.5-7B
        (5120, 13824, 40, 576, 24, 16.58, 9.07, 54.7),  # LLaVA-1.5-13B
        (4096, 11008, 32, 2880, 19, 42.67, 21.56, 50.5),  # LLaVA-NeXT-7B
        (5120, 13824, 40, 2880, 24, 81.81, 41.04, 50.2),  # LLaVA-NeXT-13B
    ],
)
def test_published_operations(
    hidden: int, inner: int, depth: int, visual: int, frozen_blocks: int, dense: float, frozen: float, share: float
) -> None:
    """The figures of ShortV's four settings, in TFLOPs, from the configs alone."""
    config = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": depth,
        "num_attention_heads": hidden // 128,
    }
    found = prefill(config, range(frozen_blocks), 64, visual)
    assert (round(found.dense / 1e12, 2), round(found.frozen / 1e12, 2)) == (dense, frozen)
    assert round(100 * found.frozen / found.dense, 1) == share


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mistral3"])
def test_operations_that_are_done(family: str) -> None:
    """torch counts in the blocks what the formula says, with and without freezing, grouped keys and all."""
    model = make_vision_model(FAMILIES[family])
    inputs = make_inputs(model, FAMILIES[family], [[20, IMAGE, 4, IMAGE, 26]])
    visual = int((inputs["input_ids"] == shortcut_ids(model)).sum())
    text = inputs["input_ids"].numel() - visual
    config = model.config.get_text_config().to_dict()

    def operations() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs, use_cache=False, logits_to_keep=1)
        counts = counter.get_flop_counts()
        names = [name for name in counts if name.endswith("language_model")]
        return sum(counts[names[0]].values())

    frozen = (0, 2, 3, 5)
    found = prefill(config, frozen, text, visual)
    assert operations() == pytest.approx(found.dense, rel=0.01)
    with shortcut.preview(model, Plan.of(Base("", None, 6), dict.fromkeys(frozen, "freeze-visual"))):
        assert operations() == pytest.approx(found.frozen, rel=0.01)


def shortcut_ids(model: Any) -> int:
    """The id of tokens of images."""
    return getattr(model.config, "image_token_id", None) or model.config.image_token_index


def test_inspect_says_what_freezing_saves(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything runs; not for models that see nothing."""
    words = ["--frozen", "1,8-11", "--text-tokens", "9", "--visual-tokens", "36"]
    assert main(["inspect", EMBEDDED_VISION, *words]) == 0
    assert "with images frozen in 5 blocks (1,8-11), a prompt of 9 tokens of text and 36" in capsys.readouterr().out
    assert main(["inspect", str(llama), *words]) == 1
    assert "llama sees no images" in capsys.readouterr().err
    assert main(["inspect", EMBEDDED_VISION, "--frozen", "12"]) == 1


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The demonstration: good orders keep most answers right, random ones do not, all frozen costs 20 points."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "COUNTS", (0, 10, 12))
    monkeypatch.setattr(demo, "QUESTIONS", 110)
    assert main(["demo", "--vision", "--quiet", "--json"]) == 0
    curves = json.loads(capsys.readouterr().out)["curves"]
    right = curves["right"]
    drawn = [values[1] for name, values in right.items() if name.startswith("random")]
    assert len(drawn) == 10
    assert right["kl"][1] > 0.8
    assert right["kl"][1] > sum(drawn) / len(drawn) + 0.1
    assert right["kl"][0] - right["kl"][2] > 0.2
    assert (tmp_path / "tiny-llava-frozen" / "curves.png").stat().st_size > 10_000
