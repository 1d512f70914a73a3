"""Blocks that stay on the disk until they run give the scores of a model in memory, and leave nothing behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shortcut
from shortcut.checkpoint.open import open_model
from shortcut.live import offload
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.live.offload import is_offloaded, open_live, resident
from shortcut.material.calibration import make_batches
from shortcut.options.groups import Loading
from shortcut.scoring.greedy import Removal, remove_greedily
from shortcut.scoring.metrics import METRICS
from shortcut.scoring.spill import Budget, SpillDict
from tests.conftest import DEPTH
from tests.reference import scores_of
from tests.verbs.test_score import ALL, sequences_of

pytestmark = pytest.mark.thorough

LOADING = Loading(device="cpu", dtype="float32")


def open_on_disk(folder: Path) -> Any:
    """The model of a checkpoint with its blocks on the disk, for the length of a `with` block."""
    return open_live(open_model(folder), LOADING, offload=True, quiet=True)


@pytest.mark.parametrize(
    ("family", "sharded"),
    [
        ("llama", True),
        ("gemma3_text", False),
        ("gpt2", False),
        ("mixtral", False),
        ("mixtral", True),
        ("qwen3_moe", False),
    ],
)
def test_scores_are_those_of_a_model_in_memory(
    family: str, sharded: bool, checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric, and what greedy removes; also where hidden states go to files. Rounding may differ."""
    folder = checkpoint_of(family, sharded=sharded)
    calibration, metrics = sequences_of(9, 5, 7), ALL
    whole = load_model(folder)
    batches = make_batches(calibration, 2)
    expected = scores_of(whole, batches, metrics)
    order = list(remove_greedily(Decoder.of(whole), batches, METRICS["kl"], Removal(2, range(DEPTH))))
    with open_on_disk(folder) as model:
        assert is_offloaded(model)
        found = scores_of(model, batches, metrics)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-9)
        monkeypatch.setattr("shortcut.scoring.blocks.STATES_IN_MEMORY", 2000)
        found = scores_of(model, batches, metrics)
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-9)
        again = list(remove_greedily(Decoder.of(model), batches, METRICS["kl"], Removal(2, range(DEPTH))))
    assert [move for move, _ in again] == [move for move, _ in order]
    assert [score for _, score in again] == pytest.approx([score for _, score in order], rel=1e-6)


def test_weights_are_there_only_while_they_are_needed(llama: Path, token_ids: torch.Tensor) -> None:
    """A block's weights are on the meta device before and after it runs, and while another one does."""
    seen: list[list[int]] = []
    with open_on_disk(llama) as model:
        blocks = model.model.layers

        def loaded() -> list[int]:
            return [n for n, b in enumerate(blocks) if all(not weight.is_meta for weight in b.parameters())]

        for block in blocks:
            block.mlp.register_forward_pre_hook(lambda *_: seen.append(loaded()))
        with torch.no_grad():
            logits = model(token_ids).logits
            torch.testing.assert_close(logits, load_model(llama)(token_ids).logits, rtol=0, atol=0)
        assert seen == [[number] for number in range(DEPTH)]
        assert loaded() == []
        with resident(blocks[3]), resident(blocks[3]):
            assert loaded() == [3]
        assert loaded() == []


def test_weights_beyond_memory_stay_on_disk_by_themselves(
    llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """score --offload, and score where memory is too small, write what score writes; the latter says so."""
    text = {"metric": "kl,taylor", "samples": 2, "length": 32}
    expected = shortcut.score(llama, **text, quiet=True).metrics
    assert shortcut.score(llama, **text, offload=True, quiet=True).metrics == expected
    capsys.readouterr()
    monkeypatch.setattr(offload, "free_memory", lambda _: 1000)
    assert shortcut.score(llama, **text).metrics == expected
    assert "blocks stay on the disk until they run (399 KB of weights, 1 KB free)" in capsys.readouterr().err


def test_free_memory_is_a_plausible_number() -> None:
    """More than nothing, and no more than all."""
    assert 1 << 20 < offload.free_memory(torch.device("cpu")) < 1 << 50


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 9), st.booleans()), max_size=12), st.integers(0, 100))
def test_a_store_is_a_dict(steps: list[tuple[int, int, bool]], room: int) -> None:
    """Whatever is put in and taken out, in whatever order and with whatever room: what comes back is what went in."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        budget = Budget(room, Path(folder))
        store, plain = SpillDict(budget), dict[int, torch.Tensor]()
        for key, size, removes in steps:
            if removes and key in plain:
                del store[key], plain[key]
            else:
                tensor = torch.arange(size * 2, dtype=torch.bfloat16).view(2, size)[:, ::1] + key
                store[key] = plain[key] = tensor
        assert sorted(store) == sorted(plain)
        assert len(store) == len(plain)
        for key, tensor in plain.items():
            torch.testing.assert_close(store[key], tensor, rtol=0, atol=0)
        assert budget.left + sum(tensor.nbytes for tensor in store.kept.values()) == room
        assert len(list(Path(folder).iterdir())) == len(store.files)
