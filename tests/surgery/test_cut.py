"""Cutting files gives the model whose blocks are bypassed, for every family, in one file and in many."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family.fields import PLAIN
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.records.plan import Plan
from shortcut.surgery.preview import preview
from tests.conftest import DEPTH, FAMILIES, VOCABULARY
from tests.reference import bypassed, greedy, logits

CASES = ["1,3", "0,4", "6", "0-2", "1-5"]


def load(folder: Path) -> Any:
    """Load as a user would, and fail on any key that is not right: transformers itself would go on."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


@pytest.mark.thorough
@pytest.mark.parametrize("drop", CASES)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_bypassed_base(
    family: str, sharded: bool, drop: str, checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Logits, greedy generation and its cache are those of the base without the blocks, to the last bit."""
    folder = checkpoint_of(family, sharded=sharded)
    report = shortcut.cut(folder, tmp_path / "short", drop=drop, quiet=True)
    base, short = load(folder), load(tmp_path / "short")
    with bypassed(base, report.plan.dropped):
        expected, expected_tokens = logits(base, token_ids), greedy(base, token_ids, cache=False)
    assert (expected - logits(base, token_ids)).abs().max() > 0.1  # the blocks matter, so a wrong one would show
    torch.testing.assert_close(logits(short, token_ids), expected, rtol=0, atol=0)
    assert torch.equal(greedy(short, token_ids), expected_tokens)
    assert torch.equal(greedy(short, token_ids, cache=False), expected_tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_lists_follow_the_blocks(family: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """The depth and every list with one entry per block have the new length, and say what they said of each block."""
    folder = checkpoint_of(family)
    shortcut.cut(folder, tmp_path / "short", drop="0,3", quiet=True)
    base, short = AutoConfig.from_pretrained(folder), AutoConfig.from_pretrained(tmp_path / "short")
    kept = [1, 2, 4, 5, 6]
    assert short.num_hidden_layers == len(kept)
    lists = {key: value for key, value in base.to_dict().items() if isinstance(value, list) and len(value) == DEPTH}
    assert {key: getattr(short, key) for key in lists} == {
        key: [value[i] for i in kept] for key, value in lists.items()
    }
    assert bool(lists) == (family in ("qwen3", "gemma3_text"))


@pytest.mark.parametrize("family", sorted(PLAIN & set(FAMILIES)))
def test_plain_families_derive_nothing(family: str) -> None:
    """The config class of a family that is edited without asking it changes nothing but the depth with the depth."""
    deep, shallow = (
        AutoConfig.for_model(family, **{**FAMILIES[family], name: depth}).to_dict()
        for depth in (DEPTH, DEPTH - 1)
        for name in ("n_layer" if "n_layer" in FAMILIES[family] else "num_hidden_layers",)
    )
    assert {key for key in deep if deep[key] != shallow[key]} <= {"num_hidden_layers", "n_layer"}


@pytest.mark.parametrize("version", ["4.50.0", "5.24.0"])
def test_hub_style_config_without_lists_is_resolved(
    version: str, checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """A config that holds a period instead of the list of block types keeps every block's own type."""
    folder = shutil.copytree(checkpoint_of("gemma3_text"), tmp_path / "hub")
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    config |= {"sliding_window_pattern": 3, "transformers_version": version}
    (folder / "config.json").write_text(json.dumps(config))
    report = shortcut.cut(folder, tmp_path / "short", drop="0,3", quiet=True)
    base, short = load(folder), load(tmp_path / "short")
    types = base.config.layer_types
    assert short.config.layer_types == [types[i] for i in report.plan.kept]
    with bypassed(base, (0, 3)):
        torch.testing.assert_close(logits(short, token_ids), logits(base, token_ids), rtol=0, atol=0)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sets(st.integers(0, DEPTH - 1), min_size=1, max_size=3), data=st.data())
