"""Blocks that run for the last token of a prompt alone: the definition by hooks, on disk, live, and what they save."""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.modeling.editions import OLDEST
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.modeling.test_hollow import hollowed
from tests.reference import blocks_of, cached, greedy, logits

pytestmark = pytest.mark.thorough

LAST = {2: "last-token", 5: "last-token"}


@contextmanager
def passed_by(model: Any, blocks: Iterable[int]) -> Iterator[None]:
    """These blocks run for all tokens, and of a prompt all but the last get back what went in."""

    def restore(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        after = torch.cat([before[:, :-1], after[:, -1:]], dim=1)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(blocks_of(model)[block].register_forward_hook(restore, with_kwargs=True).remove)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_last_token_blocks_are_as_defined(
    family: str, checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Prompt and continuation, with the base's rotated keys in the cache; a batch padded on the left too."""
    folder = checkpoint_of(family)
    base, short = load_model(folder), hollowed(folder, tmp_path / "short", {**LAST, 0: "drop"})
    plan = Plan.of(Base("", None, DEPTH), {**LAST, 0: "drop"})
    mask = torch.ones_like(token_ids)
    mask[1, :4] = 0
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with shortcut.preview(base, Plan.dropping(plan.base, [0])), passed_by(base, LAST):
        expected = (
            logits(base, token_ids)[:, -1],
            greedy(base, token_ids),
            base.generate(token_ids, attention_mask=mask, **how),
        )
    torch.testing.assert_close(logits(short, token_ids)[:, -1], expected[0], rtol=0, atol=1e-4)
    assert torch.equal(greedy(short, token_ids), expected[1])
    assert torch.equal(short.generate(token_ids, attention_mask=mask, **how), expected[2])
    with shortcut.preview(base, plan):
        torch.testing.assert_close(logits(base, token_ids)[:, -1], expected[0], rtol=0, atol=1e-4)
        assert torch.equal(greedy(base, token_ids), expected[1])


def test_the_road_with_last_token_blocks(llama: Path, tmp_path: Path) -> None:
    """prune takes them by hand, checks the result, and says that perplexity takes the text for a prompt."""
    text: dict[str, Any] = {"length": 32, "quiet": True}
    report = shortcut.prune(llama, tmp_path / "short", last_token="3-4", drop="1", **text)
    assert report.check.logit_difference == pytest.approx(0, abs=1e-4)
    assert str(report).endswith("the text counts as a prompt there: it says nothing of generation")
    card = (tmp_path / "short" / "README.md").read_text()
    assert "are passed by all tokens of a prompt but the last" in card
    assert "`generate` keeps its cache there, whatever `use_cache` says" in card
    assert f"from transformers import AutoModelForCausalLM, AutoTokenizer  # {OLDEST['hollow']} or newer\n" in card
    with pytest.raises(ShortcutError, match="the format zeroed knows no last-token blocks"):
        shortcut.cut(llama, tmp_path / "zeroed", last_token="3", format="zeroed", quiet=True)


def test_a_second_turn(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """A prompt that comes after a filled cache is a prompt as well."""
    base, short = load_model(llama), hollowed(llama, tmp_path / "short", LAST)
    with passed_by(base, LAST), torch.no_grad():
        _, first = cached(base, input_ids=token_ids[:, :9])
        expected = cached(base, first, input_ids=token_ids[:, 9:])[0][:, -1]
    _, cache = cached(short, input_ids=token_ids[:, :9])
    torch.testing.assert_close(cached(short, cache, input_ids=token_ids[:, 9:])[0][:, -1], expected)


def test_copies_stand_on_their_own(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """Copied and pickled, the block is the copy's: changing its weights changes nothing of the first."""
    short = hollowed(llama, tmp_path / "short", LAST)
    expected = logits(short, token_ids)
    for other in (copy.deepcopy(short), pickle.loads(pickle.dumps(short))):
        torch.testing.assert_close(logits(other, token_ids), expected, rtol=0, atol=0)
        with torch.no_grad():
            other.model.layers[2].mlp.down_proj.weight.mul_(3)
        assert not torch.allclose(logits(other, token_ids)[:, -1], expected[:, -1])
    torch.testing.assert_close(logits(short, token_ids), expected, rtol=0, atol=0)
    assert type(short.model.layers[2]).__name__ == type(short.model.layers[3]).__name__


def test_the_work_is_not_done(llama: Path, tmp_path: Path) -> None:
    """Of a block's products only those of keys and values are left for most of the prompt."""
    base, short = load_model(llama), hollowed(llama, tmp_path / "short", dict.fromkeys(range(DEPTH), "last-token"))
    ids = torch.randint(4, VOCABULARY - 3, (1, 100), generator=torch.Generator().manual_seed(1))

    def operations(model: Any) -> dict[str, int]:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
        return {name.rpartition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    before, after = operations(base), operations(short)
    assert after["down_proj"] * 100 == before["down_proj"]
    assert after["o_proj"] * 100 == before["o_proj"]
    assert after["q_proj"] * 100 == before["q_proj"]
    assert after["k_proj"] == before["k_proj"]
    assert after["Global"] < 0.25 * before["Global"]
