"""A plan on a live model gives what the cut checkpoint gives, and leaves no trace."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES
from tests.reference import bypassed, cached, greedy, logits


@pytest.mark.parametrize("drop", [(0, 4), (6,), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_preview_equals_cut(
    family: str, drop: tuple[int, ...], checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Logits and cached generation inside the block are those of the checkpoint cut by the same plan."""
    folder = checkpoint_of(family)
    plan = Plan.dropping(Base(str(folder), None, DEPTH), drop)
    shortcut.cut(folder, tmp_path / "short", plan=plan, quiet=True)
    base, short = load_model(folder), load_model(tmp_path / "short")
    with bypassed(base, drop):
        reference = logits(base, token_ids)
    with shortcut.preview(base, plan):
        torch.testing.assert_close(logits(base, token_ids), reference, rtol=0, atol=0)
        torch.testing.assert_close(logits(base, token_ids), logits(short, token_ids), rtol=0, atol=0)
        assert torch.equal(greedy(base, token_ids), greedy(short, token_ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_preview_decodes_token_by_token(family: str, checkpoint_of: Callable[..., Path], token_ids: Tensor) -> None:
    """A loop of one's own, whose positions follow the length of the cache, goes on rightly where block 0 is dropped."""
    model, tokens = load_model(checkpoint_of(family)), token_ids
    with bypassed(model, (0, 4)):
        expected = greedy(model, token_ids, cache=False)
    with torch.no_grad(), shortcut.preview(model, Plan.dropping(Base("", None, DEPTH), (0, 4))):
        found, cache = cached(model, input_ids=token_ids)
        while tokens.shape != expected.shape:
            tokens = torch.cat([tokens, found[:, -1:].argmax(-1)], 1)
            found, cache = cached(model, cache, input_ids=tokens[:, -1:])
    assert torch.equal(tokens, expected)


def test_preview_leaves_the_model_as_it_was(llama: Path, token_ids: Tensor) -> None:
    """Afterwards, also after an exception, weights, config, methods and logits are what they were."""
    model = load_model(llama)
    config, state = copy.deepcopy(vars(model.config)), {key: value.clone() for key, value in model.state_dict().items()}
    before, attributes = logits(model, token_ids), {name: set(vars(module)) for name, module in model.named_modules()}
    plan = Plan.dropping(Base("", None, DEPTH), (0, 3))
    with pytest.raises(ZeroDivisionError), shortcut.preview(model, plan):  # noqa: PT012
        assert not torch.equal(logits(model, token_ids), before)
        raise ZeroDivisionError
    assert torch.equal(logits(model, token_ids), before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert vars(model.config) == config
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_previews_nest(llama: Path, token_ids: Tensor) -> None:
    """A preview inside a preview drops the blocks of both, and the outer one comes back."""
    model = load_model(llama)
    outer, inner, both = (Plan.dropping(Base("", None, DEPTH), drop) for drop in ((1,), (4,), (1, 4)))
    with shortcut.preview(model, both):
        expected = greedy(model, token_ids)
    with shortcut.preview(model, outer):
        before = logits(model, token_ids)
        with shortcut.preview(model, inner):
            assert torch.equal(greedy(model, token_ids), expected)
        assert torch.equal(logits(model, token_ids), before)


def test_preview_skips_the_work(llama: Path, token_ids: Tensor) -> None:
    """Dropped blocks do not run: their attention is never called."""
    model = load_model(llama)
    called: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.self_attn.register_forward_hook(lambda *_, number=number: called.append(number))
    with shortcut.preview(model, Plan.dropping(Base("", None, DEPTH), (0, 5))):
        called.clear()
        logits(model, token_ids)
    assert called == [1, 2, 3, 4, 6]


def test_preview_refuses_a_plan_of_another_depth(llama: Path) -> None:
    """A plan for another number of blocks is an error that names both."""
    plan = Plan.dropping(Base("", None, 5), (1,))
    with (
        pytest.raises(ShortcutError, match="the plan is for 5 blocks and the model has 7"),
        shortcut.preview(load_model(llama), plan),
    ):
        pass
