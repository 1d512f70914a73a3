"""Scaling: weights that are divided are a stream that is multiplied, in several families; and what is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shortcut.checking.perplexity import perplexity
from shortcut.common.errors import ShortcutError
from shortcut.healing import scale
from shortcut.healing.scale import Scale, fit_scales, new_weights
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.records.actions import Action
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH
from tests.healing.test_refit import batches_of, logits
from tests.live.test_offload import open_on_disk
from tests.reference import blocks_of, greedy
from tests.scoring.test_halves import carried_out

PRE_NORM = ["llama", "qwen3", "mistral", "gpt2", "opt", "phi", "gpt_neox"]
BASE = Base("", None, DEPTH)


@contextmanager
def multiplied(model: Any, scales: dict[int, float]) -> Iterator[None]:
    """The stream in front of these blocks is multiplied, by hooks."""
    with ExitStack() as stack:
        for block, alpha in scales.items():

            def times(_: Any, args: Any, kwargs: Any, alpha: float = alpha) -> Any:
                if args:
                    return (args[0] * alpha, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * alpha}

            stack.callback(blocks_of(model)[block].register_forward_pre_hook(times, with_kwargs=True).remove)
        yield


def put(model: Any, scales: list[Scale]) -> None:
    """Give a model the weights that hold these numbers."""
    for block, weights in new_weights(Decoder.of(model), scales).items():
        for name, values in weights.items():
            blocks_of(model)[block].get_parameter(name).data.copy_(values)


def entering(model: Any, block: int, batch: Batch) -> Tensor:
    """The stream in front of a block, of the real tokens, by a hook."""
    found: list[Tensor] = []
    handle = blocks_of(model)[block].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    logits(model, batch)
    handle.remove()
    return found[0][batch.mask].double()


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize(
    "actions", [{0: "drop", 3: "drop", 4: "drop"}, {1: "drop", 2: "attention-only", 4: "drop", 5: "mlp-only"}]
)
def test_divided_weights_are_a_multiplied_stream(
    family: str, actions: dict[int, Action], checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cuts, the second measured behind the first; every number is the mean of ratios by hooks and a loop."""
    monkeypatch.setattr(scale, "perplexities_behind", lambda *_: [2.0, 1.0])
    model = load_model(checkpoint_of(family))
    fitting = batches_of(seed=1)
    scales = fit_scales(Decoder.of(model), Plan.of(BASE, actions), fitting, fitting)
    done: dict[int, float] = {}
    for each in scales:
        behind, ratios = each.span[-1] + 1, []
        for batch in fitting:
            base = entering(model, behind, batch)
            with carried_out(model, family, actions), multiplied(model, done):
                short = entering(model, behind, batch)
            ratios += [(y.norm() / x.norm()).item() for x, y in zip(short, base, strict=True)]
        assert each.alpha == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
        done[behind] = each.alpha
    assert len(done) == 2
    batch = batches_of()[0]
    with carried_out(model, family, actions):
        plain = logits(model, batch)
        with multiplied(model, done):
            expected = logits(model, batch)
        put(model, scales)
        found = logits(model, batch)
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * largest)
    assert (plain - expected).abs().max() > 0.05 * largest


def test_a_span_that_multiplies_is_recovered(llama: Path) -> None:
    """Where the base's span only makes the stream longer, its logits come back; text of its own decides so."""
    model = load_model(llama)
    blocks = blocks_of(model)
    blocks[2].forward = lambda hidden_states, *_, **__: 5 * hidden_states
    blocks[3].forward = lambda hidden_states, *_, **__: 0.6 * hidden_states
    ids = greedy(model, batches_of()[0].ids, 30, cache=False)
    own = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    expected = logits(model, own)
    (found,) = fit_scales(Decoder.of(model), Plan.dropping(BASE, [2, 3]), [own], [own])
    assert found.span == (2, 3)
    assert found.alpha == pytest.approx(3, rel=1e-5)
    assert found.after == pytest.approx(perplexity(model, [own]), rel=1e-4)
    with carried_out(model, "llama", {2: "drop", 3: "drop"}):
        assert found.before == pytest.approx(perplexity(model, [own]), rel=1e-4)
        plain = logits(model, own)
        put(model, [found])
        torch.testing.assert_close(logits(model, own), expected, rtol=0, atol=1e-3)
    assert found.after < found.before
    assert (plain - expected).abs().max() > 0.1


