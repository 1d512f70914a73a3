"""Folding: against the explicit map, for a span that is exactly linear, on several families, and what is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shortcut
from shortcut.decoder import Batch, Decoder
from shortcut.errors import ShortcutError
from shortcut.live import load_model
from shortcut.records.plan import Base, Plan
from shortcut.repair import fold
from shortcut.repair.fold import RIDGES, Fold, Streams, find_projection, fit_folds
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.reference import blocks_of

TEXT: dict[str, Any] = {"samples": 8, "length": 32, "quiet": True}
MLP = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2", "phi": "mlp.fc2"}
REFUSED = {"gemma3_text", "mixtral", "qwen3_moe"}  # a norm behind the MLP, experts


def batches_of(count: int = 6, length: int = 24, seed: int = 0) -> list[Batch]:
    """Random tokens, some rows shorter than others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY - 3, (count, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [length - 7]] * (count // 2))
    return [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])]


@contextmanager
def replaced(model: Any, dropped: Any, folds: list[Fold]) -> Iterator[None]:
    """The model without these blocks, with M (T - 1) added to the stream behind the block in front of each span."""
    with ExitStack() as stack:
        for number in dropped:

            def bypass(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
                before = args[0] if args else kwargs["hidden_states"]
                return (before, *output[1:]) if isinstance(output, tuple) else before

            stack.callback(blocks_of(model)[number].register_forward_hook(bypass, with_kwargs=True).remove)
        for each in folds:
            module = blocks_of(model)[each.block].get_submodule(each.module)

            def mapped(_: Any, __: Any, output: Tensor, change: Tensor = each.change) -> Tensor:
                return output + output @ change.to(output.dtype)

            stack.callback(module.register_forward_hook(mapped).remove)
        yield


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    """Of the real tokens."""
    return model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits[batch.mask]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projection_is_found_or_refused(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """By trying: the MLP's last projection, where nothing comes between it and the stream."""
    decoder = Decoder.of(load_model(checkpoint_of(family)))
    with torch.no_grad():
        streams = Streams.start(decoder, batches_of()[0])
        if family in REFUSED:
            with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
                find_projection(decoder, 0, streams)
        else:
            assert find_projection(decoder, 0, streams) == MLP.get(family, "mlp.down_proj")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - REFUSED))
def test_merged_weights_are_the_explicit_map(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Biases, transposed weights and parallel blocks too; two spans, the second fitted behind the first."""
    model = load_model(checkpoint_of(family))
    plan = Plan.dropping(Base("", None, DEPTH), [2, 3, 5])
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    with torch.no_grad():
        name = find_projection(Decoder.of(model), 1, Streams.start(Decoder.of(model), batches_of()[0]))
    changes = [0.1 * torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    folds = [Fold((2, 3), 1, name, 0.1, changes[0], 0, 0), Fold((5,), 4, name, 0.1, changes[1], 0, 0)]
    batch = batches_of()[0]
    with replaced(model, plan.dropped, folds):
        expected = logits(model, batch)
    with replaced(model, plan.dropped, []):
        plain = logits(model, batch)
        for each in folds:
            block = blocks_of(model)[each.block]
            for weight, values in each.weights(block).items():
                block.get_parameter(weight).data.copy_(values)
        merged = logits(model, batch)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert (merged - plain).abs().max() > 0.01


def test_the_fit_is_ridge_regression(llama: Path) -> None:
    """Against numpy, on states by hooks: augmented least squares for the ridge that was chosen."""
    model = load_model(llama)
    plan = Plan.dropping(Base("", None, DEPTH), [3, 4])
    states: dict[str, list[Tensor]] = {"added": [], "front": [], "behind": []}
    blocks = blocks_of(model)
    handles = [
        blocks[2].mlp.down_proj.register_forward_hook(lambda _, __, out: states["added"].append(out)),
        blocks[3].register_forward_pre_hook(lambda _, args: states["front"].append(args[0])),
        blocks[5].register_forward_pre_hook(lambda _, args: states["behind"].append(args[0])),
    ]
    fitting = batches_of(seed=1)
    for batch in fitting:
        logits(model, batch)
    for handle in handles:
        handle.remove()
    (found,) = fit_folds(Decoder.of(model), plan, fitting, fitting)
    rows = {
        name: torch.cat([each[batch.mask] for each, batch in zip(found, fitting, strict=True)]).double().numpy()
        for name, found in states.items()
    }
    added, missing = rows["added"], rows["behind"] - rows["front"]
    weight = np.sqrt(found.ridge * np.mean(np.sum(added**2, axis=0)))
    left = np.concatenate([added, weight * np.eye(added.shape[1])])
    right = np.concatenate([missing, np.zeros((added.shape[1], added.shape[1]))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(found.change.numpy(), expected, atol=1e-4)
    assert found.ridge in RIDGES
    assert found.after < found.before


def test_a_span_that_is_linear_is_recovered(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base's span is x + M D for some D, the fit finds it, and logits are the base's."""
    monkeypatch.setattr(fold, "_perplexity", lambda *how: 2.0 if how[-1] is None else 1.0)
    model = load_model(llama)
    blocks = blocks_of(model)
    width = model.config.hidden_size
    hidden = 0.2 * torch.randn(width, width, generator=torch.Generator().manual_seed(3))
    added: list[Tensor] = []
    behind: dict[int, tuple[Tensor, Tensor]] = {}  # block 2's output, by its id, with what its MLP added to it
    blocks[2].mlp.down_proj.register_forward_hook(lambda _, __, out: added.append(out))
    blocks[2].register_forward_hook(lambda _, __, out: behind.update({id(out): (out, added[-1])}))
    blocks[3].forward = lambda hidden_states, *_, **__: hidden_states + behind[id(hidden_states)][1] @ hidden
    blocks[4].forward = lambda hidden_states, *_, **__: hidden_states
    decoder = Decoder.of(model)
    plan = Plan.dropping(Base("", None, DEPTH), [3, 4])
    fitting = batches_of(40, 48)
    (found,) = fit_folds(decoder, plan, fitting, batches_of(seed=7))
    assert (found.ridge, found.block) == (min(RIDGES), 2)
    torch.testing.assert_close(found.change.float(), hidden, rtol=0, atol=1e-2)
    batch = batches_of(seed=9)[0]
    expected = logits(model, batch)
    with replaced(model, plan.dropped, []):
        plain = logits(model, batch)
    with replaced(model, plan.dropped, [found]):
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-2)
    assert (plain - expected).abs().max() > 0.1


