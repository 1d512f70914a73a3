"""Removing one block after the other, with the rest scored again, is what brute force does."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shortcut
from shortcut.choose.rules import removals
from shortcut.common.errors import ShortcutError
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.material.calibration import make_batches
from shortcut.records.scores import format_scores, read_scores
from shortcut.scoring.greedy import Removal, remove_greedily
from shortcut.scoring.metrics import METRICS
from tests.conftest import DEPTH
from tests.reference import blocks_of, bypassed, cosine, logits, mean_over_tokens, scores_of, states_around_blocks
from tests.verbs.test_score import sequences_of

pytestmark = pytest.mark.thorough


def plain_perplexity(model: Any, rows: Sequence[torch.Tensor], missing: Sequence[int]) -> float:
    """Of the model without these blocks, by one forward pass for every sequence."""
    losses: list[float] = []
    with bypassed(model, missing):
        for row in rows:
            predicted = torch.log_softmax(logits(model, row[None])[0].double(), -1)
            losses += [-predicted[i][row[i + 1]].item() for i in range(len(row) - 1)]
    return math.exp(math.fsum(losses) / len(losses))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("candidates", [range(DEPTH), [1, 3, 4, 5, 6]])
def test_greedy_equals_brute_force(family: str, candidates: Sequence[int], checkpoint_of: Callable[..., Path]) -> None:
    """At every step the block goes without which the rest has the lowest perplexity, of all models tried."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(9, 7)
    removed = list(
        remove_greedily(Decoder.of(model), make_batches(calibration, 2), METRICS["perplexity"], Removal(4, candidates))
    )
    rows, missing = [torch.tensor(row) for row in calibration.sequences], []
    for (block, _), score in removed:
        tried = {b: plain_perplexity(model, rows, [*missing, b]) for b in candidates if b not in missing}
        assert block == min(tried, key=lambda b: tried[b])
        assert score == pytest.approx(tried[block], rel=1e-4)
        missing.append(block)


def test_greedy_by_kl_compares_with_the_whole_model(llama: Path) -> None:
    """At every step the predictions are compared with those of the base, not with those of what was left before."""
    model, calibration = load_model(llama), sequences_of(9, 7)
    removed = list(
        remove_greedily(Decoder.of(model), make_batches(calibration, 2), METRICS["kl-all"], Removal(4, range(DEPTH)))
    )
    rows, missing = [torch.tensor(row) for row in calibration.sequences], []

    def predictions(without: Sequence[int]) -> torch.Tensor:
        with bypassed(model, without):
            return torch.cat([torch.log_softmax(logits(model, row[None])[0].double(), -1) for row in rows])

    whole = predictions(())
    for (block, _), score in removed:
        rest = {b: predictions([*missing, b]) for b in range(DEPTH) if b not in missing}
        tried = {b: (whole.exp() * (whole - less)).sum(-1).mean().item() for b, less in rest.items()}
        assert block == min(tried, key=lambda b: tried[b])
        assert score == pytest.approx(tried[block], rel=1e-4)
        missing.append(block)


def test_greedy_by_states_looks_at_what_is_left(llama: Path) -> None:
    """At every step block influence is that of a model which really lacks the blocks that went."""
    calibration, left, model = sequences_of(9, 7), list(range(DEPTH)), load_model(llama)
    batches = make_batches(calibration, 2)
    removed = list(remove_greedily(Decoder.of(model), batches, METRICS["block-influence"], Removal(4, left)))
    for (block, _), score in removed:
        short = load_model(llama)
        short.model.layers = torch.nn.ModuleList(short.model.layers[i] for i in left)
        rows = [[x[0] for x in states_around_blocks(short, torch.tensor([row]))] for row in calibration.sequences]
        turns = [mean_over_tokens(rows, place, lambda x, y: 1 - cosine(x, y)) for place in range(len(left))]
        assert left[turns.index(min(turns))] == block
        assert score == pytest.approx(min(turns), abs=1e-6)
        left.remove(block)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(("metric", "count"), [("perplexity", 5), ("block-influence", 4)])
def test_greedy_scaled_equals_brute_force(
    family: str, metric: str, count: int, checkpoint_of: Callable[..., Path]
) -> None:
    """In the place of every block that went the stream is as many times as long as that block made it, in the mean."""
    model, calibration = load_model(checkpoint_of(family)), sequences_of(9, 7)
    rows, numbers = [torch.tensor(row) for row in calibration.sequences], dict[int, float]()
    decoder, batches = Decoder.of(model), make_batches(calibration, 2)
    for (block, _), score in remove_greedily(
        decoder, batches, METRICS[metric], Removal(count, range(DEPTH), scaled=True)
    ):
        left = [number for number in range(DEPTH) if number not in numbers]
        with multiplying(model, numbers):
            states = {number: [around(model, number, row) for row in rows] for number in left}
            if metric == "perplexity":
                tried = {number: plain_perplexity(model, rows, [number]) for number in left}
            else:
                tried = {
                    number: 1 - torch.cat([torch.cosine_similarity(x, y, dim=-1) for x, y in pairs]).mean().item()
                    for number, pairs in states.items()
                }
        assert block == min(tried, key=lambda number: tried[number])
        assert score == pytest.approx(tried[block], rel=1e-4, abs=1e-6)
        numbers[block] = torch.cat([y.norm(dim=-1) / x.norm(dim=-1) for x, y in states[block]]).mean().item()
    assert any(abs(number - 1) > 0.02 for number in numbers.values())


