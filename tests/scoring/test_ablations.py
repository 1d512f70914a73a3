"""Metrics that take blocks out, and metrics of weights, equal hooks on the whole model, loops and plain autograd."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.material.calibration import Calibration, make_batches
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from shortcut.records.actions import Move
from shortcut.records.scores import perplexity_of
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.greedy import Removal, remove_greedily
from shortcut.scoring.metrics import METRICS, Metric, add_metric
from shortcut.scoring.walk import AS_IT_IS, walk
from tests.conftest import DEPTH, FAMILIES
from tests.reference import blocks_of, bypassed, logits, scores_of
from tests.sweep.tiny import tiny_model
from tests.verbs.test_score import sequences_of

pytestmark = pytest.mark.thorough

OF_LOGITS = [metric for metric in METRICS.values() if metric.needs == "logits"]
OF_WEIGHTS = [metric for metric in METRICS.values() if metric.needs in ("gradients", "weights")]


def plain_divergence(p: list[float], q: list[float]) -> float:
    """KL(p ‖ q) of two lists of log probabilities."""
    return math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))


def ablate_plainly(model: Any, rows: list[torch.Tensor]) -> dict[str, list[float]]:
    """All metrics of logits by a forward pass of the whole model for every sequence and block."""

    def log_probabilities(row: torch.Tensor) -> list[list[float]]:
        return torch.log_softmax(logits(model, row[None])[0].double(), -1).tolist()

    scores: dict[str, list[float]] = {metric.name: [] for metric in OF_LOGITS}
    whole = [log_probabilities(row) for row in rows]
    for block in range(len(blocks_of(model))):
        with bypassed(model, [block]):
            without = [log_probabilities(row) for row in rows]
        pairs = [list(zip(p, q, strict=True)) for p, q in zip(whole, without, strict=True)]
        for name, swap in (("kl", False), ("kl-reverse", True)):
            every = [[plain_divergence(*((q, p) if swap else (p, q))) for p, q in pair] for pair in pairs]
            scores[name].append(math.fsum(values[-1] for values in every) / len(every))
            together = [value for values in every for value in values]
            scores[f"{name}-all"].append(math.fsum(together) / len(together))
        losses = [-q[i][row[i + 1]] for q, row in zip(without, rows, strict=True) for i in range(len(row) - 1)]
        scores["perplexity"].append(math.exp(math.fsum(losses) / len(losses)))
    return scores


def differentiate_plainly(model: Any, rows: list[torch.Tensor]) -> dict[str, list[float]]:
    """taylor and magnitude by autograd on the whole model."""
    total = sum(len(row) - 1 for row in rows)
    model.zero_grad()
    for row in rows:
        output = torch.log_softmax(model(input_ids=row[None], use_cache=False).logits[0, :-1], -1)
        (-output.gather(1, row[1:, None]).sum() / total).backward()
    blocks = [list(block.parameters()) for block in blocks_of(model)]
    taylor = [sum((w * w.grad).abs().sum().item() for w in block if w.grad is not None) for block in blocks]
    magnitude = [sum(w.abs().sum().item() for w in block) for block in blocks]
    model.zero_grad()
    return {"taylor": taylor, "magnitude": magnitude}


@pytest.mark.parametrize("family", FAMILIES)
def test_ablations_equal_a_hooked_model(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Every metric of logits, every block: sequences of several lengths in batches against one pass each."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(9, 5, 7)
    scores = scores_of(model, make_batches(calibration, 2), OF_LOGITS)
    expected = ablate_plainly(model, [torch.tensor(row) for row in calibration.sequences])
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], tuple(values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_autograd(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Block by block with checkpoints in between, as one backward pass through the whole model; no trace is left."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(9, 5, 7)
    scores = scores_of(model, make_batches(calibration, 2), OF_WEIGHTS)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    expected = differentiate_plainly(model, [torch.tensor(row) for row in calibration.sequences])
    for name, values in expected.items():
        torch.testing.assert_close(scores[name], tuple(values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_log_probabilities_are_float32_whatever_the_type(dtype: str, llama: Path) -> None:
    """Of logits in low precision as well, the probabilities of all tokens add up to 1."""
    decoder = Decoder.of(load_model(llama, Loading(dtype=dtype)))
    with torch.inference_mode():
        *_, last = walk(decoder, make_batches(sequences_of(13), 1)[0])
        predicted = decoder.predict(last.after[0])
    assert (str(last.after.dtype), predicted.dtype) == (f"torch.{dtype}", torch.float32)
    torch.testing.assert_close(predicted.exp().sum(-1), torch.ones(13), rtol=0, atol=1e-5)


def test_gradients_of_many_batches_add_up(checkpoint_of: Callable[..., Path]) -> None:
    """The same text 600 times over has the gradient of one: a sum in bfloat16 would stand still after 256 of them."""
    model = load_model(checkpoint_of("llama", num_hidden_layers=2), Loading(dtype="bfloat16"))
    (batch,) = make_batches(sequences_of(5), 1)
    once, often = (scores_of(model, [batch] * times, [METRICS["taylor"]])["taylor"] for times in (1, 600))
    torch.testing.assert_close(often, once, rtol=0.02, atol=0)


@pytest.mark.parametrize("room", [1, 20, 10_000])
def test_block_passes_are_the_fewest(room: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L (L + 1) / 2 passes of a batch through a block for L ablations, however many streams go through at once."""
    monkeypatch.setattr("shortcut.scoring.walk.TOKENS_PER_CALL", room)
    model = load_model(llama)
    decoder = Decoder.of(model)
    (batch,) = make_batches(sequences_of(5, 5), 2)
    passes: list[int] = []
    for block in decoder.blocks:
        block.mlp.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    ablated: dict[Move, torch.Tensor] = {}
    with torch.inference_mode():
        list(walk(decoder, batch, ablated=ablated))
    assert sum(passes) == len(batch.ids) * DEPTH * (DEPTH + 1) // 2
    assert max(passes) <= max(len(batch.ids), room // 5)
    assert sorted(ablated) == sorted([AS_IT_IS, *(Move(block) for block in range(DEPTH))])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("kl", r"the model without block 0 gives NaN or infinity in torch\.float32"),
        ("perplexity", r"the model without block 0 gives NaN or infinity in torch\.float32"),
        ("taylor", "the gradients of block 6 are not finite"),
    ],
)
def test_logits_that_overflow_fail_the_run(metric: str, message: str, llama: Path) -> None:
    """States that are finite, and predictions that are not: no score comes out, least of all the largest there is."""
    model = load_model(llama)
    with torch.no_grad():
        model.lm_head.weight[9, 0] = float("inf")
    with pytest.raises(ShortcutError, match=message):
        scores_of(model, make_batches(sequences_of(5, 5), 1), [METRICS[metric]])


