"""Scores equal plain loops over hooked models, whatever the batching, the padding and the family."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.material.calibration import Calibration, make_batches
from shortcut.material.documents import Source
from shortcut.options.groups import Loading
from shortcut.scoring.metrics import METRICS, block_influence, cosine, pairwise_cosines, pick_metrics
from shortcut.scoring.walk import walk
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.reference import angle, mean_over_tokens, scores_of, states_around_blocks
from tests.reference import cosine as plain_cosine

ALL = [metric for metric in METRICS.values() if metric.needs != "pairs"]  # those need more tokens than are here
BEFORE_AND_AFTER = [metric for metric in ALL if metric.needs in ("states", "spans")]
PER_TOKEN = {
    "block-influence": lambda x, y: 1 - plain_cosine(x, y),
    "relative-magnitude": lambda x, y: ((y - x).norm() / y.norm()).item(),
    "l2": lambda x, y: (y - x).norm().item(),
    "variance": lambda x, y: abs(y.var().item() - x.var().item()),
}


def sequences_of(*lengths: int) -> Calibration:
    """Random sequences of these lengths."""
    generator = torch.Generator().manual_seed(3)
    rows = [tuple(torch.randint(4, VOCABULARY - 3, (n,), generator=generator).tolist()) for n in lengths]
    return Calibration(Source(), max(lengths), 0, False, False, tuple(rows), (0,) * len(rows))


def check_against_loops(scores: dict[str, Any], states: list[list[Tensor]]) -> None:
    """The scores equal loops over tokens in float64. states: of one sequence each, as from `states_around_blocks`."""
    for name, rule in PER_TOKEN.items():
        expected = [mean_over_tokens(states, block, rule) for block in range(DEPTH)]
        torch.testing.assert_close(scores[name], tuple(expected), rtol=1e-5, atol=1e-5)
    for name, tokens in (("angular", slice(-1, None)), ("angular-all", slice(None))):
        for length in range(1, DEPTH + 1):
            for start in range(DEPTH - length + 1):
                angles = [
                    angle(x, y)
                    for row in states
                    for x, y in zip(row[start][tokens].double(), row[start + length][tokens].double(), strict=True)
                ]
                assert scores[name][length - 1][start] == pytest.approx(sum(angles) / len(angles), abs=1e-5)


@pytest.mark.parametrize("name", ["block-influence", "angular-all", "kl-all", "perplexity"])
def test_averages_over_sequences_count_each_the_same(name: str, llama: Path) -> None:
    """The mean of what each sequence scores alone, however short it is: not the mean over all tokens."""
    model, calibration = load_model(llama), sequences_of(13, 7, 2)
    (metric,) = pick_metrics(name, "sequences")
    metric = replace(metric, finish=float)  # perplexity is the exponential of a mean
    alone = [
        scores_of(model, make_batches(replace(calibration, sequences=(row,)), 1), [metric])[name]
        for row in calibration.sequences
    ]
    firsts = [row[0] if isinstance(row[0], tuple) else row for row in alone]
    expected = tuple(math.fsum(values) / 3 for values in zip(*firsts, strict=True))
    found = {
        over: scores_of(model, make_batches(calibration, 3), [replace(metric, average=over)])[name]
        for over in ("sequences", "tokens")
    }
    first = {over: row[0] if isinstance(row[0], tuple) else row for over, row in found.items()}
    torch.testing.assert_close(first["sequences"], expected, rtol=1e-5, atol=1e-6)
    assert any(abs(x - y) > 1e-3 * abs(y) for x, y in zip(first["tokens"], expected, strict=True))


@pytest.mark.parametrize(("average", "same"), [("tokens", True), ("sequences", False)])
def test_average_is_an_option(average: Any, same: bool, llama: Path, tmp_path: Path) -> None:
    """--average counts tokens or sequences, which differs for documents of different lengths; the scores say which."""
    (tmp_path / "t.jsonl").write_text('{"text": "short"}\n{"text": "quite a lot longer than that"}\n')
    text: dict[str, Any] = {"data": str(tmp_path / "t.jsonl"), "by_document": True, "samples": 2, "length": 24}
    by_default = shortcut.score(llama, metric="l2", quiet=True, **text)
    scores = shortcut.score(llama, metric="l2", average=average, quiet=True, **text)
    assert scores.settings == {**by_default.settings, "average": average}
    assert (scores.metrics == by_default.metrics) is same


@pytest.mark.parametrize("metric", ["taylor", "magnitude", "linear-replacement"])
def test_what_is_no_mean(metric: str) -> None:
    """A metric that is no mean cannot be one over sequences: it says so before a model is looked for."""
    with pytest.raises(ShortcutError, match=f"{metric} is no mean over .*: score it with --average tokens"):
        shortcut.score("m", metric=f"l2,{metric}", average="sequences")


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_of_states_equal_plain_loops(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """All metrics, all blocks and all spans: the last block too, whose output is taken before the final norm."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(13, 7, 11)
    scores = scores_of(model, make_batches(calibration, 2), BEFORE_AND_AFTER)
    check_against_loops(
        scores,
        [[state[0] for state in states_around_blocks(model, torch.tensor([row]))] for row in calibration.sequences],
    )


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batching_and_padding_change_nothing(batch_size: int, checkpoint_of: Callable[..., Path]) -> None:
    """Batches of 1, 2 and 4, which pad sequences of different lengths, give the same scores."""
    model = load_model(checkpoint_of("qwen3"))
    calibration = sequences_of(13, 5, 11, 8)
    alone = scores_of(model, make_batches(calibration, 1), ALL)
    batched = scores_of(model, make_batches(calibration, batch_size), ALL)
    for name in (metric.name for metric in ALL):
        torch.testing.assert_close(batched[name], alone[name], rtol=1e-5, atol=1e-5)


