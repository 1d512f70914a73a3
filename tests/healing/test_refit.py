"""Refitting and folding: against least squares elsewhere, for a span that is linear, and what is refused."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
from shortcut.healing import refit
from shortcut.healing.cosine import Rows, turn
from shortcut.healing.projections import find_normed, find_projection
from shortcut.healing.refit import LATER, RIDGES, START, Refit, fit_refits, new_weights
from shortcut.healing.saved_fit import SavedFit
from shortcut.healing.squares import Squares
from shortcut.healing.streams import Streams
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.records.actions import Action
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.live.test_offload import open_on_disk
from tests.reference import blocks_of, greedy
from tests.scoring.test_halves import carried_out

Array = np.ndarray[Any, Any]
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
def replaced(model: Any, family: str, actions: Mapping[int, str], refits: list[Refit]) -> Iterator[None]:
    """The model shortened by hooks, with what every change adds to what its projection gives."""
    with ExitStack() as stack:
        stack.enter_context(carried_out(model, family, actions))
        for each in refits:
            for name, change in each.changes.items():

                def changed(module: Any, inputs: Any, output: Tensor, change: Tensor = change) -> Tensor:
                    added = inputs[0].double() @ change[: inputs[0].shape[-1]]
                    return output + (added if module.bias is None else added + change[-1]).to(output.dtype)

                module = blocks_of(model)[each.block].get_submodule(name)
                stack.callback(module.register_forward_hook(changed).remove)
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


def projections_of(family: str, action: str) -> list[str]:
    """Those that are solved, in the order in which they run; by hand."""
    if action == "keep" and family not in REFUSED:
        return [projection_of(family, "attention-only"), projection_of(family, "mlp-only")]
    return [projection_of(family, "attention-only" if action == "keep" else action)]


@pytest.mark.parametrize(("family", "action"), TAKING)
def test_merged_weights_give_the_fitted_streams(
    family: str, action: Action, checkpoint_of: Callable[..., Path]
) -> None:
    """Biases, transposed weights and parallel blocks too, and what is left of halved ones; two spans."""
    model = load_model(checkpoint_of(family))
    actions: dict[int, Action] = {1: action, 2: "drop", 3: "drop", 4: action, 5: "drop"}
    generator, width = torch.Generator().manual_seed(0), model.config.hidden_size

    def draw(block: int) -> dict[str, Tensor]:
        modules = {name: blocks_of(model)[block].get_submodule(name) for name in projections_of(family, action)}
        rows = {name: each.weight.numel() // width + (each.bias is not None) for name, each in modules.items()}
        return {name: 0.1 * torch.randn(n, width, generator=generator).double() for name, n in rows.items()}

    refits = [Refit("refit", (2, 3), 1, 0.1, draw(1), 0, 0), Refit("refit", (5,), 4, 0.1, draw(4), 0, 0)]
    batch = batches_of()[0]
    gone = {number: each for number, each in actions.items() if each != "keep"}
    with replaced(model, family, gone, refits):
        expected = logits(model, batch)
    with replaced(model, family, gone, []):
        plain = logits(model, batch)
        put(model, new_weights(Decoder.of(model), refits))
        merged = logits(model, batch)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert (merged - plain).abs().max() > 0.01


def put(model: Any, weights: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Give blocks of a live model other weights."""
    for block, found in weights.items():
        for name, values in found.items():
            blocks_of(model)[block].get_parameter(name).data.copy_(values)


def cheaper_each_time(monkeypatch: pytest.MonkeyPatch, best: int = 0) -> None:
    """Have every change pay, so that none is left: of several, most that of this place. Random weights know nothing."""
    price = 2.0

    def prices(*how: Any) -> list[float]:
        nonlocal price
        found, unchanged = [price] * len(how[-1]), int(price == 2)  # which is tried at first only
        price /= 2
        found[min(unchanged + best, len(found) - 1)] = price
        return found

    monkeypatch.setattr(refit, "perplexities_behind", prices)