def test_only_what_helps_and_can(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number where the deciding text gains nothing, for a span at the end, or for halves alone."""
    decoder, text = Decoder.of(load_model(llama)), batches_of()
    monkeypatch.setattr(scale, "perplexities_behind", lambda *_: [2.0, 2.0])
    assert fit_scales(decoder, Plan.dropping(BASE, [3]), text, text) == []
    monkeypatch.setattr(scale, "perplexities_behind", lambda *_: [2.0, 1.0])
    assert fit_scales(decoder, Plan.dropping(BASE, [5, 6]), text, text) == []
    assert fit_scales(decoder, Plan.of(BASE, {3: "mlp-only"}), text, text) == []


def test_what_a_fit_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line and in plain data; from a model on the disk the weights are the same."""
    monkeypatch.setattr(scale, "perplexities_behind", lambda *_: [2.0, 1.0])
    plan, text = Plan.of(BASE, {2: "drop", 3: "drop", 5: "mlp-only"}), batches_of()
    decoder = Decoder.of(load_model(llama))
    (found,) = fit_scales(decoder, plan, text, text)
    line = f"blocks 2-3 as {found.alpha:.4f} times the stream: perplexity 2.00 -> 1.00 on the text that decided"
    assert str(found) == line
    record = {"span": [2, 3], "alpha": found.alpha, "perplexity_before": 2.0, "perplexity_after": 1.0}
    assert json.loads(json.dumps(found.record())) == record
    expected = new_weights(decoder, [found])
    assert {block: list(weights) for block, weights in expected.items()} == {
        4: ["self_attn.o_proj.weight", "mlp.down_proj.weight"],
        5: ["mlp.down_proj.weight"],
        6: ["self_attn.o_proj.weight", "mlp.down_proj.weight"],
    }
    with open_on_disk(llama) as model:
        other = Decoder.of(model)
        weights = new_weights(other, fit_scales(other, plan, text, text))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma3_text", {}, "cannot heal in block 3 of gemma3_text: no projection in it adds straight"),
        ("mixtral", {}, "cannot heal in block 3 of mixtral: no projection in it adds straight"),
        ("opt", {"do_layer_norm_before": False}, "block 3 of opt .*does something without both"),
    ],
)
def test_families_that_are_refused(
    family: str, changes: dict[str, Any], message: str, checkpoint_of: Callable[..., Path]
) -> None:
    """A norm behind the branch, experts, and a norm behind the sum."""
    decoder = Decoder.of(load_model(checkpoint_of(family, **changes)))
    with pytest.raises(ShortcutError, match=message):
        fit_scales(decoder, Plan.dropping(BASE, [2]), batches_of(), batches_of())


def test_what_depends_on_the_length_is_refused(llama: Path) -> None:
    """A block without a norm in front of its MLP, a head without one, and plans of another kind."""
    plan, text = Plan.dropping(BASE, [2]), batches_of()
    model = load_model(llama)
    model.model.layers[1].post_attention_layernorm = nn.Identity()  # in front of the span: all the same
    model.model.layers[4].post_attention_layernorm = nn.Identity()
    with pytest.raises(
        ShortcutError, match="cannot scale block 4 of llama: what it adds depends on the stream's length"
    ):
        fit_scales(Decoder.of(model), plan, text, text)
    model = load_model(llama)
    model.model.norm = nn.Identity()
    with pytest.raises(ShortcutError, match="cannot scale llama: what it predicts depends on the length"):
        fit_scales(Decoder.of(model), plan, text, text)
    last = Plan.of(BASE, {2: "drop", 4: "last-token"})
    with pytest.raises(ShortcutError, match="scaling is for plans that drop blocks, or halves .*, not for last-token"):
        fit_scales(Decoder.of(load_model(llama)), last, text, text)