def test_the_road(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """heal rewrites the one tensor, leaves SHORT alone, and the result is checked as the base with a map in it."""
    monkeypatch.setattr(fold, "_perplexity", lambda *how: 2.0 if how[-1] is None else 1.0)  # of random weights all bad
    shortcut.cut(llama, tmp_path / "short", drop="2-3,5", quiet=True)
    before = load_file(tmp_path / "short" / "model.safetensors")
    report = shortcut.heal(tmp_path / "short", tmp_path / "out", **TEXT)
    after = load_file(tmp_path / "out" / "model.safetensors")
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == set(report.check.healed) != set()
    assert all(name.endswith("mlp.down_proj.weight") for name in differing)
    untouched = load_file(tmp_path / "short" / "model.safetensors")
    assert all(torch.equal(before[name], untouched[name]) for name in before)
    assert report.check.logit_difference is not None
    assert report.check.logit_difference < 1e-3
    assert "tensors: all but 2 healed ones," in str(report)
    again = shortcut.check(tmp_path / "out", samples=4, length=32, quiet=True)
    assert again.healed == report.check.healed
    with pytest.raises(ShortcutError, match="was healed already"):
        shortcut.heal(tmp_path / "out", tmp_path / "twice", **TEXT)
    record = tmp_path / "out" / "shortcut.json"
    sound = json.loads(record.read_text())
    for healed, message in (([], "is damaged"), ({"tensors": ["lm_head.bias"]}, "calls lm_head.bias healed")):
        record.write_text(json.dumps({**sound, "healed": healed}))
        with pytest.raises(ShortcutError, match=message):
            shortcut.check(tmp_path / "out", samples=4, length=32, quiet=True)
    record.write_text(json.dumps(sound))
    tampered = dict(after)
    tampered["model.layers.0.mlp.up_proj.weight"] = tampered["model.layers.0.mlp.up_proj.weight"] + 1
    from safetensors.torch import save_file

    save_file(tampered, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ShortcutError, match="differs from the base's"):
        shortcut.check(tmp_path / "out", samples=4, length=32, quiet=True)


def test_what_is_refused(llama: Path, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """One line each, and nothing is written."""
    shortcut.cut(llama, tmp_path / "first", drop="0-1", quiet=True)
    with pytest.raises(ShortcutError, match="no linear map in the place of these blocks lowers the perplexity"):
        shortcut.heal(tmp_path / "first", tmp_path / "out", **TEXT)
    shortcut.cut(llama, tmp_path / "half", drop="2", mlp_only="4", quiet=True)
    with pytest.raises(ShortcutError, match="folding is for plans that drop whole blocks"):
        shortcut.heal(tmp_path / "half", tmp_path / "out", **TEXT)
    with pytest.raises(ShortcutError, match="has no record"):
        shortcut.heal(llama, tmp_path / "out", **TEXT)
    shortcut.cut(checkpoint_of("mixtral"), tmp_path / "experts", drop="2", quiet=True)
    with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
        shortcut.heal(tmp_path / "experts", tmp_path / "out", **TEXT)
    assert not (tmp_path / "out").exists()
