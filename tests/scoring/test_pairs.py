"""The best linear map in place of a span equals plain least squares, and says 0 where a span is linear."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.material.calibration import make_batches
from shortcut.scoring.metrics import METRICS, Metric, linear_replacement
from tests.conftest import DEPTH
from tests.live.test_offload import open_on_disk
from tests.reference import scores_of, states_around_blocks
from tests.verbs.test_score import sequences_of

RULE = METRICS["linear-replacement"]


def fit_plainly(before: torch.Tensor, after: torch.Tensor) -> float:
    """Ridge regression as least squares with the ridge as further rows, by orthogonal factors."""
    x, y = before.double(), after.double()
    ridge = (1e-6 * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    fitted = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, torch.zeros(x.shape[1], y.shape[1])])).solution
    return ((y - x @ fitted).norm() / y.norm()).square().item()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mixtral", "qwen3_moe"])
def test_maps_equal_plain_least_squares(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Every span of every length, over the tokens of all sequences together; the same with blocks on the disk."""
    folder = checkpoint_of(family)
    model, calibration = load_model(folder), sequences_of(40, 25, 30)
    scores = scores_of(model, make_batches(calibration, 2), [RULE])[RULE.name]
    rows = [states_around_blocks(model, torch.tensor([row])) for row in calibration.sequences]
    states = [torch.cat([row[point][0] for row in rows]) for point in range(DEPTH + 1)]
    for length in range(1, DEPTH + 1):
        for start in range(DEPTH - length + 1):
            expected = fit_plainly(states[start], states[start + length])
            assert scores[length - 1][start] == pytest.approx(expected, rel=1e-3, abs=1e-6)
    with open_on_disk(folder) as offloaded:
        assert scores_of(offloaded, make_batches(calibration, 2), [RULE])[RULE.name] == scores


def test_a_linear_span_costs_nothing() -> None:
    """0 where a map exists, 1 where nothing of the output is in the input."""
    x = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    assert linear_replacement(x, x @ torch.randn(20, 20)).item() < 1e-9
    assert linear_replacement(x, 7 * x).item() < 1e-9
    assert linear_replacement(x, torch.randn(300, 20)).item() > 0.8


def test_too_few_tokens_are_refused(llama: Path) -> None:
    """With fewer tokens than twice the width a map would fit anything."""
    with pytest.raises(
        ShortcutError, match="needs 80 tokens at least, 2 times the width of the states, and there are 64"
    ):
        shortcut.score(llama, metric="linear-replacement", samples=2, length=32, quiet=True)


def test_states_that_overflow_fail_the_run(llama: Path) -> None:
    """NaN or infinity between the blocks is one line that names the block, not an error of the fit."""
    model = load_model(llama)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ShortcutError, match=r"block 2 gives NaN or infinity in torch\.float32"):
        scores_of(model, make_batches(sequences_of(50, 50), 2), [RULE])


def test_a_score_that_is_no_number_fails_the_run(llama: Path) -> None:
    """A fit that comes to nothing is one line that names the metric."""
    own = Metric("own", lambda x, y: (x - x).sum() / (y - y).sum(), "pairs", "all", "", "")
    with pytest.raises(ShortcutError, match="own is not finite"):
        scores_of(load_model(llama), make_batches(sequences_of(50, 50), 2), [own])
