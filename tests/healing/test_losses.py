"""What training minimises, and its gradients, against the plainest way to write them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import shortcut
from shortcut.healing import losses
from shortcut.healing.lora import Adapter, adapt, projections
from shortcut.healing.losses import Notes, Student, Teacher, cuts
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.reference import blocks_of

PLAN = Plan.dropping(Base("", None, DEPTH), [2, 3, 5])


@pytest.fixture(autouse=True)
def few_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one smaller."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 7 * VOCABULARY)


def a_batch() -> Batch:
    """Two rows, one padded."""
    ids = torch.randint(4, VOCABULARY - 3, (2, 17), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.arange(17) < torch.tensor([[17], [11]]))


def learning(folder: Path, rank: int = 3) -> tuple[Decoder, Adapter]:
    """A model with low-rank changes that are not zero."""
    decoder = Decoder.of(load_model(folder))
    adapter = adapt(decoder, rank=rank, alpha=6, dropout=0.0, tune="all", seed=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in adapter.trained.values():
            weight.add_(0.05 * torch.randn_like(weight))
    return decoder, adapter


def plain_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every real token that has a next one, in double precision; and which that is."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits.double()
    rows = [row[: int(mask.sum()) - 1] for row, mask in zip(logits, batch.mask, strict=True)]
    nexts = [row[1 : int(mask.sum())] for row, mask in zip(batch.ids, batch.mask, strict=True)]
    return torch.cat(rows), torch.cat(nexts)


def gradients(loss: Tensor, adapter: Adapter) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(adapter.trained.values()), allow_unused=True))


def assert_same(found: Tensor, expected: Tensor, adapter: Adapter) -> None:
    """The loss, and its gradient of every weight that is trained."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
    pairs = list(zip(gradients(found, adapter), gradients(expected, adapter), strict=True))
    assert all(other is not None and other.abs().max() > 0 for _, other in pairs)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other.to(mine), rtol=1e-3, atol=1e-5 * float(other.abs().max()))


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_next_tokens(family: str, recompute: bool, checkpoint_of: Callable[..., Path]) -> None:
    """Chunks, and states that are computed again, change neither the loss nor the gradients."""
    decoder, adapter = learning(checkpoint_of(family))
    batch = a_batch()
    logits, nexts = plain_logits(decoder.model, batch)
    found = Student(decoder, None, recompute=recompute)([0, 1], batch)
    assert_same(found, functional.cross_entropy(logits, nexts), adapter)


@pytest.fixture
def pair(llama: Path, tmp_path: Path) -> tuple[Any, Decoder, Adapter]:
    """A base, and what is left of it without three blocks, learning."""
    shortcut.cut(llama, tmp_path / "short", drop="2-3,5", quiet=True)
    return load_model(llama), *learning(tmp_path / "short")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_distance_from_the_teacher(pair: tuple[Any, Decoder, Adapter], temperature: float) -> None:
    """KL(base ‖ shortened) of softened predictions, times the temperature's square."""
    base, decoder, adapter = pair
    batch, teacher = a_batch(), Teacher(Decoder.of(pair[0]), PLAN, temperature)
    with torch.no_grad():
        aims = torch.softmax(plain_logits(base, batch)[0] / temperature, dim=-1)
    own = torch.log_softmax(plain_logits(decoder.model, batch)[0] / temperature, dim=-1)
    expected = (aims * (aims.log() - own)).sum(dim=-1).mean() * temperature**2
    assert_same(Student(decoder, teacher, recompute=False)([0, 1], batch), expected, adapter)