@dataclass
class Seen:
    """Rows of the real tokens: what went into projections of a block, and the states behind it and behind the span."""

    inputs: dict[str, Array]
    short: Array
    base: Array


def look(
    base: Any,
    short: Any,
    family: str,
    actions: Mapping[int, str],
    fitting: list[Batch],
    names: list[str],
    front: int = 3,
) -> Seen:
    """What two models do, the second of them shortened, by hooks of our own; projections are those of a block."""
    states = dict[str, list[Tensor]]()

    def note(what: str, states_of: Any) -> Any:
        return lambda *call: states.setdefault(what, []).append(states_of(*call))

    for batch in fitting:
        with ExitStack() as stack:
            first = note("base", lambda _, args, kwargs: args[0] if args else kwargs["hidden_states"])
            behind = blocks_of(base)[max(actions) + 1]
            stack.callback(behind.register_forward_pre_hook(first, with_kwargs=True).remove)
            logits(base, batch)
        with ExitStack() as stack:
            stack.enter_context(carried_out(short, family, actions))
            first = note("short", lambda _, args, kwargs: args[0] if args else kwargs["hidden_states"])
            behind = blocks_of(short)[max(actions) + 1]
            stack.callback(behind.register_forward_pre_hook(first, with_kwargs=True).remove)
            for name in names:
                module = blocks_of(short)[front].get_submodule(name)
                stack.callback(module.register_forward_hook(note(name, lambda _, args, __: args[0])).remove)
            logits(short, batch)
    rows = {
        name: torch.cat([each.reshape(*b.mask.shape, -1)[b.mask] for each, b in zip(found, fitting, strict=True)])
        for name, found in states.items()
    }
    values = {name: each.double().numpy() for name, each in rows.items()}
    for name in names:
        if blocks_of(short)[front].get_submodule(name).bias is not None:
            values[name] = np.hstack([values[name], np.ones((len(values[name]), 1))])
    return Seen({name: values[name] for name in names}, values["short"], values["base"])


def least_squares(inputs: Array, missing: Array, base: Array, ridge: float) -> Array:
    """Ridge regression of parts of the base's lengths, as plain least squares with a row more for every input."""
    inputs, missing = (rows / np.linalg.norm(base, axis=1, keepdims=True) for rows in (inputs, missing))
    weight = np.sqrt(ridge * np.mean(np.sum(inputs**2, axis=0)))
    left = np.concatenate([inputs, weight * np.eye(inputs.shape[1])])
    right = np.concatenate([missing, np.zeros((inputs.shape[1], missing.shape[1]))])
    return np.linalg.lstsq(left, right, rcond=None)[0]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_text"])