def test_what_stands_on_the_padding_is_ignored(llama: Path) -> None:
    """Other token ids under the mask give the same scores: padding is no text."""
    model = load_model(llama)
    (batch,) = make_batches(sequences_of(13, 5), 2)
    other = Batch(torch.where(batch.mask, batch.ids, 77), batch.mask)
    assert not torch.equal(other.ids, batch.ids)
    assert scores_of(model, [batch], ALL) == scores_of(model, [other], ALL)


def test_scoring_again_gives_the_same(llama: Path) -> None:
    """Nothing accumulates from one call to the next, and the model is left as it was."""
    model = load_model(llama)
    batches = make_batches(sequences_of(9, 9), 2)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    assert scores_of(model, batches, ALL) == scores_of(model, batches, ALL)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_the_walk_costs_one_pass(llama: Path) -> None:
    """Every block runs exactly once per batch, but for the few tokens that show what blocks return, and make sure."""
    model = load_model(llama)
    calls: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda _, args, __, number=number: calls.append((number, args[0].shape[1])))
    with torch.inference_mode():
        list(walk(Decoder.of(model), make_batches(sequences_of(9, 9), 2)[0]))
    assert [number for number, tokens in calls if tokens == 9] == list(range(DEPTH))
    assert [tokens for _, tokens in calls if tokens != 9] == [8] * 2 * DEPTH


def test_cosines_are_defined_everywhere() -> None:
    """Equal, opposite, huge and zero vectors: never NaN, never beyond 1, two zero vectors unchanged."""
    x = torch.tensor([[3.0, 4.0], [1e18, 1e18], [0.0, 0.0], [0.0, 0.0], [1e-20, 0.0]])
    y = torch.tensor([[-3.0, -4.0], [2e18, 2e18], [0.0, 0.0], [1.0, 0.0], [1e-20, 0.0]])
    expected = torch.tensor([-1.0, 1.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(cosine(x, y), expected)
    torch.testing.assert_close(pairwise_cosines(torch.stack([x[:4], y[:4]], 1))[:, 0, 1], expected[:4])
    near = torch.randn(1000, 64)
    assert METRICS["angular"].measure(pairwise_cosines(torch.stack([near, near], 1))).isfinite().all()
    assert block_influence(near, near * 7).abs().max() < 1e-6
    assert METRICS["relative-magnitude"].measure(torch.zeros(1, 9), torch.zeros(1, 9)).item() == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_does_not_change_the_arithmetic(dtype: str, llama: Path) -> None:
    """Token norms of 20,000 and more, as real models have them: their squares overflow float16, and the scores do not.

    Every metric and span equals float64 loops on the states as the model gives them, in its own type.
    """
    model = load_model(llama, Loading(dtype=dtype))
    with torch.no_grad():
        model.model.embed_tokens.weight *= 4000
        for block in model.model.layers:
            block.self_attn.o_proj.weight *= 1500
            block.mlp.down_proj.weight *= 500
    (batch,) = make_batches(sequences_of(13, 7), 2)
    with torch.inference_mode():
        steps = list(walk(Decoder.of(model), batch))
    points = [steps[0].before, *(step.after for step in steps)]
    states = [[point[row][mask] for point in points] for row, mask in enumerate(batch.mask)]
    norms = torch.cat([point[batch.mask].double().norm(dim=-1) for point in points])
    assert str(points[0].dtype) == f"torch.{dtype}"
    assert norms.max() > 20_000
    assert norms.median().square() > torch.finfo(torch.float16).max
    check_against_loops(scores_of(model, [batch], BEFORE_AND_AFTER), states)


def test_tokens_are_not_multiplied_with_tokens() -> None:
    """Eight million tokens need memory for eight million numbers: rows are multiplied one by one, not all by all."""
    many = torch.ones(1, 2).expand(8_000_000, 2)
    for metric in ALL:
        if metric.needs == "states":
            assert metric.measure(many, many).shape == (len(many),)


def test_activations_that_overflow_fail_the_run(llama: Path) -> None:
    """NaN or infinity anywhere in the stream stops the scoring: nothing is averaged over what is left."""
    model = load_model(llama)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ShortcutError, match=r"block 2 gives NaN or infinity in torch\.float32"):
        scores_of(model, make_batches(sequences_of(9), 1), ALL)


def test_score_command_writes_what_it_returns(llama: Path, tmp_path: Path) -> None:
    """scores.json holds the scores of every metric, the calibration record and the sizes that a plan needs."""
    scores = shortcut.score(
        llama, metric="angular,l2", samples=3, length=32, out=tmp_path / "s.json", plot=tmp_path / "s.png", quiet=True
    )
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["metrics"]["l2"] == list(scores.metrics["l2"])
    assert [len(row) for row in data["metrics"]["angular"]] == list(range(DEPTH, 0, -1))
    assert data["calibration"] | {"hash": ""} == {
        "data": "default",
        "split": "train",
        "column": None,
        "chat_template": False,
        "domains": [{"data": "default", "weight": 1, "samples": 3}],
        "samples": 3,
        "length": 32,
        "tokens": 96,
        "seed": 0,
        "by_document": False,
        "starts_with_bos": False,
        "hash": "",
    }
    assert data["parameters"] == sum(parameter.numel() for parameter in load_model(llama).parameters())
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
