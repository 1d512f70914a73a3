"""Folding: against the explicit map, for a span that is exactly linear, on several families, and what is refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import shortcut
from shortcut.checking.perplexity import perplexity
from shortcut.common.errors import ShortcutError
from shortcut.healing import fold
from shortcut.healing.cosine import turn
from shortcut.healing.fold import RIDGES, Fold, fit_folds, new_weights, solve
from shortcut.healing.streams import Streams, find_projection
from shortcut.live.decoder import Batch, Decoder
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.records.actions import Action
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.live.test_offload import open_on_disk
from tests.reference import blocks_of, greedy
from tests.scoring.test_halves import carried_out

pytestmark = pytest.mark.thorough

TEXT: dict[str, Any] = {"samples": 8, "length": 32, "questions": "none", "quiet": True}
MLP = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2", "phi": "mlp.fc2"}
ATTENTION = {
    "gpt2": "attn.c_proj",
    "gpt_neox": "attention.dense",
    "opt": "self_attn.out_proj",
    "phi": "self_attn.dense",
}
REFUSED = {"gemma3_text", "mixtral", "qwen3_moe"}  # a norm behind the MLP, experts
ACTIONS: tuple[Action, ...] = ("keep", "attention-only", "mlp-only")
TAKING = [
    (family, action)
    for family in FAMILIES
    for action in ACTIONS
    if family not in REFUSED or (action == "attention-only" and family != "gemma3_text")
]


def projection_of(family: str, action: str) -> str:
    """The last projection in what an action leaves of a block; by hand."""
    if action == "attention-only":
        return ATTENTION.get(family, "self_attn.o_proj")
    return MLP.get(family, "mlp.down_proj")


def batches_of(count: int = 6, length: int = 24, seed: int = 0) -> list[Batch]:
    """Random tokens, some rows shorter than others."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY - 3, (count, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [length - 7]] * (count // 2))
    return [Batch(ids[:2], mask[:2]), Batch(ids[2:], mask[2:])]


@contextmanager
def replaced(model: Any, family: str, actions: Mapping[int, str], folds: list[Fold]) -> Iterator[None]:
    """The model shortened by hooks, with M (T - 1) added to the stream by the projection of each map."""
    with ExitStack() as stack:
        stack.enter_context(carried_out(model, family, actions))
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


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_projection_is_found_or_refused(family: str, action: Action, checkpoint_of: Callable[..., Path]) -> None:
    """By trying: the last projection of what is left of a block, where nothing comes between it and the stream."""
    decoder = Decoder.of(load_model(checkpoint_of(family)))
    with torch.no_grad():
        streams = Streams.start(decoder, batches_of()[0])
        if (family, action) in TAKING:
            assert find_projection(decoder, 0, streams, action) == projection_of(family, action)
        else:
            with pytest.raises(ShortcutError, match=f"block 0 of {family}: no projection in it adds straight to the"):
                find_projection(decoder, 0, streams, action)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi", "gemma3_text"])