def test_the_fit_is_least_squares(
    family: str, action: Action, checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy, on states by hooks: attention's output with the MLP's, then the MLP's on what the first gives it.

    Experts stay as they are, so that a block that keeps nothing else is refused.
    """
    cheaper_each_time(monkeypatch, best=2)
    model = load_model(checkpoint_of(family))
    actions: dict[int, Action] = {3: action, 4: "drop", 5: "drop"}
    gone = {number: each for number, each in actions.items() if each != "keep"}
    plan, fitting = Plan.of(Base("", None, DEPTH), gone), batches_of(seed=1)
    if family in REFUSED and action == "mlp-only":
        with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
            fit_refits(Decoder.of(model), plan, fitting, fitting)
        return
    found, *later = fit_refits(Decoder.of(model), plan, fitting, fitting)
    assert [each.block for each in later] == [6]
    names = projections_of(family, action)
    assert (found.span, found.block, list(found.changes)) == (tuple(sorted(gone)), 3, names)
    assert found.ridge == RIDGES[2]
    short = load_model(checkpoint_of(family))
    for place, name in enumerate(names):
        seen = look(model, short, family, gone, fitting, names)
        inputs = np.hstack([seen.inputs[each] for each in names[place:]])
        ridge = found.ridge if name == names[-1] else START
        expected = least_squares(inputs, seen.base - seen.short, seen.base, ridge)[: seen.inputs[name].shape[1]]
        np.testing.assert_allclose(found.changes[name].numpy(), expected, atol=1e-3 * np.abs(expected).max())
        done = Refit("refit", (), 3, 0, {name: found.changes[name]}, 0, 0)
        put(short, new_weights(Decoder.of(short), [done]))


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_a_norm_behind_a_projection_is_found(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """In Gemma 3 and OLMo 2, with what it multiplies states by; nowhere else."""
    decoder = Decoder.of(load_model(checkpoint_of(family)))
    with torch.no_grad():
        streams = Streams.start(decoder, batches_of()[0])
        found = [find_normed(decoder, 3, streams, half) for half in ("attention-only", "mlp-only")]
    normed = {"gemma3_text": "post_attention_layernorm", "olmo2": "post_attention_layernorm"}
    if family in normed:
        mlp = "post_feedforward_layernorm"
        assert found == [("self_attn.o_proj", normed[family]), ("mlp.down_proj", mlp)]
    else:
        assert found == [None, None]


def test_the_fit_through_a_norm(checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gemma 3: the second of two steps against weighted least squares in numpy; both bring the stream nearer."""
    family = "gemma3_text"
    cheaper_each_time(monkeypatch, best=1)
    model, short = load_model(checkpoint_of(family)), load_model(checkpoint_of(family))
    gone, fitting = {4: "drop"}, batches_of(40, 48)
    found, *_ = fit_refits(Decoder.of(model), Plan.dropping(Base("", None, DEPTH), [4]), fitting, fitting)
    names = ["self_attn.o_proj", "mlp.down_proj"]
    assert list(found.changes) == names
    errors = []
    for name in names:
        seen = look(model, short, family, gone, fitting, [name])
        errors.append(np.square(seen.base - seen.short).sum())
        if name == names[1]:
            norm, z = blocks_of(short)[3].post_feedforward_layernorm, seen.inputs[name]
            z = z @ blocks_of(short)[3].get_submodule(name).weight.detach().double().numpy().T
            scales = 1 / np.sqrt(np.square(z).mean(-1, keepdims=True) + model.config.rms_norm_eps)
            gains = 1 + norm.weight.detach().double().numpy()
            expected = least_squares(
                seen.inputs[name] * scales, (seen.base - seen.short) / gains, seen.base, found.ridge
            )
            np.testing.assert_allclose(found.changes[name].numpy(), expected, atol=1e-3 * np.abs(expected).max())
        done = Refit("refit", (), 3, 0, {name: found.changes[name]}, 0, 0)
        put(short, new_weights(Decoder.of(short), [done]))
    seen = look(model, short, family, gone, fitting, [])
    errors.append(np.square(seen.base - seen.short).sum())
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_folding_is_ridge_regression_on_what_a_projection_adds(
    family: str, checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against numpy: a map T of the MLP's output, as W T in the place of W."""
    cheaper_each_time(monkeypatch, best=1)
    model, name = load_model(checkpoint_of(family)), projection_of(family, "keep")
    gone, fitting = {4: "drop"}, batches_of(seed=1)
    (found,) = fit_refits(Decoder.of(model), Plan.dropping(Base("", None, DEPTH), [4]), fitting, fitting, method="fold")
    assert (found.block, list(found.changes)) == (3, [name])
    seen = look(model, model, family, gone, fitting, [name])
    module = blocks_of(model)[3].get_submodule(name)
    weight = module.weight if family == "gpt2" else module.weight.T
    parts = [weight] if module.bias is None else [weight, module.bias[None]]
    weights = torch.cat(parts).detach().double().numpy()
    change = least_squares(seen.inputs[name] @ weights, seen.base - seen.short, seen.base, found.ridge)
    np.testing.assert_allclose(
        found.changes[name].numpy(), weights @ change, atol=1e-3 * np.abs(weights @ change).max()
    )


def test_perplexities_are_those_of_the_shortened_model(llama: Path) -> None:
    """Without maps, with each map more, and with all of them in its weights; a span without a front gets none."""
    model = load_model(llama)
    ids = greedy(model, batches_of()[0].ids, 30, cache=False)
    own = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    actions: dict[int, Action] = {0: "drop", 2: "attention-only", 3: "drop", 5: "mlp-only"}
    found = fit_refits(Decoder.of(model), Plan.of(Base("", None, DEPTH), actions), [own], [own])
    assert {each.span for each in found} >= {(2, 3), (5,)}
    with carried_out(model, "llama", actions):
        prices = [perplexity(model, [own])]
        for each in found:
            put(model, {each.block: each.weights(blocks_of(model)[each.block])})
            prices.append(perplexity(model, [own]))
    assert prices == sorted(prices, reverse=True)
    assert [each.before for each in found] == pytest.approx(prices[:-1], rel=1e-3)
    assert [each.after for each in found] == pytest.approx(prices[1:], rel=1e-3)


def test_a_map_that_does_not_help_is_left(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no ridge lowers the perplexity of the deciding text, there is none, of spans and of halves."""
    monkeypatch.setattr(refit, "perplexities_behind", lambda *how: [2.0] * len(how[-1]))
    decoder, text = Decoder.of(load_model(llama)), batches_of()
    for actions in ({3: "drop"}, {3: "attention-only"}):
        assert fit_refits(decoder, Plan.of(Base("", None, DEPTH), actions), text, text) == []


def random_rows(width: int, tokens: int = 800) -> Rows:
    """States of tokens, a few of which are very long."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(width, width, generator=generator)
    short, added, noise = (torch.randn(tokens, width, generator=generator) for _ in range(3))
    lengths = torch.where(torch.rand(tokens, 1, generator=generator) < 0.05, 30.0, 1.0)
    base = short + added @ hidden + 2 * noise
    return Rows(*((lengths * each).double() for each in (added, short, base)))


def solved(rows: Rows, ridge: float) -> Tensor:
    """Least squares from what is added to what is missing."""
    sums = Squares(rows.added.shape[1], rows.added.shape[1], torch.device("cpu"))
    sums.add(rows.added, rows.base - rows.short, rows.base)
    return sums.solve([ridge])[ridge]


def plain_cosine(rows: Rows, change: Tensor) -> Tensor:
    """Mean cosine distance, by torch's own function."""
    return (1 - torch.cosine_similarity(rows.short + rows.added @ change, rows.base, dim=-1)).mean()


def test_the_cosine_objective_goes_downhill_to_the_bottom() -> None:
    """Below least squares from the first step, never up, and to where autograd finds no slope."""
    rows = random_rows(7)
    start = solved(rows, 1e-5)
    changes = [turn(rows, start, 0.0, steps=steps, settled=0.0) for steps in (0, 1, 2, 3, 5, 10, 100)]
    losses = [plain_cosine(rows, change).item() for change in changes]
    assert losses[0] == plain_cosine(rows, start).item()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]
    assert plain_cosine(rows, turn(rows, start, 0.0)).item() == pytest.approx(losses[-1], rel=1e-2)
    bottom = changes[-1].requires_grad_()
    (slope,) = torch.autograd.grad(plain_cosine(rows, bottom), bottom)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_cosine_objective_is_gradient_descent(ridge: float) -> None:
    """The same map as hundreds of plain steps down the slope that autograd gives, ridge and all."""
    rows = random_rows(3)
    start = solved(rows, ridge)
    unit = (rows.added.square().sum(-1) / rows.base.square().sum(-1)).mean() / 3
    change = start.clone().requires_grad_()
    for _ in range(600):
        loss = plain_cosine(rows, change) + ridge * unit * change.square().sum() / 2
        (slope,) = torch.autograd.grad(loss, change)
        change = (change - 2 * slope).detach().requires_grad_()
    found = turn(rows, start, ridge, steps=100, settled=0.0)
    torch.testing.assert_close(found, change.detach(), rtol=0, atol=1e-4)
    assert (change - start).abs().max() > 0.01


def test_what_a_fit_says(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lines and in plain data, halves and cosine too."""
    cheaper_each_time(monkeypatch)
    plan = Plan.of(Base("", None, DEPTH), {2: "drop", 3: "attention-only", 4: "mlp-only", 5: "drop"})
    text, decoder = batches_of(), Decoder.of(load_model(llama))
    found = fit_refits(decoder, plan, text, text, method="fold", objective="cosine")
    how = f"ridge {RIDGES[0]:g}, by cosine, perplexity"
    assert list(map(str, found)) == [
        f"blocks 2 into mlp.down_proj of block 1: {how} 2.00 -> 1.00 on the text that decided",
        f"half of block 3 into self_attn.o_proj of block 3: {how} 1.00 -> 0.50 on the text that decided",
        f"half of block 4 and blocks 5 into mlp.down_proj of block 4: {how} 0.50 -> 0.25 on the text that decided",
    ]
    record = found[2].record()
    assert record == json.loads(json.dumps(record))
    assert record == {
        "span": [4, 5],
        "block": 4,
        "modules": ["mlp.down_proj"],
        "ridge": RIDGES[0],
        "objective": "cosine",
        "perplexity_before": 0.5,
        "perplexity_after": 0.25,
    }
    assert {block: list(weights) for block, weights in new_weights(decoder, found).items()} == {
        1: ["mlp.down_proj.weight"],
        3: ["self_attn.o_proj.weight"],
        4: ["mlp.down_proj.weight"],
    }
    cheaper_each_time(monkeypatch)
    *_, last = fit_refits(decoder, plan, text, text)
    both = "self_attn.o_proj and mlp.down_proj of block 6"
    assert str(last) == f"{both}: ridge {LATER[0]:g}, perplexity 0.25 -> 0.12 on the text that decided"


@pytest.mark.parametrize("options", [{}, {"method": "fold"}, {"method": "fold", "objective": "cosine"}], ids=str)
def test_from_the_disk_as_in_memory(options: dict[str, Any], llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose blocks are read when they run gets the same weights."""
    plan, text = Plan.of(Base("", None, DEPTH), {2: "drop", 3: "attention-only", 5: "drop"}), batches_of()
    cheaper_each_time(monkeypatch)
    decoder = Decoder.of(load_model(llama))
    expected = new_weights(decoder, fit_refits(decoder, plan, text, text, **options))
    cheaper_each_time(monkeypatch)
    with open_on_disk(llama) as model:
        other = Decoder.of(model)
        weights = new_weights(other, fit_refits(other, plan, text, text, **options))
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


def test_what_was_found_before_a_kill_is_not_found_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that goes on gives what one gives that was never stopped, and solves only what is left."""
    plan, text, decoder = Plan.dropping(Base("", None, DEPTH), [1, 4]), batches_of(), Decoder.of(load_model(llama))
    whole = fit_refits(decoder, plan, text, text, saved=SavedFit("whole"))
    solve, times = Squares.solve, 0

    def stop(*how: Any) -> Any:
        nonlocal times
        times += 1
        if times > 4:
            raise KeyboardInterrupt
        return solve(*how)

    monkeypatch.setattr(Squares, "solve", stop)
    with pytest.raises(KeyboardInterrupt):
        fit_refits(decoder, plan, text, text, saved=SavedFit("stopped"))
    times = -100
    again = SavedFit("stopped")
    assert sorted(again.found) == [0, 2]
    found = fit_refits(decoder, plan, text, text, saved=again)
    assert times == -100 + 6  # two for each of the blocks 3, 5 and 6
    assert [(each.block, each.before, each.after) for each in found] == [
        (each.block, each.before, each.after) for each in whole
    ]
    torch.testing.assert_close(new_weights(decoder, found), new_weights(decoder, whole), rtol=0, atol=0)
    again.folder.joinpath("0.safetensors").write_text("damaged")
    assert sorted(SavedFit("stopped").found) == [2, 3, 5, 6]
    again.forget()
    assert not again.folder.exists()


def test_a_span_that_is_linear_is_recovered(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base's span is x + A V + H W, of the heads' outputs and the MLP's inner ones, logits are the base's."""
    monkeypatch.setattr(refit, "RIDGES", (1e-12,))
    monkeypatch.setattr(refit, "START", 1e-12)
    cheaper_each_time(monkeypatch)
    model = load_model(llama)
    blocks = blocks_of(model)
    width, generator = model.config.hidden_size, torch.Generator().manual_seed(3)
    inner: list[Tensor] = []
    behind: dict[int, tuple[Tensor, Tensor]] = {}  # block 2's output, by its id, with what went into its projection
    blocks[2].mlp.down_proj.register_forward_hook(lambda _, args, __: inner.append(args[0]))
    hidden = 0.2 * torch.randn(model.config.intermediate_size, width, generator=generator)
    blocks[2].register_forward_hook(lambda _, __, out: behind.update({id(out): (out, inner[-1])}))
    blocks[3].forward = lambda hidden_states, *_, **__: hidden_states + behind[id(hidden_states)][1] @ hidden
    decoder = Decoder.of(model)
    fitting = batches_of(40, 48)
    found, *_ = fit_refits(decoder, Plan.dropping(Base("", None, DEPTH), [3]), fitting, batches_of(seed=7))
    torch.testing.assert_close(found.changes["mlp.down_proj"].float(), hidden, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.changes["self_attn.o_proj"], torch.zeros(width, width).double(), rtol=0, atol=1e-4)
    batch = batches_of(seed=9)[0]
    expected = logits(model, batch)
    with replaced(model, "llama", {3: "drop"}, []):
        plain = logits(model, batch)
    with replaced(model, "llama", {3: "drop"}, [found]):
        torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1


def test_the_road(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """heal rewrites two tensors of a block, leaves SHORT alone, and what comes out is checked as the base with them."""
    cheaper_each_time(monkeypatch)
    shortcut.cut(llama, tmp_path / "short", drop="2-3,5", quiet=True)
    before = load_file(tmp_path / "short" / "model.safetensors")
    report = shortcut.heal(tmp_path / "short", tmp_path / "out", **TEXT)
    after = load_file(tmp_path / "out" / "model.safetensors")
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == set(report.check.healed) != set()
    assert {name.removeprefix("model.layers.") for name in differing} == {
        f"{block}.{name}.weight" for block in (1, 2, 3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    untouched = load_file(tmp_path / "short" / "model.safetensors")
    assert all(torch.equal(before[name], untouched[name]) for name in before)
    assert report.check.logit_difference is not None
    assert report.check.logit_difference < 1e-3
    assert "tensors: all but 6 healed ones," in str(report)
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
        shortcut.heal(tmp_path / "first", tmp_path / "out", method="fold", **TEXT)
    last = Plan.of(Base("", None, DEPTH), {2: "drop", 4: "last-token"})
    with pytest.raises(ShortcutError, match="refitting is for plans that drop .*, not for last-token"):
        fit_refits(Decoder.of(load_model(llama)), last, batches_of(), batches_of())
    with pytest.raises(ShortcutError, match="has no record"):
        shortcut.heal(llama, tmp_path / "out", **TEXT)
    shortcut.cut(checkpoint_of("mixtral"), tmp_path / "experts", drop="2", quiet=True)
    with pytest.raises(ShortcutError, match="no projection in it adds straight to the stream"):
        shortcut.heal(tmp_path / "experts", tmp_path / "out", method="fold", **TEXT)
    assert not (tmp_path / "out").exists()