@pytest.mark.parametrize("known", [9, VOCABULARY])
def test_the_likeliest_tokens_of_the_teacher(
    pair: tuple[Any, Decoder, Adapter], known: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noted on the disk once; all others count as one. Where all tokens are noted, nothing is lost."""
    base, decoder, adapter = pair
    batch, notes = a_batch(), Notes(tmp_path, known, 1.5)
    teacher = Decoder.of(base)
    notes.take(teacher, [4, 8], batch)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "0000004.safetensors",
        "0000008.safetensors",
    ]
    with torch.no_grad():
        aims = torch.softmax(plain_logits(base, batch)[0] / 1.5, dim=-1)
    own = torch.softmax(plain_logits(decoder.model, batch)[0] / 1.5, dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    for wanted, given in zip(aims, own, strict=True):
        top = sorted(range(VOCABULARY), key=lambda token, p=wanted: -float(p[token]))[:known]
        total = total + sum(wanted[t] * (wanted[t] / given[t]).log() for t in top)
        if known < VOCABULARY:
            rest, other = 1 - sum(wanted[t] for t in top), 1 - sum(given[t] for t in top)
            total = total + rest * (rest / other).log()
    expected = total / len(aims) * 1.5**2
    assert_same(Student(decoder, notes, recompute=False)([4, 8], batch), expected, adapter)
    monkeypatch.setattr(Decoder, "states", lambda *_: pytest.fail("noted twice"))
    notes.take(teacher, [4, 8], batch)


def test_states_behind_the_cuts_are_matched(pair: tuple[Any, Decoder, Adapter]) -> None:
    """‖own - base's‖² / ‖base's‖² in front of blocks 4 and 6 of the base, 2 and 3 of the shortened model, by hooks."""
    base, decoder, adapter = pair
    batch = a_batch()
    assert cuts(PLAN) == (4, 6)
    plain = Student(decoder, Teacher(Decoder.of(base), PLAN), recompute=False)([0, 1], batch)
    seen: dict[tuple[str, int], Tensor] = {}
    handles = [
        blocks_of(model)[number].register_forward_pre_hook(
            lambda _, args, where=(name, number): seen.update({where: args[0][batch.mask].double()})
        )
        for name, model, numbers in (("base", base, (4, 6)), ("own", decoder.model, (2, 3)))
        for number in numbers
    ]
    with torch.no_grad():
        plain_logits(base, batch)
    plain_logits(decoder.model, batch)
    for handle in handles:
        handle.remove()
    apart = []
    for number, own in ((4, 2), (6, 3)):
        aim = seen["base", number].detach()
        apart.append(((seen["own", own] - aim).square().sum(-1) / aim.square().sum(-1)).mean())
    teacher = Teacher(Decoder.of(base), PLAN, match=0.7)
    found = Student(decoder, teacher, recompute=False)([0, 1], batch)
    assert_same(found, plain + 0.7 * torch.stack(apart).mean(), adapter)


def test_cuts_are_behind_what_changed() -> None:
    """Behind a deleted span once, behind every half block, and at the end."""
    plan = Plan.of(Base("", None, 8), {1: "drop", 2: "drop", 4: "mlp-only", 5: "drop", 7: "drop"})
    assert cuts(plan) == (3, 6, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """All projections, or those of one half; together they are all. New weights make the model that was trained."""
    decoder = Decoder.of(load_model(checkpoint_of(family)))
    everything = set(projections(decoder, "all"))
    attention, mlp = (set(projections(decoder, tune)) for tune in ("attention", "mlp"))
    assert everything == attention | mlp
    assert not attention & mlp
    assert attention
    assert mlp or "mixtral" in family  # whose experts are in one tensor
    assert {number for number, _ in attention} == set(range(DEPTH))
    batch = a_batch()
    decoder, adapter = learning(checkpoint_of(family))
    with torch.no_grad():
        expected, _ = plain_logits(decoder.model, batch)
        fresh = load_model(checkpoint_of(family))
        before, _ = plain_logits(fresh, batch)
        for number, name in adapter.projections:
            weight = blocks_of(fresh)[number].get_submodule(name).weight
            assert adapter.shapes[number, name] == weight.shape
            weight.copy_(adapter.new_weight(number, name, weight))
        merged, _ = plain_logits(fresh, batch)
    assert (merged - before).abs().max() > 0.01
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("rank", [0, 3])
def test_what_is_trained_is_in_float32(rank: int, llama: Path) -> None:
    """Low-rank changes beside weights in bfloat16; whole projections are as they were loaded."""
    decoder = Decoder.of(load_model(llama, Loading(dtype="bfloat16")))
    adapter = adapt(decoder, rank=rank, alpha=6, dropout=0.0, tune="all", seed=0)
    assert {weight.dtype for weight in adapter.trained.values()} == {torch.float32 if rank else torch.bfloat16}
    loss = Student(decoder, None)([0, 1], a_batch())
    assert all(gradient.isfinite().all() for gradient in gradients(loss, adapter))


def test_whole_projections(llama: Path) -> None:
    """Rank 0: no adapter, and what has gradients is what changes."""
    decoder = Decoder.of(load_model(llama))
    adapter = adapt(decoder, rank=0, alpha=1, dropout=0.0, tune="mlp", seed=0)
    trained = {name for name, weight in decoder.model.named_parameters() if weight.requires_grad}
    assert trained == {f"model.layers.{name}" for name in adapter.trained}
    assert len(adapter.trained) == 3 * DEPTH == len(adapter.projections)
    own = decoder.blocks[2].get_parameter("mlp.up_proj.weight")
    assert torch.equal(adapter.new_weight(2, "mlp.up_proj", torch.zeros_like(own)), own)