def test_cutting_twice_equals_cutting_once(
    first: set[int], data: st.DataObject, llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Cutting A and then B gives, byte for byte, what cutting both at once gives."""
    rest = [block for block in range(DEPTH) if block not in first]
    second = data.draw(st.sets(st.integers(0, len(rest) - 1), min_size=1, max_size=len(rest) - 1))
    folder = tmp_path_factory.mktemp("twice")
    base = read_checkpoint(llama).base
    shortcut.cut(llama, folder / "a", plan=Plan.dropping(base, first), quiet=True)
    shortcut.cut(
        folder / "a", folder / "ab", plan=Plan.dropping(read_checkpoint(folder / "a").base, second), quiet=True
    )
    shortcut.cut(llama, folder / "once", plan=Plan.dropping(base, first | {rest[i] for i in second}), quiet=True)
    for name in ("model.safetensors", "config.json"):
        assert (folder / "ab" / name).read_bytes() == (folder / "once" / name).read_bytes()


def test_files_hold_the_base_bytes(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Shards keep the base's split, are numbered anew, indexed as written, and hold the base's tensors unchanged."""
    folder = checkpoint_of("llama", sharded=True)
    shortcut.cut(folder, tmp_path / "short", drop="2-4", quiet=True)
    index = json.loads((tmp_path / "short" / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in (tmp_path / "short").glob("*.safetensors"))
    assert len(names) > 3
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    written = {name: load_file(tmp_path / "short" / name) for name in names}
    assert {key: name for name, tensors in written.items() for key in tensors} == index["weight_map"]
    tensors = {key: tensor for file in written.values() for key, tensor in file.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    base = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    old = {0: 0, 1: 1, 2: 5, 3: 6}
    for key, tensor in tensors.items():
        parts = key.split(".")
        if parts[1] == "layers":
            parts[2] = str(old[int(parts[2])])
        assert torch.equal(tensor, base[".".join(parts)])


def test_max_shard_size_splits_and_joins(llama: Path, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """--max-shard-size splits one file, and joins many, without changing a tensor."""
    one = shortcut.cut(llama, tmp_path / "one", drop="1", quiet=True)
    many = shortcut.cut(llama, tmp_path / "many", drop="1", max_shard_size="50KB", quiet=True)
    joined = shortcut.cut(checkpoint_of("llama", sharded=True), tmp_path / "joined", drop="1", max_shard_size="1GB")
    assert [name for name, _ in one.files] == [name for name, _ in joined.files] == ["model.safetensors"]
    assert len(many.files) > 3
    assert max(size for _, size in many.files) <= 50_000
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for folder in ("many", "joined"):
        found = {k: v for path in (tmp_path / folder).glob("*.safetensors") for k, v in load_file(path).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_mixed_types_stay_aligned(llama: Path, tmp_path: Path) -> None:
    """Shards of different types can be joined: the result opens in the safetensors library with every value right."""
    folder = shutil.copytree(llama, tmp_path / "mixed")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for position, name in enumerate(names):
        tensors[name] = tensors[name].to([torch.float32, torch.bfloat16, torch.float8_e4m3fn][position % 3])
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    (folder / "model.safetensors").unlink()
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shortcut.cut(folder, tmp_path / "short", drop="6", max_shard_size="1GB", quiet=True)
    found = load_file(tmp_path / "short" / "model.safetensors")
    assert found.keys() == {name for name in names if ".layers.6." not in name}
    assert all(torch.equal(found[name].view(torch.uint8), tensors[name].view(torch.uint8)) for name in found)


def test_side_files_come_along(llama: Path, tmp_path: Path) -> None:
    """Tokenizer, templates, code and licences are copied; other forms of the weights and the base's card are not."""
    folder = shutil.copytree(llama, tmp_path / "base")
    for name in (
        "LICENSE",
        "modeling_x.py",
        "chat_templates/tool.jinja",
        "README.md",
        "pytorch_model.bin",
        "onnx/m.onnx",
        "imatrix.dat",
        "trainer_state.json",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "params.json").write_text('{"dim": 40, "n_layers": 7}')
    report = shortcut.cut(folder, tmp_path / "short", drop="6", quiet=True)
    assert report.left_behind == ("imatrix.dat", "onnx/", "pytorch_model.bin", "trainer_state.json")
    assert "left behind: imatrix.dat, onnx/, pytorch_model.bin, trainer_state.json" in str(report)
    assert json.loads((tmp_path / "short" / "params.json").read_text()) == {"dim": 40, "n_layers": 6}
    names = {str(path.relative_to(tmp_path / "short")) for path in (tmp_path / "short").rglob("*") if path.is_file()}
    assert names == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE", "modeling_x.py", "chat_templates/tool.jinja", "shortcut.json", "params.json"),
    }
    assert AutoTokenizer.from_pretrained(tmp_path / "short")("ab")["input_ids"]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: "" if ".layers.3." in name else name, "the weights have model.layers.0-6 without 3"),
        (lambda name: f"_orig_mod.{name}", "the weights are those of a compiled model"),
    ],
)
def test_names_that_cannot_be_cut(rename: Any, message: str, llama: Path, tmp_path: Path) -> None:
    """A gap in the numbers is named; what transformers would not load is said before anything is written."""
    folder = shutil.copytree(llama, tmp_path / "base")
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items() if rename(name)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortcutError, match=message):
        shortcut.cut(folder, tmp_path / "short", drop="1", quiet=True)
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "diffllama"}, "cannot delete blocks of diffllama: its attention scales depend"),
        ({"num_hidden_layers": 9}, r"cannot tell where the 9 blocks are .* model.layers.0-6"),
        ({"num_hidden_layers": None}, "names no number of blocks"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True depends on the block"),
    ],
)
def test_what_cannot_be_exact_is_refused(change: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    """A family whose arithmetic depends on block numbers, and a config the weights contradict, write nothing."""
    folder = shutil.copytree(llama, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ShortcutError, match=message):
        shortcut.cut(folder, tmp_path / "short", drop="6", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_damaged_base_is_refused(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """A missing shard, a truncated one, and an index that disagrees each stop with one line, and nothing is written."""
    for damage, message in {
        "missing": "model-00002-of-.* is missing",
        "truncated": "is damaged: its header speaks of",
        "index": "and the shards disagree about 'lm_head.weight'",
        "traversal": "which is no safetensors file of its own folder",
    }.items():
        folder = shutil.copytree(checkpoint_of("llama", sharded=True), tmp_path / damage)
        shard = sorted(folder.glob("model-00002-of-*"))[0]
        index = folder / "model.safetensors.index.json"
        if damage == "missing":
            shard.unlink()
        elif damage == "truncated":
            shard.write_bytes(shard.read_bytes()[:-5])
        elif damage == "index":
            content = json.loads(index.read_text())
            content["weight_map"]["lm_head.weight"] = shard.name
            index.write_text(json.dumps(content))
        else:
            index.write_text(index.read_text().replace(shard.name, f"../{shard.name}"))
        with pytest.raises(ShortcutError, match=message):
            shortcut.cut(folder, tmp_path / "short", drop="1", quiet=True)
        assert not (tmp_path / "short").exists()


def test_heads_behind_the_last_block_go_and_are_named(llama: Path, tmp_path: Path) -> None:
    """Blocks that predict further tokens, in the container or beside it, go when blocks go, and the report says so."""
    folder = shutil.copytree(llama, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{DEPTH}.eh_proj.weight": torch.zeros(3), "mtp.norm.weight": torch.zeros(5)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    report = shortcut.cut(folder, tmp_path / "short", drop="1", quiet=True)
    assert set(report.heads_dropped) == set(extra)
    assert "dropped too: 2 tensors" in str(report)
    assert not set(load_file(tmp_path / "short" / "model.safetensors")) & set(extra)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    load(tmp_path / "short")
    text: dict[str, Any] = {"samples": 2, "length": 16, "quiet": True}
    shortcut.prune(folder, tmp_path / "pruned", count=1, **text)  # which scores and checks
    save_file(tensors | {"model.layers.2.surplus": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShortcutError, match=r"1 unexpected keys, such as model\.layers\.2\.surplus"):
        shortcut.score(folder, **text)


def test_heads_behind_the_last_block_can_stay(llama: Path, tmp_path: Path) -> None:
    """--keep-mtp keeps them behind the last block that stays, byte for byte, and the record says so: check passes."""
    folder = shutil.copytree(llama, tmp_path / "base")
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    inside = {f"eh_proj_{number}": torch.randn(3, generator=generator) for number in (0, 1)}
    extra = {f"model.layers.{DEPTH + place}.{name}": value for place, (name, value) in enumerate(inside.items())}
    save_file(tensors | extra | {"mtp.norm.weight": torch.ones(5)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "short"
    report = shortcut.prune(folder, out, drop="1,4", keep_mtp=True, samples=2, length=16, quiet=True)
    assert report.cut.heads_dropped == ()
    written = load_file(out / "model.safetensors")
    for place, (name, value) in enumerate(inside.items()):
        torch.testing.assert_close(written[f"model.layers.{DEPTH - 2 + place}.{name}"], value, rtol=0, atol=0)
    assert set(written) - set(load_file(llama / "model.safetensors")) == {
        f"model.layers.{DEPTH - 2}.eh_proj_0",
        f"model.layers.{DEPTH - 1}.eh_proj_1",
        "mtp.norm.weight",
    }
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 2
    assert "keep-mtp: true" in (out / "plan.yaml").read_text()
    assert shortcut.check(out, samples=2, length=16, quiet=True).logit_difference == 0
    shortcut.cut(out, tmp_path / "again", drop="0", quiet=True)  # without the option, they go
    assert not [name for name in load_file(tmp_path / "again" / "model.safetensors") if "eh_proj" in name]


STYLES = {
    "llava of today": {},
    "llava of 2025": {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_": "lm_"}
    | {r"^(vision_tower|multi_modal_projector)": r"model.\1"},
    "gpt2 without its prefix": {r"^transformer\.": ""},
}


@pytest.mark.parametrize("style", STYLES)
def test_names_of_other_releases_are_cut_too(
    style: str, tmp_path: Path, token_ids: torch.Tensor, checkpoint_of: Callable[..., Path]
) -> None:
    """Checkpoints on the Hub carry the names of the release that wrote them; transformers still loads the result.

    The shortened text decoder is as deep as the vision tower, and is not taken for it.
    """
    base = tmp_path / "base"
    if style.startswith("llava"):
        llama = transformers.AutoConfig.for_model("llama", **FAMILIES["llama"])
        tower = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 2, "image_size": 28}
        vision = transformers.CLIPVisionConfig(num_hidden_layers=DEPTH - 4, patch_size=14, **tower)
        config = transformers.LlavaConfig(text_config=llama, vision_config=vision, image_token_index=VOCABULARY - 1)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(base)
    else:
        shutil.copytree(checkpoint_of("gpt2"), base)
    tensors = load_file(base / "model.safetensors")
    for old, new in STYLES[style].items():
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})

    report = shortcut.cut(base, tmp_path / "short", drop="0,2,4-5", quiet=True)
    whole, short = load_model(base), load_model(tmp_path / "short")
    with torch.no_grad(), preview(whole, report.plan):
        torch.testing.assert_close(short(token_ids).logits, whole(token_ids).logits, rtol=0, atol=0)


def test_code_of_its_own_is_copied_and_run_only_on_request(
    llama: Path, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    """Without --trust-remote-code nothing of it runs and nothing is written; with it, the guard and the result do."""
    base, proof = shutil.copytree(llama, tmp_path / "base"), tmp_path / "proof"
    (base / "modeling_own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(proof)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((base / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    config["transformers_version"] = "4.50.0"  # so that the config class is asked for what it derives
    (base / "config.json").write_text(json.dumps(config))

    out = tmp_path / "short"
    for options in ({}, {"no_guard": True}):
        with pytest.raises(ShortcutError, match="comes with code of its own|is for families that were proven"):
            shortcut.cut(base, out, drop="1", quiet=True, **options)
    assert not proof.exists()
    assert not out.exists()
    assert shortcut.inspect(base).refusal is None
    assert not proof.exists()

    shortcut.cut(base, out, drop="1", quiet=True, trust_remote_code=True)
    assert proof.exists()
    assert (out / "modeling_own.py").read_bytes() == (base / "modeling_own.py").read_bytes()
    torch.testing.assert_close(
        load_model(out, Loading(trust_remote_code=True))(token_ids).logits,
        load_model(cut_plainly(llama, tmp_path))(token_ids).logits,
        rtol=0,
        atol=0,
    )


def cut_plainly(llama: Path, tmp_path: Path) -> Path:
    """The same cut of the same weights without code of their own."""
    shortcut.cut(llama, tmp_path / "plain", drop="1", quiet=True)
    return tmp_path / "plain"