@contextmanager
def multiplying(model: Any, numbers: dict[int, float]) -> Iterator[None]:
    """These blocks do nothing but multiply what goes in, by hooks."""
    with ExitStack() as stack:
        for block, number in numbers.items():

            def instead(_: Any, args: Any, kwargs: Any, output: Any, number: float = number) -> Any:
                hidden = (args[0] if args else kwargs["hidden_states"]) * number
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            stack.callback(blocks_of(model)[block].register_forward_hook(instead, with_kwargs=True).remove)
        yield


def around(model: Any, block: int, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream in front of a block and behind it, (tokens, width) each, by a hook."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        found.append(((args[0] if args else kwargs["hidden_states"])[0].double(), after[0].double()))

    handle = blocks_of(model)[block].register_forward_hook(look, with_kwargs=True)
    logits(model, row[None])
    handle.remove()
    return found[0]


def test_scaled_greedy_needs_a_second_scoring(llama: Path, tmp_path: Path) -> None:
    """scores.json says that it was so; where nothing is scored again, there is nothing to scale."""
    options: dict[str, Any] = {"metric": "perplexity", "samples": 2, "length": 32, "quiet": True}
    scores = shortcut.score(llama, greedy=2, scaled=True, **options)
    assert scores.settings["scaled"] is True
    with pytest.raises(ShortcutError, match="--scaled is for blocks that go one by one"):
        shortcut.score(llama, scaled=True, **options)
    for how in ({"count": 2}, {"drop": "1", "select": "greedy"}):
        with pytest.raises(ShortcutError, match="--scaled is for blocks that go one by one"):
            shortcut.prune(llama, tmp_path / "out", scaled=True, **how, **options)
    pruned = shortcut.prune(llama, tmp_path / "out", count=2, select="greedy", scaled=True, **options)
    assert pruned.cut.plan.dropped == tuple(sorted(move.block for move in scores.orders["perplexity"]))
    tried = shortcut.sweep(llama, count="2", select="greedy", scaled=True, **options)
    assert tried.trials[0].dropped == pruned.cut.plan.described


def test_the_first_step_is_the_lowest_score(llama: Path) -> None:
    """With nothing left out yet, greedy is plain scoring."""
    model = load_model(llama)
    batches = make_batches(sequences_of(9, 7), 2)
    for name in ("block-influence", "kl"):
        scores = scores_of(model, batches, [METRICS[name]])[name]
        (((block, _), score),) = remove_greedily(Decoder.of(model), batches, METRICS[name], Removal(1, range(DEPTH)))
        assert (block, score) == (scores.index(min(scores)), pytest.approx(min(scores)))


def test_orders_go_through_the_files(llama: Path, tmp_path: Path) -> None:
    """score --greedy writes the order into scores.json, and plans of every size follow it."""
    scores = shortcut.score(
        llama, metric="kl", greedy=3, protect="0", samples=2, length=32, out=tmp_path / "s.json", quiet=True
    )
    order = scores.orders["kl"]
    assert len(order) == 3
    assert 0 not in {move.block for move in order}
    assert read_scores(tmp_path / "s.json") == scores
    assert f"one by one, by kl: {', '.join(map(str, order))}" in str(scores)
    for count in (1, 2, 3):
        plan = shortcut.plan(tmp_path / "s.json", count=count, select="greedy", protect="0")
        assert plan.dropped == tuple(sorted(move.block for move in order[:count]))
    with pytest.raises(ShortcutError, match="cannot drop 4 of 7 blocks: 1 to 3 can go"):
        shortcut.plan(scores, count=4, select="greedy")
    with pytest.raises(ShortcutError, match=f"has block {order[0]}, which is to stay"):
        shortcut.plan(scores, count=2, select="greedy", protect=str(order[0]))


def test_prune_greedily(llama: Path, tmp_path: Path) -> None:
    """prune scores as often as its count or its ratio needs, among the candidates."""
    options = {"select": "greedy", "metric": "perplexity", "samples": 2, "length": 32, "quiet": True}
    report = shortcut.prune(llama, tmp_path / "a", count=2, candidates="1-4", **options)
    assert len(report.cut.plan.dropped) == 2
    assert set(report.cut.plan.dropped) <= {1, 2, 3, 4}
    assert report.cut.plan.why["candidates"] == "1-4"
    report = shortcut.prune(llama, tmp_path / "b", ratio="20%", **options)
    assert len(report.scores.orders["perplexity"]) == len(report.cut.plan.dropped)


@pytest.mark.parametrize(
    ("metric", "count", "message"),
    [
        ("taylor", 1, "taylor cannot be scored again as blocks go"),
        ("angular", 1, "angular cannot be scored again as blocks go"),
        ("kl", -1, "cannot leave out -1 blocks one by one: 1 to 6 can go"),
        ("kl", 7, "cannot leave out 7 blocks one by one: 1 to 6 can go"),
    ],
)
def test_greedy_mistakes(metric: str, count: int, message: str, llama: Path) -> None:
    """Metrics that say nothing of single blocks, and more blocks than may go."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.score(llama, metric=metric, greedy=count, samples=2, length=32, quiet=True)


def test_orders_that_are_none(llama: Path, tmp_path: Path) -> None:
    """Scores without an order, and files whose order names a block twice or one that is not there."""
    scores = shortcut.score(llama, metric="l2", samples=2, length=32, quiet=True)
    with pytest.raises(
        ShortcutError, match=r"no order by 'l2' in these scores \(there are: none\): score with --greedy"
    ):
        removals("greedy", DEPTH, (), scores, "l2")
    for order in ([1, 1], [DEPTH]):
        broken = format_scores(scores).replace('"orders": {}', f'"orders": {{"l2": {order}}}')
        (tmp_path / "s.json").write_text(broken)
        with pytest.raises(ShortcutError, match="does not hold the scores of 7 blocks"):
            read_scores(tmp_path / "s.json")
