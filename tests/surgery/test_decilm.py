"""--format decilm: hollow Llama in the layout of DeciLM, equal to the base with silent branches, or refused."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import shortcut
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.records.actions import Action
from shortcut.records.plan import Base, Plan, read_plan
from shortcut.surgery.decilm import check_decilm, mlp_width
from tests.conftest import DEPTH
from tests.fresh import run_fresh
from tests.modeling.test_hollow import FRESH, hollowed
from tests.reference import greedy, logits
from tests.scoring.test_halves import carried_out

pytestmark = pytest.mark.thorough

SIZES: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 4, "intermediate_size": 512}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 14, "rope_theta": 700.0}),
    "mistral tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True, "num_key_value_heads": 1}),
}
MIXTURES: list[dict[int, Action]] = [
    {1: "mlp-only", 2: "drop", 3: "attention-only", 4: "mlp-only", 6: "attention-only"},
    {0: "drop", 1: "attention-only", 2: "mlp-only"},
    {3: "mlp-only", 4: "attention-only"},
]


@pytest.fixture
def folder_of(checkpoint_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Gives the folder of one of these models, or of another of their size; zeros and mappings are written by hand."""

    def give(name: str = "llama", **changes: Any) -> Path:
        family, own = MODELS.get(name, (name, {}))
        settings = {**SIZES, **own, **changes}
        by_hand = {key: value for key, value in settings.items() if isinstance(value, dict) or value == 0}
        folder = checkpoint_of(family, **{key: settings[key] for key in settings.keys() - by_hand.keys()})
        return edited(folder, tmp_path / "base", by_hand) if by_hand else folder

    return give


def edited(folder: Path, out: Path, changes: Mapping[str, Any]) -> Path:
    """The same checkpoint with another config.json."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path)
    (out / "config.json").unlink()
    (out / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **changes}))
    return out


@pytest.mark.parametrize("actions", MIXTURES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_hooked_base(
    name: str, actions: dict[int, Action], folder_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Logits, and greedy continuations with and without a cache, are those of the base whose branches are silent."""
    folder = folder_of(name)
    base, short = load_model(folder), hollowed(folder, tmp_path / "short", actions, format="decilm")
    assert type(short).__name__ == "DeciLMForCausalLM"
    with carried_out(base, MODELS[name][0], actions):
        torch.testing.assert_close(logits(short, token_ids), logits(base, token_ids), rtol=0, atol=1e-5)
        expected = greedy(base, token_ids, cache=False)
    assert torch.equal(greedy(short, token_ids), expected)
    assert torch.equal(greedy(short, token_ids, cache=False), expected)