def test_perplexity_has_no_end() -> None:
    """A model that is sure of the wrong token still has a perplexity that a file can hold."""
    assert perplexity_of(2.0) == math.exp(2)
    assert perplexity_of(10_000.0) == 1e308
    assert perplexity_of(709.0) < 1e308


def test_a_metric_of_ones_own(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten lines of Python make a metric that every command knows; a name cannot be taken twice."""
    monkeypatch.setattr("shortcut.scoring.metrics.METRICS", dict(METRICS))
    own = Metric("l1", lambda x, y: (y - x).abs().sum(-1), "states", "all", "‖y - x‖₁", "this test")
    add_metric(own)
    with pytest.raises(ShortcutError, match="there is a metric 'l1' already"):
        add_metric(own)
    model = load_model(llama)
    (batch,) = make_batches(sequences_of(5), 1)
    scores = scores_of(model, [batch], [own])["l1"]
    with torch.inference_mode():
        steps = list(walk(Decoder.of(model), batch))
    assert scores == pytest.approx([(step.after - step.before).abs().sum(-1).mean().item() for step in steps])


def test_the_parts_are_compared_with_the_whole(llama: Path) -> None:
    """Where the parts do not make up the whole, scores by them would be wrong: that is found before."""
    model = load_model(llama)
    assert Decoder.of(model).fault is None
    model.model.norm.register_forward_hook(lambda _, args, output: output * (1 + 9 * (args[0].shape[1] > 1)))
    assert "what they give differs" in (Decoder.of(model).fault or "")


@pytest.mark.parametrize("family", ["openai-gpt", "modernbert-decoder", "falcon", "nemotron_h"])
def test_families_of_other_builds_are_walked(family: str) -> None:
    """Blocks that return lists, decoders found by their blocks, blocks of several kinds."""
    model = tiny_model(family, "causal").eval()
    rows = [torch.tensor([5, 9, 7, 3, 8, 6]), torch.tensor([4, 8, 6, 9])]
    sequences = tuple(tuple(row.tolist()) for row in rows)
    calibration = Calibration(Source(), 6, 0, False, False, sequences, (0,) * len(sequences))
    scores = scores_of(model, make_batches(calibration, 1), [METRICS["perplexity"], METRICS["kl-all"]])
    expected = ablate_plainly(model, rows)
    for name, values in scores.items():
        torch.testing.assert_close(values, tuple(expected[name]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("glm_moe_dsa", "what they give differs by"),
        ("xlnet", r"their states are \(8, 1, 32\), not"),
        ("gemma3n_text", "index 1 is out of bounds"),
        ("prophetnet", "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_families_whose_blocks_hand_on_more(family: str, fault: str) -> None:
    """The whole model runs for every ablation then, with the same scores; what needs single blocks is one line."""
    model = tiny_model(family, "causal").eval()
    decoder = Decoder.of(model)
    assert re.search(fault, decoder.fault or "")
    rows = [torch.tensor([5, 9, 7, 3, 8, 6]), torch.tensor([4, 8, 6, 9, 3, 5])]
    sequences = tuple(tuple(row.tolist()) for row in rows)
    batches = make_batches(Calibration(Source(), 6, 0, False, False, sequences, (0, 0)), 2)
    scores = scores_of(model, batches, [METRICS["perplexity"], METRICS["kl-all"]])
    expected = ablate_plainly(model, rows)
    for name, values in scores.items():
        torch.testing.assert_close(values, tuple(expected[name]), rtol=1e-4, atol=1e-5)
    (((block, _), score),) = remove_greedily(
        decoder, batches, METRICS["perplexity"], Removal(1, range(len(decoder.blocks)))
    )
    assert score == pytest.approx(min(expected["perplexity"]), rel=1e-4)
    assert block == expected["perplexity"].index(min(expected["perplexity"]))
    for name, allow in (("taylor", ("drop",)), ("kl", ("mlp-only",))):
        with pytest.raises(ShortcutError, match=f"needs blocks that run one by one, and those of {family} do not"):
            score_blocks(decoder, batches, [METRICS[name]], allow=allow)


def test_states_that_are_no_tokens_by_width() -> None:
    """Metrics of states are refused where the states are of another shape, with what can be used instead."""
    model = tiny_model("gemma3n_text", "causal").eval()
    batches = make_batches(sequences_of(6), 1)
    with pytest.raises(ShortcutError, match=r"the states between blocks are \(.*\), not .*: use kl or perplexity"):
        scores_of(model, [Batch(batches[0].ids % 60, batches[0].mask)], [METRICS["l2"]])


def test_models_that_need_more_than_text() -> None:
    """A model that cannot run without an image is one line."""
    with pytest.raises(ShortcutError, match="kosmos-2 cannot be run on text alone"):
        Decoder.of(tiny_model("kosmos-2", "image-text").eval())
