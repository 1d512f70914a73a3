"""Halves of blocks, attention and MLP: found in every family, and scored as a model is whose modules return zeros."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.material.calibration import make_batches
from shortcut.records.actions import Action, Move, join
from shortcut.records.plan import Base, Plan
from shortcut.records.scores import format_scores, read_scores
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.greedy import Removal, remove_greedily
from shortcut.scoring.metrics import METRICS
from tests.conftest import DEPTH, FAMILIES
from tests.reference import angle, blocks_of, bypassed, cosine, logits, states_around_blocks
from tests.scoring.test_greedy import plain_perplexity
from tests.sweep.tiny import tiny_model
from tests.verbs.test_score import sequences_of

pytestmark = pytest.mark.thorough

# The last module of each branch, whose output is added to the stream; by hand.
LAST = {
    **dict.fromkeys(FAMILIES, ("self_attn", "mlp")),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "opt": ("self_attn", "fc2"),
    "gpt_neox": ("attention", "mlp"),
}
ALLOW: tuple[Action, ...] = ("drop", "attention-only", "mlp-only")


@contextmanager
def halved(model: Any, family: str, actions: Mapping[int, str]) -> Iterator[None]:
    """Hooks turn what the silent branches add into zeros; the modules run all the same."""

    def nothing(_: Any, __: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    attention, mlp = LAST[family]
    silent = [(block, mlp if action == "attention-only" else attention) for block, action in actions.items()]
    with ExitStack() as stack:
        for block, name in silent:
            module = blocks_of(model)[block].get_submodule(name)
            stack.callback(module.register_forward_hook(nothing).remove)
        yield


@contextmanager
def carried_out(model: Any, family: str, actions: Mapping[int, str]) -> Iterator[None]:
    """Any actions by hooks."""
    dropped = [block for block, action in actions.items() if action == "drop"]
    halves = {block: action for block, action in actions.items() if action != "drop"}
    with bypassed(model, dropped), halved(model, family, halves):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_are_scored_as_hooks_say(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Metrics of logits without the attention, or the MLP, of every block; in batches, against one pass each."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(9, 5)
    rows = [torch.tensor(row) for row in calibration.sequences]
    batches = make_batches(calibration, 2)
    scores = score_blocks(Decoder.of(model), batches, [METRICS["perplexity"], METRICS["kl"]], allow=ALLOW)
    whole = [torch.log_softmax(logits(model, row[None])[0, -1].double(), -1) for row in rows]
    for action in ALLOW:
        for block in range(DEPTH):
            with carried_out(model, family, {block: action}):
                expected = plain_perplexity(model, rows, [])
                without = [torch.log_softmax(logits(model, row[None])[0, -1].double(), -1) for row in rows]
            divergences = [(p.exp() * (p - q)).sum().item() for p, q in zip(whole, without, strict=True)]
            assert scores[action]["perplexity"][block] == pytest.approx(expected, rel=1e-4)
            assert scores[action]["kl"][block] == pytest.approx(math.fsum(divergences) / 2, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_between_the_halves(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Metrics of states compare before and after the attention, and before and after the MLP, which runs last."""
    model = load_model(checkpoint_of(family))
    calibration = sequences_of(9)
    (row,) = (torch.tensor(row) for row in calibration.sequences)
    names = ("block-influence", "angular")
    scores = score_blocks(
        Decoder.of(model), make_batches(calibration, 1), [METRICS[name] for name in names], allow=ALLOW[1:]
    )
    for block in range(DEPTH):
        states = states_around_blocks(model, row[None])
        with halved(model, family, {block: "attention-only"}):
            between = states_around_blocks(model, row[None])[block + 1][0].double()
        before, after = (states[block + i][0].double() for i in (0, 1))
        for action, (x, y) in {"mlp-only": (before, between), "attention-only": (between, after)}.items():
            influence = math.fsum(1 - cosine(*pair) for pair in zip(x, y, strict=True)) / len(x)
            assert scores[action]["block-influence"][block] == pytest.approx(influence, abs=1e-5)
            assert scores[action]["angular"][block] == pytest.approx(angle(x[-1], y[-1]), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3_moe"])
def test_weights_of_halves(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """What a half's weights score, its norms among them; in llama-like blocks the halves make up the whole."""
    model = load_model(checkpoint_of(family))
    batches = make_batches(sequences_of(9, 5), 2)
    scores = score_blocks(Decoder.of(model), batches, [METRICS["magnitude"], METRICS["taylor"]], allow=ALLOW)
    for name in ("magnitude", "taylor"):
        halves = [sum(pair) for pair in zip(*(scores[action][name] for action in ALLOW[1:]), strict=True)]
        torch.testing.assert_close(tuple(halves), scores["drop"][name], rtol=1e-5, atol=1e-5)
    mlps = [sum(w.abs().sum().item() for w in block.mlp.parameters()) for block in blocks_of(model)]
    assert all(m < score for m, score in zip(mlps, scores["attention-only"]["magnitude"], strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_greedy_over_halves_equals_brute_force(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """At every step, of all halves and blocks, the move is made that adds least perplexity per weight that goes."""
    model = load_model(checkpoint_of(family))
    calibration, decoder = sequences_of(9, 7), Decoder.of(model)
    sizes = {action: sum(w.numel() for w in decoder.weights(0, action)) for action in ALLOW}

    def weights(_: int, action: Action) -> int:
        return sizes.get(action, 0)

    metric, batches = METRICS["perplexity"], make_batches(calibration, 2)
    made = list(remove_greedily(decoder, batches, metric, Removal(4, range(DEPTH)), allow=ALLOW, weights=weights))
    rows = [torch.tensor(row) for row in calibration.sequences]
    done: dict[int, Action] = {}
    now = plain_perplexity(model, rows, [])
    for move, score in made:
        prices = {}
        for block in range(DEPTH):
            for action in {join(done.get(block, "keep"), action) for action in ALLOW} - {done.get(block, "keep")}:
                with carried_out(model, family, {**done, block: action}):
                    perplexity = plain_perplexity(model, rows, [])
                gone = sizes[action] - sizes.get(done.get(block, "keep"), 0)
                prices[Move(block, action)] = ((perplexity - now) / gone, perplexity)
        assert move == min(prices, key=lambda move: prices[move][0])
        assert score == pytest.approx(prices[move][1], rel=1e-4)
        done[move.block], now = move.action, prices[move][1]


def test_greedy_stops_when_enough_has_gone(llama: Path) -> None:
    """No further move is made once so many weights are gone."""
    decoder = Decoder.of(load_model(llama))
    batches = make_batches(sequences_of(9), 1)
    how = {"weights": lambda _, action: {"drop": 10, "keep": 0}[action]}
    assert len(list(remove_greedily(decoder, batches, METRICS["l2"], Removal(6, range(DEPTH), enough=25), **how))) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_preview_of_halves(family: str, checkpoint_of: Callable[..., Path], token_ids: torch.Tensor) -> None:
    """Any mixture of actions on a live model gives what hooks give; another plan can be set, none stays behind."""
    model = load_model(checkpoint_of(family))
    before = logits(model, token_ids)
    mixtures: list[dict[int, Action]] = [
        {0: "mlp-only", 2: "drop", 3: "attention-only", 5: "mlp-only"},
        {1: "attention-only", 6: "drop"},
    ]
    expected = []
    for actions in mixtures:
        with carried_out(model, family, actions):
            expected.append(logits(model, token_ids))
    base = Base("", None, DEPTH)
    with shortcut.preview(model, Plan.of(base, mixtures[0])) as shown:
        torch.testing.assert_close(logits(model, token_ids), expected[0], rtol=0, atol=1e-5)
        shown.set(Plan.of(base, mixtures[1]))
        torch.testing.assert_close(logits(model, token_ids), expected[1], rtol=0, atol=1e-5)
    assert torch.equal(logits(model, token_ids), before)


def test_previews_of_halves_nest(llama: Path, token_ids: torch.Tensor) -> None:
    """What goes inside and outside goes together: two halves are a whole block."""
    model, base = load_model(llama), Base("", None, DEPTH)
    with bypassed(model, [4]):
        expected = logits(model, token_ids)
    with shortcut.preview(model, Plan.of(base, {4: "attention-only"})):
        with shortcut.preview(model, Plan.of(base, {4: "mlp-only"})):
            torch.testing.assert_close(logits(model, token_ids), expected)
        with halved(model, "llama", {4: "attention-only"}):
            alone = logits(model, token_ids)
        torch.testing.assert_close(logits(model, token_ids), alone)


@pytest.mark.parametrize("family", ["nemotron_h", "mamba"])
def test_blocks_that_have_no_halves(family: str) -> None:
    """A block that is one mixer, or one MLP, is refused in a line that says what it lacks."""
    decoder = Decoder.of(tiny_model(family, "causal").eval())
    with pytest.raises(ShortcutError, match=f"block 0 of {family} has no (attention|mlp) beside the rest of it"):
        decoder.branches(0)


def test_a_block_that_does_something_else_too(llama: Path) -> None:
    """A block that changes the stream without its halves, and one that is not made up of them, are refused."""
    model = load_model(llama)
    forward = model.model.layers[0].forward
    model.model.layers[0].forward = lambda hidden, **how: forward(hidden, **how) * 2
    with pytest.raises(ShortcutError, match="block 0 of llama is not only attention and MLP"):
        Decoder.of(model).branches(0)
    model.model.layers[0].forward = lambda hidden, **how: forward(forward(hidden, **how), **how)
    with pytest.raises(ShortcutError, match="block 0 of llama is neither the chain nor the sum"):
        Decoder.of(model).branches(0)


def test_halves_on_the_road(llama: Path, tmp_path: Path) -> None:
    """score --allow puts scores and sizes of halves into the file; plans choose among them at equal parameters."""
    text: dict[str, Any] = {"samples": 2, "length": 32, "quiet": True}
    scores = shortcut.score(llama, metric="perplexity", greedy=3, allow=",".join(ALLOW), **text)
    (tmp_path / "s.json").write_text(format_scores(scores))
    assert read_scores(tmp_path / "s.json") == scores
    assert [a + b for a, b in zip(*scores.half_parameters.values(), strict=True)] == list(scores.block_parameters)
    greedy = shortcut.plan(tmp_path / "s.json", count=3, select="greedy", allow=",".join(ALLOW))
    assert [join(greedy.actions[m.block], m.action) for m in scores.orders["perplexity"]] == [
        greedy.actions[move.block] for move in scores.orders["perplexity"]
    ]
    plan = shortcut.plan(tmp_path / "s.json", count=2, allow="mlp-only")
    values = scores.halves["mlp-only"]["perplexity"]
    assert plan.blocks("mlp-only") == tuple(sorted(sorted(range(DEPTH), key=values.__getitem__)[:2]))
    sizes = scores.half_parameters["mlp-only"]
    expected = {f"{b} mlp-only": {"score": values[b], "parameters": sizes[b]} for b in plan.blocks("mlp-only")}
    assert plan.why["moves"] == expected
    share = shortcut.plan(tmp_path / "s.json", ratio="20%", allow="attention-only,mlp-only")
    gone = sum(scores.size(*move) for move in enumerate(share.actions))
    assert 0.2 <= gone / scores.parameters < 0.2 + max(scores.block_parameters) / scores.parameters
    by_hand = shortcut.plan(llama, drop="1", attention_only="2-3", mlp_only="5", quiet=True)
    assert by_hand.described == "1, attention-only 2-3, mlp-only 5"


def refused(options: dict[str, Any], message: str) -> Any:
    """A row of the table below."""
    return pytest.param(options, message, id=message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        refused({"drop": "1", "mlp_only": "1"}, "block 1 cannot be both drop and mlp-only"),
        refused({"mlp_only": "0-6"}, "the plan leaves no block its attention"),
        refused({"drop": "1", "protect": "0-2"}, "block 1 cannot both go and stay: see --protect and --candidates"),
        refused({"drop": "1", "candidates": "2-5"}, "block 1 cannot both go and stay"),
        refused({"mlp_only": "9"}, "no block 9: the model has blocks 0-6"),
        refused({"count": 2, "drop": "1"}, "say what goes with one of --count, --ratio and --drop"),
        refused({"count": 2, "select": "deepest", "allow": "half"}, "unknown action 'half': there are drop, att"),
        refused({"count": 2, "select": "deepest", "allow": "drop,mlp-only"}, "--select deepest takes one action"),
        refused({"ratio": "9%", "select": "deepest", "allow": "mlp-only"}, "nothing is known of the size of mlp-only"),
    ],
)
def test_halves_that_cannot_go(options: dict[str, Any], message: str, llama: Path) -> None:
    """Bad indices, overlapping actions and unknown ones are one line each."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.plan(llama, quiet=True, **options)


def test_scores_without_halves(llama: Path) -> None:
    """A plan that allows what was not scored says how to score it; spans of fitted maps know no halves."""
    scores = shortcut.score(llama, samples=2, length=32, quiet=True)
    with pytest.raises(ShortcutError, match="say nothing of mlp-only: score with --allow mlp-only"):
        shortcut.plan(scores, count=2, allow="mlp-only")
    with pytest.raises(ShortcutError, match="linear-replacement scores whole blocks only, not mlp-only"):
        shortcut.score(llama, metric="linear-replacement", allow="mlp-only", quiet=True)