def test_what_goes_is_not_on_the_disk(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """The tensors of gone halves and of the norms before them are absent; all others are the base's."""
    folder = folder_of()
    hollowed(folder, tmp_path / "short", {1: "attention-only", 2: "mlp-only"}, format="decilm")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "short"))
    assert all(torch.equal(after[name], before[name]) for name in after)
    gone = {name.removeprefix("model.layers.").rpartition(".")[0] for name in before.keys() - after.keys()}
    assert gone == {
        *(f"1.mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(f"2.self_attn.{name}_proj" for name in "qkvo"),
        *("1.post_attention_layernorm", "2.input_layernorm"),
    }


def test_the_config_is_what_servers_read(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """model_type, block_configs and both spellings of the rotation are in config.json, as plain data."""
    hollowed(folder_of("llama3"), tmp_path / "short", MIXTURES[0], format="decilm")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["model_type"] == "nemotron-nas"
    assert config["architectures"] == ["DeciLMForCausalLM"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    off, on = {"no_op": True, "replace_with_linear": False}, {"no_op": False, "replace_with_linear": False}
    heads, multiplier = {"n_heads_in_group": 1}, {"ffn_mult": 16.0}  # 2 * 16 * 48 / 3 = 512
    no_heads, no_multiplier = {"n_heads_in_group": None}, {"ffn_mult": None}
    assert config["block_configs"][:3] == [
        {"attention": heads | on, "ffn": multiplier | on},
        {"attention": no_heads | off, "ffn": multiplier | on},
        {"attention": heads | on, "ffn": no_multiplier | off},
    ]
    assert all(isinstance(block["ffn"]["ffn_mult"] or 0.0, float) for block in config["block_configs"])


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_the_width_of_an_mlp(steps: int, width: int) -> None:
    """For every multiple of 256 the multiplier that is written gives just that width, by the servers' formula."""
    multiplier = 3 * 256 * steps / (2 * width)
    whole = int(2 * multiplier * width / 3)
    assert mlp_width(multiplier, width) == (whole if whole % 256 == 0 else whole + 256 - whole % 256) == 256 * steps


def test_round_trips(folder_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path) -> None:
    """Saved by transformers, pickled and cut once more, it is what it was, and block_configs reads by attribute."""
    short = hollowed(folder_of("llama3"), tmp_path / "short", MIXTURES[0], format="decilm")
    expected = logits(short, token_ids)
    short.save_pretrained(tmp_path / "again")
    config = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, True, False, False]
    assert config.block_configs[0].ffn.ffn_mult == 16
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    again = load_model(tmp_path / "again")
    torch.testing.assert_close(logits(again, token_ids), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(short)), token_ids), expected, rtol=0, atol=0)
    for folder in ("short", "again"):
        cut = shortcut.cut(tmp_path / folder, tmp_path / f"{folder}-cut", drop="1,4", quiet=True)
        model = load_model(tmp_path / f"{folder}-cut")
        assert [block.attention.no_op for block in model.config.block_configs] == [False, False, True, False]
        assert len(cut.plan.kept) == len(model.model.layers)
    with pytest.raises(ShortcutError, match="the first block of a DeciLM has to keep its attention"):
        shortcut.cut(tmp_path / "short", tmp_path / "no", drop="0", quiet=True)
    with pytest.raises(ShortcutError, match="blocks of a hollow checkpoint cannot lose more"):
        shortcut.cut(tmp_path / "short", tmp_path / "no", mlp_only="2", quiet=True)


def test_a_fresh_process_loads_it(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """With transformers alone, shortcut not being there."""
    short = hollowed(folder_of(), tmp_path / "short", MIXTURES[0], format="decilm")
    run_fresh(FRESH, "short", folder=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "short.pt"), logits(short, torch.arange(4, 24)[None]))


