"""What inspect says that moves save, against counters on the running model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.live.load import load_model
from shortcut.records.plan import Base, Format, Plan
from shortcut.surgery import savings as module
from shortcut.surgery.savings import cache_per_token
from tests.conftest import DEPTH, VOCABULARY
from tests.reference import blocks_of, cached

CONTEXT = 64


def operations(model: Any, plan: Plan, ids: torch.Tensor) -> tuple[int, int, int]:
    """Operations of the prompt and of one new token behind it, and the numbers in the cache per token."""
    with shortcut.preview(model, plan), torch.no_grad():
        with FlopCounterMode(display=False) as prompt:
            _, cache = cached(model, input_ids=ids)
        held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers if layer.keys is not None)
        with FlopCounterMode(display=False) as step:
            cached(model, cache, input_ids=ids[:, :1])
    return prompt.get_total_flops(), step.get_total_flops(), held // ids.shape[1]


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "opt", "phi"])
def test_savings_are_what_counters_say(
    family: str, checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters, cache, and operations of prompt and new token, for every action on block 3, within 1 %."""
    monkeypatch.setattr(module, "CONTEXT", CONTEXT)
    how = {"sliding_window": 500} if family == "gemma3_text" else {}
    folder = checkpoint_of(family, **how)
    model = load_model(folder)
    model.set_attn_implementation("eager")  # of which counters know
    ids = torch.randint(4, VOCABULARY - 3, (1, CONTEXT), generator=torch.Generator().manual_seed(1))
    base = Base("", None, DEPTH)
    whole = operations(model, Plan.of(base, {}), ids)
    found = {saving.action: saving for saving in shortcut.inspect(folder, quiet=True).savings[3]}
    assert list(found) == ["drop", "attention-only", "mlp-only", "last-token"]
    queries = (found["mlp-only"].decode - found["mlp-only"].prefill) / (2 * (CONTEXT + 1))
    for action, saving in found.items():
        left = operations(model, Plan.of(base, {3: action}), ids)
        prompt, step, cached = (a - b for a, b in zip(whole, left, strict=True))
        # Counters take all pairs of a prompt; of those only the ones that a token can see are counted here.
        unseen = 2 * queries * (CONTEXT - 1) * CONTEXT if action != "attention-only" else 0
        assert prompt == pytest.approx(saving.prefill * CONTEXT + unseen, rel=0.01)
        assert step == pytest.approx(saving.decode, rel=0.01)
        assert cached * 2 == saving.cache
    sizes = [found[action].parameters for action in ("attention-only", "mlp-only")]
    assert sum(sizes) <= found["drop"].parameters == sum(w.numel() for w in blocks_of(model)[3].parameters())


@pytest.mark.parametrize("format", ["custom", "zeroed"])
def test_the_cache_of_a_plan(format: Format, llama: Path, tmp_path: Path) -> None:  # noqa: A002
    """Bytes per token in half precision are those of the numbers that the result keeps of a prompt."""
    checkpoint = read_checkpoint(llama)
    plan = Plan.of(checkpoint.base, {1: "drop", 2: "attention-only", 4: "mlp-only", 5: "mlp-only"})
    shortcut.cut(llama, tmp_path / "short", plan=plan, format=format, quiet=True)
    ids = torch.arange(4, 15)[None]
    layers = cached(load_model(tmp_path / "short"), input_ids=ids)[1].layers
    held = sum(layer.keys.numel() + layer.values.numel() for layer in layers if layer.keys is not None)
    assert cache_per_token(checkpoint, replace(plan, format=format)) == 2 * held // ids.shape[1]


def test_blocks_that_are_hollow_already(llama: Path, tmp_path: Path) -> None:
    """A block without attention has no cache to save, and can only be dropped."""
    shortcut.cut(llama, tmp_path / "short", mlp_only="3", quiet=True)
    found = shortcut.inspect(tmp_path / "short", quiet=True).savings
    (whole, *_), hollow = shortcut.inspect(llama, quiet=True).savings[3], found[3]
    half = {saving.action: saving for saving in shortcut.inspect(llama, quiet=True).savings[3]}["attention-only"]
    assert [(s.action, s.cache, s.prefill, s.decode) for s in hollow] == [("drop", 0, half.prefill, half.decode)]
    assert found[2][0] == whole


def test_what_cannot_be_told(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """A family whose halves are not known can only be dropped; what a config does not say is left open."""
    shutil.copytree(checkpoint_of("llama"), tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "architectures": ["UnknownForCausalLM"], "kv_lora_rank": 8}))
    found = shortcut.inspect(tmp_path / "other", quiet=True)
    assert [saving.action for saving in found.savings[0]] == ["drop"]
    assert (found.savings[0][0].cache, found.savings[0][0].prefill) == (None, None)
    other = read_checkpoint(tmp_path / "other")
    assert cache_per_token(other, Plan.dropping(other.base, (1,))) is None
    assert " drop " in str(found)
