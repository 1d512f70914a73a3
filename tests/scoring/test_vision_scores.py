"""Scores of what blocks do with images, against hooks on the whole model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.records.actions import Action
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.greedy import Removal, remove_greedily
from shortcut.scoring.metrics import METRICS
from tests.reference import blocks_of
from tests.vision import FAMILIES, IMAGE, image_id, make_inputs, make_vision_model

pytestmark = pytest.mark.thorough

ROWS = [[3, IMAGE, 4], [2, IMAGE, 3, IMAGE, 5], [IMAGE, 2]]


def batch_of(family: str, model: Any, rows: Any = ROWS) -> Batch:
    """Rows in one batch, padded on the right."""
    inputs = make_inputs(model, FAMILIES[family], rows, side="right")
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
    return Batch(ids, mask, ids == image_id(model), inputs)


@contextmanager
def restored(model: Any, block: int, rows: Tensor) -> Iterator[None]:
    """The block runs for all tokens, and these rows get back what went in."""

    def hook(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        after = torch.where(rows[..., None], before, after)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    handle = blocks_of(model)[block].register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def predictions(model: Any, batch: Batch) -> Tensor:
    """Log probabilities after the last real token of every row: (batch, vocabulary)."""
    mask = batch.mask.long()
    logits = model(input_ids=batch.ids, attention_mask=mask, use_cache=False, **batch.extra).logits
    last = batch.mask.sum(1) - 1
    return torch.log_softmax(logits[torch.arange(len(last)), last].double(), dim=-1)


def divergence(base: Tensor, other: Tensor) -> float:
    """Mean of KL(base ‖ other) over rows."""
    return (base.exp() * (base - other)).sum(-1).mean().item()


@pytest.mark.parametrize("action", ["freeze-visual", "freeze-text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kl_of_freezing_is_that_of_whole_passes(family: str, action: Action) -> None:
    """L ablations by the walk against L + 1 passes of the whole model, several images, several lengths."""
    model = make_vision_model(FAMILIES[family])
    batch = batch_of(family, model)
    assert batch.visual is not None
    rows = batch.visual if action == "freeze-visual" else batch.mask & ~batch.visual
    base = predictions(model, batch)
    expected = []
    for block in range(len(blocks_of(model))):
        with restored(model, block, rows):
            expected.append(divergence(base, predictions(model, batch)))
    found = score_blocks(Decoder.of(model), [batch], [METRICS["kl"]], allow=[action])[action]["kl"]
    assert max(expected) > 1e-3
    assert found == pytest.approx(expected, abs=1e-5)
    if action == "freeze-visual":
        assert found[-1] == 0  # the last block's image tokens are read by nobody


def test_block_passes_are_counted() -> None:
    """Blocks run L times for the walk, and once for every ablation behind its block: L (L + 1) / 2 in all.

    Images are looked at once.
    """
    model = make_vision_model(FAMILIES["llava"])
    batch, decoder = batch_of("llava", model), Decoder.of(model)
    own, passes = decoder.run, []
    object.__setattr__(decoder, "run", lambda number, *how: passes.append(number) or own(number, *how))
    seen: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    score_blocks(decoder, [batch], [METRICS["kl"]], allow=["freeze-visual"])
    depth = len(decoder.blocks)
    assert len(passes) == depth * (depth + 1) / 2
    assert len(seen) == 1


@pytest.mark.parametrize("action", ["freeze-visual", "freeze-text"])
def test_block_influence_of_the_tokens_that_freeze(action: Action) -> None:
    """Metrics of states count only the tokens that the action is about."""
    model = make_vision_model(FAMILIES["llava"])
    batch = batch_of("llava", model)
    assert batch.visual is not None
    states: list[tuple[Tensor, Tensor]] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        states.append((before, output[0] if isinstance(output, tuple) else output))

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks_of(model)]
    predictions(model, batch)
    for handle in handles:
        handle.remove()
    rows = batch.visual if action == "freeze-visual" else batch.mask & ~batch.visual
    pairs = [(before[rows].double(), after[rows].double()) for before, after in states]
    expected = [1 - torch.cosine_similarity(*pair, dim=-1).mean().item() for pair in pairs]
    metrics = [METRICS["block-influence"], METRICS["angular-all"]]
    found = score_blocks(Decoder.of(model), [batch], metrics, allow=[action])[action]
    assert found["block-influence"] == pytest.approx(expected, abs=1e-5)
    angles = [torch.arccos(torch.cosine_similarity(*pair, dim=-1)).mean().item() / torch.pi for pair in pairs]
    assert found["angular-all"] == pytest.approx(angles, abs=1e-5)


def test_whole_blocks_with_images_in_the_prompt() -> None:
    """Dropping text blocks is scored with images, too: kl against bypassing hooks, with features added on the way."""
    model = make_vision_model(FAMILIES["qwen3_vl"])
    batch = batch_of("qwen3_vl", model)
    base = predictions(model, batch)
    expected = []
    for block in range(len(blocks_of(model))):
        with restored(model, block, torch.ones_like(batch.mask)):
            expected.append(divergence(base, predictions(model, batch)))
    found = score_blocks(Decoder.of(model), [batch], [METRICS["kl"]])["drop"]["kl"]
    assert found == pytest.approx(expected, abs=1e-5)


def test_greedy_freezing_is_brute_force() -> None:
    """Each step freezes the block that costs least beside those that are frozen already."""
    model = make_vision_model(FAMILIES["llava"])
    batch = batch_of("llava", model)
    assert batch.visual is not None
    base = predictions(model, batch)
    frozen: list[int] = []
    for move, score in remove_greedily(
        Decoder.of(model), [batch], METRICS["kl"], Removal(3, range(6)), allow=["freeze-visual"]
    ):
        costs = {}
        for block in set(range(6)) - set(frozen):
            with _all_restored(model, [*frozen, block], batch.visual):
                costs[block] = divergence(base, predictions(model, batch))
        lowest = min(costs, key=lambda block: (round(costs[block], 9), -block))
        assert (move.block, move.action) == (lowest, "freeze-visual")
        assert score == pytest.approx(costs[lowest], abs=1e-5)
        frozen.append(move.block)
    assert len(frozen) == 3


@contextmanager
def _all_restored(model: Any, blocks: list[int], rows: Tensor) -> Iterator[None]:
    if not blocks:
        yield
        return
    with restored(model, blocks[0], rows), _all_restored(model, blocks[1:], rows):
        yield


@pytest.mark.parametrize("name", ["taylor", "magnitude", "linear-replacement"])
def test_metrics_that_say_nothing_of_images(name: str) -> None:
    """Metrics of weights and fits are refused in a line, not computed without the images."""
    model = make_vision_model(FAMILIES["llava"])
    with pytest.raises(ShortcutError, match=f"{name} is for text, and says nothing of images"):
        score_blocks(Decoder.of(model), [batch_of("llava", model)], [METRICS[name]], allow=["freeze-visual"])


def test_blocks_that_do_not_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where features of images come in on a way that the walk does not see, scoring stops."""
    model = make_vision_model(FAMILIES["qwen3_vl"])
    decoder = Decoder.of(model)
    decoder.check_images(batch_of("qwen3_vl", model))
    none: Callable[[Any], list[None]] = lambda calls: [None] * len(calls)  # noqa: E731
    monkeypatch.setattr(Decoder, "additions", staticmethod(none))
    with pytest.raises(ShortcutError, match="blocks of qwen3_vl that see images do not run one by one"):
        decoder.check_images(batch_of("qwen3_vl", model))
