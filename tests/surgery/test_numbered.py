"""Code of a checkpoint's own: what its blocks compute decides, not how they call their number."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.options.groups import Loading

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnLayer(LlamaDecoderLayer):
    def __init__(self, config, number):
        super().__init__(config, number)
        self.{name} = number + {plus}

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward({states}, *args, **kwargs)

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = torch.nn.ModuleList([OwnLayer(config, i) for i in range(config.num_hidden_layers)])
"""


def with_code(llama: Path, folder: Path, name: str, states: str, plus: int = 0) -> Path:
    """A copy of a checkpoint whose blocks note their number, and make this of the states that go in."""
    shutil.copytree(llama, folder)
    (folder / "modeling_own.py").write_text(CODE.format(name=name, states=states, plus=plus))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("name", "plus"), [("block_idx", 0), ("lid", 1), ("i", 0)])
def test_a_number_that_does_no_arithmetic(
    name: str, plus: int, llama: Path, token_ids: torch.Tensor, tmp_path: Path
) -> None:
    """Blocks may call it as they like; the result computes what the base does without these blocks."""
    base = with_code(llama, tmp_path / "base", name, "hidden_states", plus)
    shortcut.cut(base, tmp_path / "short", drop="1,4", quiet=True, trust_remote_code=True)
    shortcut.cut(llama, tmp_path / "plain", drop="1,4", quiet=True)
    own, plain = (load_model(tmp_path / each, Loading(trust_remote_code=True)) for each in ("short", "plain"))
    torch.testing.assert_close(own(token_ids).logits, plain(token_ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("block_idx", "hidden_states * (1 + self.block_idx / 100)"),
        ("idx", "hidden_states + (0.5 if self.idx >= 3 else 0)"),
    ],
)
def test_a_number_that_does(name: str, states: str, llama: Path, tmp_path: Path) -> None:
    """Where it enters the arithmetic, under whatever name, the first block that would change is named."""
    base = with_code(llama, tmp_path / "base", name, states)
    first = 2 if name == "block_idx" else 3
    fault = f"cannot delete these blocks of own exactly: block {first} computes something else as block {first - 1}"
    with pytest.raises(ShortcutError, match=fault):
        shortcut.cut(base, tmp_path / "short", drop="1", quiet=True, trust_remote_code=True)
    assert not (tmp_path / "short").exists()


def test_a_block_that_does_not_run(llama: Path, tmp_path: Path) -> None:
    """Where it cannot be tried whether the number matters, that is said."""
    base = with_code(llama, tmp_path / "base", "block_idx", "hidden_states.no_such_thing")
    with pytest.raises(ShortcutError, match="whether their number matters cannot be tried: .*no_such_thing"):
        shortcut.cut(base, tmp_path / "short", drop="1", quiet=True, trust_remote_code=True)
