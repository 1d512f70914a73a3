"""The recipe that narrows MLPs: small enough, and the model is the base with some of its neurons at zero."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shortcut
from tests.conftest import DEPTH

SCRIPT = Path(__file__).parent.parent / "recipes" / "prune_width.py"
prune_width: Callable[..., None] = runpy.run_path(str(SCRIPT))["prune_width"]


def load(folder: Path) -> Any:
    """A model as anybody loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def test_a_narrow_model_is_the_base_with_neurons_at_zero(
    llama: Path, tmp_path: Path, token_ids: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """As large as the shorter one to a neuron per block; what went are those of the smallest product of norms."""
    shortcut.cut(llama, tmp_path / "short", drop="2,4", quiet=True)
    prune_width(str(llama), str(tmp_path / "narrow"), like=str(tmp_path / "short"))
    base, narrow, short = load(llama), load(tmp_path / "narrow"), load(tmp_path / "short")
    gone = base.config.intermediate_size - narrow.config.intermediate_size
    assert f"narrow: {gone} neurons of every MLP went" in capsys.readouterr().out
    assert abs(narrow.num_parameters() - short.num_parameters()) <= DEPTH * 3 * base.config.hidden_size / 2
    with torch.no_grad():
        for block in base.model.layers:
            gate, up, down = (getattr(block.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
            sizes = [float(gate[n].norm() * up[n].norm() * down[:, n].norm()) for n in range(len(gate))]
            for neuron in sorted(range(len(gate)), key=sizes.__getitem__)[:gone]:
                down[:, neuron] = 0
        assert not torch.allclose(load(llama)(token_ids).logits, base(token_ids).logits)
        torch.testing.assert_close(narrow(token_ids).logits, base(token_ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "narrow").encode("text")


def test_what_cannot_be_narrowed(llama: Path, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Other MLPs, and parameters that MLPs do not hold, are refused before anything is written."""
    shortcut.cut(llama, tmp_path / "short", drop="1-6", quiet=True)
    with pytest.raises(SystemExit, match="parameters cannot go from MLPs that hold"):
        prune_width(str(llama), str(tmp_path / "narrow"), like=str(tmp_path / "short"))
    for family in ("phi", "gpt2"):
        with pytest.raises(SystemExit, match="not every block has an MLP with a plain gate_proj"):
            prune_width(str(checkpoint_of(family)), str(tmp_path / "narrow"), like=str(llama))
    assert not (tmp_path / "narrow").exists()
