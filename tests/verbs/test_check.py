"""The check passes what is right, and fails on anything that is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shortcut
from shortcut.checking.perplexity import perplexity
from shortcut.checking.speed import measure_speed
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.material.calibration import Calibration, make_batches, make_calibration
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from tests.conftest import make_tokenizer
from tests.reference import bypassed

SMALL = {"samples": 4, "length": 32, "quiet": True}


def plain_perplexity(model: torch.nn.Module, calibration: Calibration) -> float:
    """Token by token, sequence by sequence."""
    losses = []
    for row in calibration.sequences:
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
        losses += [-chances[i, row[i + 1]].item() for i in range(len(row) - 1)]
    return float(torch.tensor(losses).mean().exp())


def test_perplexity_equals_a_plain_loop(llama: Path, tmp_path: Path) -> None:
    """Packed and padded batches of any size give the perplexity of a loop over tokens."""
    model = load_model(llama)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "lorem " * n}) + "\n" for n in range(1, 8)))
    for source, by_document in ((Source(), False), (Source(str(tmp_path / "a.jsonl")), True)):
        calibration = make_calibration(make_tokenizer(), source, samples=5, length=30, by_document=by_document)
        expected = plain_perplexity(model, calibration)
        for batch_size in (1, 2, 5):
            assert perplexity(model, make_batches(calibration, batch_size)) == pytest.approx(expected, rel=1e-5)


def test_perplexity_in_low_precision_is_float32_arithmetic(llama: Path) -> None:
    """Of a bfloat16 model too, the losses of its logits are taken and added up in float32."""
    model = load_model(llama, Loading(dtype="bfloat16"))
    calibration = make_calibration(make_tokenizer(), Source(), samples=3, length=30)
    assert perplexity(model, make_batches(calibration, 1)) == pytest.approx(
        plain_perplexity(model, calibration), rel=1e-5
    )


def test_a_perplexity_that_is_no_number_fails(llama: Path) -> None:
    """Logits with NaN are one line that says so, not the largest perplexity there is."""
    model = load_model(llama)
    with torch.no_grad():
        model.lm_head.weight[9, 0] = float("inf")
    batches = make_batches(make_calibration(make_tokenizer(), Source(), samples=1, length=9), 1)
    with pytest.raises(ShortcutError, match=r"the model gives NaN or infinity in torch\.float32"):
        perplexity(model, batches)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_check_reports_both_models(family: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """A right cut passes with equal logits, and the perplexities are those of the base and of the bypassed base."""
    folder = checkpoint_of(family)
    shortcut.cut(folder, tmp_path / "short", drop="2,3", quiet=True)
    report = shortcut.check(tmp_path / "short", **SMALL)
    heldout = make_calibration(make_tokenizer(), Source("heldout"), samples=4, length=32)
    base = load_model(folder)
    assert report.perplexity_base == pytest.approx(plain_perplexity(base, heldout), rel=1e-5)
    with bypassed(base, (2, 3)):
        assert report.perplexity == pytest.approx(plain_perplexity(base, heldout), rel=1e-5)
    assert report.logit_difference == 0
    assert report.bytes_compared == sum(t.nbytes for t in load_file(tmp_path / "short/model.safetensors").values())
    assert "heldout text, 4 sequences of 32 tokens, without BOS" in str(report)


def test_check_without_a_record_only_loads(llama: Path) -> None:
    """A checkpoint that shortcut did not write is loaded and measured; a base to compare it with is refused."""
    report = shortcut.check(llama, **SMALL)
    assert (report.base, report.perplexity_base, report.logit_difference) == (None, None, None)
    with pytest.raises(ShortcutError, match="has no record"):
        shortcut.check(llama, base=str(llama), **SMALL)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("value", r"the tensor model\.layers\.1\.mlp\.up_proj\.weight differs from the base's model\.layers\.2\.mlp"),
        ("missing", r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"),
        ("extra", r"should not have the tensor extra"),
        ("other base", r"the plan is for 7 blocks and .* has 5"),
        ("config", r"the logits differ from the base with its blocks bypassed by"),
        ("shape", r"does not load whole: 1[0-9] mismatched keys, such as|transformers cannot load"),
    ],
)
def test_check_fails_on_damage(damage: str, message: str, llama: Path, tmp_path: Path) -> None:
    """One changed, missing or added tensor, another base, and a config that changes the arithmetic are each found."""
    short = tmp_path / "short"
    shortcut.cut(llama, short, drop="1", quiet=True)
    tensors, config = load_file(short / "model.safetensors"), json.loads((short / "config.json").read_text())
    base: str | None = None
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "value":
        tensors[name][0, 0] += 1
    elif damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["extra"] = torch.zeros(1)
    elif damage == "other base":
        base = str(tmp_path / "other")
        shortcut.cut(llama, base, drop="1,2", quiet=True)
    elif damage == "config":
        config["rms_norm_eps"] = 0.5
    else:
        config["intermediate_size"] = 59
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShortcutError, match=message) as caught:
        shortcut.check(short, base=base, **SMALL)
    assert "\n" not in str(caught.value)


def test_check_finds_blocks_in_the_wrong_order(llama: Path, tmp_path: Path) -> None:
    """Two blocks that changed places load without a complaint; the check names the first tensor that is not right."""
    short = tmp_path / "short"
    shortcut.cut(llama, short, drop="6", quiet=True)
    swap = {"2": "3", "3": "2"}
    tensors = load_file(short / "model.safetensors")
    parts = {name: name.split(".") for name in tensors}
    swapped = {
        ".".join([*p[:2], swap.get(p[2], p[2]), *p[3:]]) if p[1] == "layers" else name: tensors[name]
        for name, p in parts.items()
    }
    save_file(swapped, short / "model.safetensors", metadata={"format": "pt"})
    load_model(short)
    with pytest.raises(ShortcutError, match=r"the tensor model\.layers\.2\..* differs from"):
        shortcut.check(short, **SMALL)


@pytest.mark.parametrize(
    ("name", "copied", "kind"),
    [
        ("model.layers.4.mlp.up_proj.weight", None, "missing"),
        ("model.layers.7.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight", "unexpected"),
    ],
)
def test_a_model_that_does_not_load_whole_is_refused(
    name: str, copied: str | None, kind: str, llama: Path, tmp_path: Path
) -> None:
    """A missing tensor, or one of a block too many, stops the loading: transformers itself would go on without."""
    folder = shutil.copytree(llama, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    if copied is None:
        del tensors[name]
    else:
        tensors[name] = tensors[copied].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortcutError, match=rf"does not load whole: 1 {kind} keys, such as {re.escape(name)}"):
        load_model(folder)


def test_speed_measures_every_model(llama: Path) -> None:
    """Both speeds are positive and finite, one entry per model, and the models stay as they were."""
    models = [load_model(llama), load_model(llama)]
    speeds = measure_speed(models, prompt=16, new_tokens=3, runs=2)
    assert len(speeds) == 2
    for speed in speeds:
        assert 0 < speed.prefill < float("inf")
        assert 0 < speed.decode < float("inf")