def test_the_projection_is_found_in_bfloat16(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """The rounding of a GPU's usual type is no sign of a norm, and a norm is still seen, also beside long states."""
    decoder = Decoder.of(load_model(checkpoint_of(family), Loading(dtype="bfloat16")))
    with torch.no_grad():
        streams = Streams.start(decoder, batches_of()[0])
        streams.short = streams.short.clone()
        streams.short[:, 0, 5] = 10000.0
        for action in ACTIONS:
            if family == "gemma3_text":
                with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
                    find_projection(decoder, 5, streams, action)
            else:
                assert find_projection(decoder, 5, streams, action) == projection_of(family, action)


@pytest.mark.parametrize(("family", "action"), TAKING)
def test_merged_weights_are_the_explicit_map(family: str, action: Action, checkpoint_of: Callable[..., Path]) -> None:
    """Biases, transposed weights and parallel blocks too, and what is left of halved ones; two spans."""
    model = load_model(checkpoint_of(family))
    actions: dict[int, Action] = {1: action, 2: "drop", 3: "drop", 4: action, 5: "drop"}
    generator = torch.Generator().manual_seed(0)
    width, name = model.config.hidden_size, projection_of(family, action)
    changes = [0.1 * torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    folds = [Fold((2, 3), 1, name, 0.1, changes[0], 0, 0), Fold((5,), 4, name, 0.1, changes[1], 0, 0)]
    batch = batches_of()[0]
    kept_whole = {number: each for number, each in actions.items() if each != "keep"}
    with replaced(model, family, kept_whole, folds):
        expected = logits(model, batch)
    with replaced(model, family, kept_whole, []):
        plain = logits(model, batch)
        for block, weights in new_weights(Decoder.of(model), folds).items():
            for weight, values in weights.items():
                blocks_of(model)[block].get_parameter(weight).data.copy_(values)
        merged = logits(model, batch)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert (merged - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "actions", "front"),
    [
        ("llama", {3: "drop", 4: "drop"}, 2),
        ("llama", {3: "attention-only"}, 3),
        ("gpt2", {3: "mlp-only", 4: "drop"}, 3),
        ("phi", {3: "mlp-only"}, 3),
        ("gpt_neox", {3: "attention-only", 4: "drop", 5: "drop"}, 3),
    ],
)
def test_the_fit_is_ridge_regression(
    family: str,
    actions: dict[int, Action],
    front: int,
    checkpoint_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against numpy, on states by hooks: augmented least squares for the ridge that was chosen."""
    prices = iter([2.0, *(1.0 + abs(ridge - 0.01) for ridge in RIDGES)])
    monkeypatch.setattr(fold, "_perplexity", lambda *_: next(prices))
    model = load_model(checkpoint_of(family))
    plan, blocks, fitting = Plan.of(Base("", None, DEPTH), actions), blocks_of(model), batches_of(seed=1)
    name, behind = projection_of(family, actions.get(front, "keep")), blocks[max(actions) + 1]
    states: dict[str, list[Tensor]] = {"added": [], "base": [], "short": []}

    def noted(what: str) -> Any:
        return behind.register_forward_pre_hook(
            lambda _, args, kwargs: states[what].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )

    for batch in fitting:
        handle = noted("base")
        logits(model, batch)
        handle.remove()
        with carried_out(model, family, actions):
            handles = [
                noted("short"),
                blocks[front].get_submodule(name).register_forward_hook(lambda _, __, out: states["added"].append(out)),
            ]
            logits(model, batch)
        for handle in handles:
            handle.remove()
    (found,) = fit_folds(Decoder.of(model), plan, fitting, fitting)
    assert (found.span, found.block, found.module, found.ridge) == (tuple(actions), front, name, 0.01)
    rows = {
        name: torch.cat([each[batch.mask] for each, batch in zip(found, fitting, strict=True)]).double().numpy()
        for name, found in states.items()
    }
    added, missing = rows["added"], rows["base"] - rows["short"]
    weight = np.sqrt(found.ridge * np.mean(np.sum(added**2, axis=0)))
    left = np.concatenate([added, weight * np.eye(added.shape[1])])
    right = np.concatenate([missing, np.zeros((added.shape[1], added.shape[1]))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    np.testing.assert_allclose(found.change.numpy(), expected, atol=1e-4)


def test_perplexities_are_those_of_the_shortened_model(llama: Path) -> None:
    """Without maps, with each map more, and with all of them in its weights; a span without a front gets none."""
    model = load_model(llama)
    ids = greedy(model, batches_of()[0].ids, 30, cache=False)
    own = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    actions: dict[int, Action] = {0: "drop", 2: "attention-only", 3: "drop", 5: "mlp-only"}
    folds = fit_folds(Decoder.of(model), Plan.of(Base("", None, DEPTH), actions), [own], [own])
    assert [each.span for each in folds] == [(2, 3), (5,)]
    with carried_out(model, "llama", actions):
        prices = [perplexity(model, [own])]
        for each in folds:
            for weight, values in each.weights(blocks_of(model)[each.block]).items():
                blocks_of(model)[each.block].get_parameter(weight).data.copy_(values)
            prices.append(perplexity(model, [own]))
    assert prices == sorted(prices, reverse=True)
    assert [each.before for each in folds] == pytest.approx(prices[:-1], rel=1e-3)
    assert [each.after for each in folds] == pytest.approx(prices[1:], rel=1e-3)


def test_a_map_that_does_not_help_is_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no ridge lowers the perplexity of the deciding text, there is none, of spans and of halves."""
    monkeypatch.setattr(fold, "_perplexity", lambda *_: 2.0)
    decoder, text = Decoder.of(load_model(llama)), batches_of()
    for actions in ({3: "drop"}, {3: "attention-only"}):
        assert fit_folds(decoder, Plan.of(Base("", None, DEPTH), actions), text, text) == []


def random_streams(width: int, tokens: int = 200) -> list[Streams]:
    """Two batches of states, a few tokens of which are very long; what is behind the mask is absurd."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(width, width, generator=generator)
    found = []
    for _ in range(2):
        short, added, noise = (torch.randn(2, tokens, width, generator=generator) for _ in range(3))
        lengths = torch.where(torch.rand(2, tokens, 1, generator=generator) < 0.05, 30.0, 1.0)
        mask = torch.arange(tokens) < torch.tensor([[tokens], [tokens - 9]])
        lengths = torch.where(mask[..., None], lengths, 1e6)
        base = short + added @ hidden + 2 * noise
        batch = Batch(torch.zeros(2, tokens, dtype=torch.long), mask)
        found.append(Streams(batch, [], lengths * base, lengths * short, lengths * added))
    return found


def plain_cosine(streams: list[Streams], change: Tensor) -> Tensor:
    """Mean cosine distance over real tokens, by torch's own function."""
    rows = [
        torch.cat([getattr(s, name)[s.batch.mask] for s in streams]).double() for name in ("added", "short", "base")
    ]
    return (1 - torch.cosine_similarity(rows[1] + rows[0] @ change, rows[2], dim=-1)).mean()


def test_the_cosine_objective_goes_downhill_to_the_bottom() -> None:
    """Below least squares from the first step, never up, and to where autograd finds no slope."""
    streams = random_streams(7)
    start = solve(streams)[1e-5]
    changes = [turn(streams, start, 0.0, steps=steps, settled=0.0) for steps in (0, 1, 2, 3, 5, 10, 100)]
    losses = [plain_cosine(streams, change).item() for change in changes]
    assert losses[0] == plain_cosine(streams, start).item()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    assert plain_cosine(streams, turn(streams, start, 0.0)).item() == pytest.approx(losses[-1], rel=1e-2)
    bottom = changes[-1].requires_grad_()
    (slope,) = torch.autograd.grad(plain_cosine(streams, bottom), bottom)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_cosine_objective_is_gradient_descent(ridge: float) -> None:
    """The same map as hundreds of plain steps down the slope that autograd gives, ridge and all."""
    streams = random_streams(3)
    start = solve(streams)[ridge]
    rows = [torch.cat([getattr(s, name)[s.batch.mask] for s in streams]).double() for name in ("added", "base")]
    unit = (rows[0].square().sum(-1) / rows[1].square().sum(-1)).mean() / 3
    change = start.clone().requires_grad_()
    for _ in range(600):
        loss = plain_cosine(streams, change) + ridge * unit * change.square().sum() / 2
        (slope,) = torch.autograd.grad(loss, change)
        change = (change - 2 * slope).detach().requires_grad_()
    found = turn(streams, start, ridge, steps=100, settled=0.0)
    torch.testing.assert_close(found, change.detach(), rtol=0, atol=1e-4)
    assert (change - start).abs().max() > 0.01


def test_what_a_fit_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lines and in plain data, halves and cosine too; from a model on the disk the weights are the same."""
    monkeypatch.setattr(fold, "_perplexity", lambda *how: 2.0 if how[-1] is None else 1.0)
    plan = Plan.of(Base("", None, DEPTH), {2: "drop", 3: "attention-only", 4: "mlp-only", 5: "drop"})
    text = batches_of()
    decoder = Decoder.of(load_model(llama))
    found = fit_folds(decoder, plan, text, text, objective="cosine")
    end = "ridge 1e-05, by cosine, perplexity 2.00 -> 1.00 on the text that decided"
    assert list(map(str, found)) == [
        f"blocks 2 into mlp.down_proj of block 1: {end}",
        f"half of block 3 into self_attn.o_proj of block 3: {end}",
        f"half of block 4 and blocks 5 into mlp.down_proj of block 4: {end}",
    ]
    record = found[2].record()
    assert record == json.loads(json.dumps(record))
    assert record == {
        "span": [4, 5],
        "block": 4,
        "module": "mlp.down_proj",
        "ridge": 1e-5,
        "objective": "cosine",
        "perplexity_before": 2.0,
        "perplexity_after": 1.0,
    }
    expected = new_weights(decoder, found)
    assert {block: list(weights) for block, weights in expected.items()} == {
        1: ["mlp.down_proj.weight"],
        3: ["self_attn.o_proj.weight"],
        4: ["mlp.down_proj.weight"],
    }
    with open_on_disk(llama) as model:
        other = Decoder.of(model)
        weights = new_weights(other, fit_folds(other, plan, text, text, objective="cosine"))
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)


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
    actions = dict.fromkeys(plan.dropped, "drop")
    with replaced(model, "llama", actions, []):
        plain = logits(model, batch)
    with replaced(model, "llama", actions, [found]):
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
    with pytest.raises(ShortcutError, match="nothing that fold can do lowers the perplexity"):
        shortcut.heal(tmp_path / "first", tmp_path / "out", **TEXT)
    last = Plan.of(Base("", None, DEPTH), {2: "drop", 4: "last-token"})
    with pytest.raises(ShortcutError, match="folding is for plans that drop blocks, or halves .*, not for last-token"):
        fit_folds(Decoder.of(load_model(llama)), last, batches_of(), batches_of())
    with pytest.raises(ShortcutError, match="has no record"):
        shortcut.heal(llama, tmp_path / "out", **TEXT)
    shortcut.cut(checkpoint_of("mixtral"), tmp_path / "experts", drop="2", quiet=True)
    with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
        shortcut.heal(tmp_path / "experts", tmp_path / "out", **TEXT)
    assert not (tmp_path / "out").exists()