def test_without_trust_it_does_not_load(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Plain from_pretrained fails, and code that is not to the letter what shortcut writes is not run by itself."""
    hollowed(folder_of(), tmp_path / "short", MIXTURES[0], format="decilm")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "short", trust_remote_code=False)
    path = tmp_path / "short" / "modeling_decilm.py"
    path.write_text(path.read_text() + "print('boo')\n")
    with pytest.raises(ShortcutError, match="contains custom code"):
        load_model(tmp_path / "short")


def test_the_road(folder_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """prune writes it, its plan and its card; check and score take it without being told to."""
    out = tmp_path / "short"
    words = f"{folder_of()} {out} --drop 2 --mlp-only 1,4 --attention-only 3,6 --format decilm --length 32 --quiet"
    assert main(["prune", *words.split()]) == 0
    assert "loads with trust_remote_code=True" in capsys.readouterr().out
    assert main(["check", str(out), "--length", "32", "--quiet"]) == 0
    assert "logits differ from the base's with its dropped blocks bypassed by" in capsys.readouterr().out
    assert read_plan(out / "plan.yaml").format == "decilm"
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    scores = shortcut.score(out, samples=2, length=32, quiet=True)
    assert len(scores.of_blocks("block-influence")) == DEPTH - 1


def test_without_halves_it_is_plain(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Where no block loses a half, the result is the base's own class, which needs no code."""
    shortcut.cut(folder_of(), tmp_path / "short", drop="2", format="decilm", quiet=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.model_type == "llama"


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3", {}, "is for LlamaForCausalLM and MistralForCausalLM, not for Qwen3ForCausalLM of qwen3"),
        ("gemma3_text", {}, "not for Gemma3ForCausalLM"),
        ("llama", {"intermediate_size": 192}, "cannot hold intermediate_size = 192, no multiple of 256"),
        ("mistral", {"sliding_window": 5}, "cannot hold sliding_window = 5: use --format custom"),
        ("llama", {"hidden_act": "gelu"}, "cannot hold hidden_act = 'gelu'"),
        ("llama", {"attention_bias": True}, "cannot hold attention_bias = True"),
        ("llama", {"mlp_bias": True}, "cannot hold mlp_bias = True"),
        ("llama", {"num_key_value_heads": 0}, "cannot hold num_key_value_heads = 0"),
        ("llama", {"logit_scale": 2.0}, "cannot hold logit_scale = 2.0"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "cannot hold quantization_config"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "cannot hold rope_parameters"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "cannot hold rope_parameters"),
    ],
)
def test_what_servers_would_read_otherwise(
    name: str, changes: dict[str, Any], message: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """What is not just so a Llama is one line, before anything is written."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.cut(folder_of(name, **changes), tmp_path / "out", mlp_only="1", format="decilm", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_only": "0"}, "the first block of a DeciLM has to keep its attention: leave it whole"),
        ({"drop": "0", "mlp_only": "1"}, "the first block of a DeciLM has to keep its attention"),
        ({"last_token": "3"}, "the format decilm knows no last-token blocks: they need --format custom"),
    ],
)
def test_plans_that_it_cannot_hold(
    options: dict[str, str], message: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """A first block without attention, and blocks for the last token alone, are one line each."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.cut(folder_of(), tmp_path / "out", format="decilm", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_tensors_that_no_llama_has(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """A tensor too many, or of another shape, is named; the rotations that old checkpoints store may stay."""
    folder = edited(folder_of(), tmp_path / "other", {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({**tensors, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6)}, folder / "model.safetensors")
    shortcut.cut(folder, tmp_path / "old", attention_only="3", format="decilm", quiet=True)
    scale = {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}
    save_file(tensors | scale, folder / "model.safetensors")
    with pytest.raises(ShortcutError, match=r"cannot hold .*q_norm.weight: it is \(12,\), and has to be absent"):
        shortcut.cut(folder, tmp_path / "no", attention_only="3", format="decilm", quiet=True)


@pytest.mark.parametrize(
    ("half", "change", "message"),
    [
        ("ffn", {"ffn_mult": 16.0}, r"mlp.down_proj.weight: it is \(48, 256\), and has to be \(48, 512\)"),
        ("attention", {"n_heads_in_group": 4}, r"k_proj.weight: it is \(24, 48\), and has to be \(12, 48\)"),
        ("ffn", {"no_op": True}, "mlp.down_proj.weight: it is .*, and has to be absent"),
    ],
)
def test_the_reading_of_block_configs(
    half: str, change: dict[str, Any], message: str, folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """What is written passes the rules that servers read it by, and a wrong entry of any kind does not."""
    hollowed(folder_of(), tmp_path / "short", MIXTURES[2], format="decilm")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "short" / "model.safetensors").items()}
    check_decilm(config, shapes)
    with pytest.raises(ShortcutError, match="block_configs is for 7 blocks of 6"):
        check_decilm(config | {"num_hidden_layers": 6}, shapes)
    config["block_configs"][1][half] |= change
    with pytest.raises(ShortcutError, match=message):
        check_decilm(config, shapes)


def test_the_plan_keeps_the_format() -> None:
    """A plan's file says decilm, and is read as it was written."""
    plan = Plan(Base("m", None, 3), ("keep", "mlp-only", "drop"), format="decilm")
    assert plan.to_dict()["format"] == "decilm"
    assert Plan.from_dict(plan.to_dict()) == plan
