"""Quantised checkpoints are cut as they are: nothing is dequantised, and what names blocks names the right ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.tensors import read_chunks
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import Anatomy
from shortcut.live.load import load_model
from shortcut.records.plan import Plan
from shortcut.surgery.diff import compare_tensors
from shortcut.surgery.numbering import renumber_metadata, renumber_settings
from shortcut.surgery.preview import preview
from tests.conftest import make_model, make_tokenizer
from tests.fuzz.__main__ import CONFIG, write_shards

SIZES = {"hidden_size": 64, "intermediate_size": 128}
DROPPED = [1, 4]  # 0, 2, 3, 5, 6 stay, so that 3 becomes 2 and 5 becomes 3


def bitsandbytes(base: Path, out: Path, **how: Any) -> None:
    settings = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", "model.layers.3.mlp", "model.layers.4"], **how)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    model.save_pretrained(out, max_shard_size="60KB")


def torchao(base: Path, out: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")  # not in the dev extra: it prints when imported
    skipped = ["lm_head", r"model\.layers\.[35]\.mlp"]
    settings = TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2), modules_to_not_convert=skipped)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)
    model.save_pretrained(out, max_shard_size="60KB")


def compressed_tensors(base: Path, out: Path, layout: str, **how: Any) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(symmetric=True, **how))
    ignored = ["lm_head", "model.layers.3.mlp.up_proj", r"re:.*layers\.5\.self_attn.*"]
    apply_quantization_config(
        model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=ignored, format=layout)
    )
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            weight = module.weight.data
            groups = weight.reshape(len(weight), -1, how.get("group_size", weight.shape[1]))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=layout)
    compressor.compress_model(model)
    model.save_pretrained(out, max_shard_size="60KB", state_dict=model.state_dict())
    compressor.update_config(out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["ignore"] = ignored  # the library writes out what the pattern matched
    (out / "config.json").write_text(json.dumps(config))


METHODS: dict[str, Callable[[Path, Path], None]] = {
    "bitsandbytes-nf4": lambda base, out: bitsandbytes(
        base, out, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes-int8": lambda base, out: bitsandbytes(base, out, load_in_8bit=True),
    "torchao-int8": torchao,
    "compressed-tensors-int4": lambda base, out: compressed_tensors(
        base, out, "pack-quantized", num_bits=4, type="int", strategy="group", group_size=32
    ),
    "compressed-tensors-float8": lambda base, out: compressed_tensors(
        base, out, "naive-quantized", num_bits=8, type="float", strategy="channel"
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_checkpoints_are_cut_exactly(
    method: str, tied: bool, tmp_path: Path, token_ids: torch.Tensor
) -> None:
    """Sharded, tied or not: the result loads whole and computes what the base computes without the dropped blocks."""
    plain, base, short = tmp_path / "plain", tmp_path / "base", tmp_path / "short"
    make_model("llama", tie_word_embeddings=tied, **SIZES).save_pretrained(plain)
    METHODS[method](plain, base)
    make_tokenizer().save_pretrained(base)
    before = read_checkpoint(base)
    assert len(before.files) >= 3

    plan = Plan.dropping(before.base, DROPPED)
    shortcut.cut(base, short, plan=plan)

    whole, cut = load_model(base), load_model(short)
    assert type(cut.model.layers[0].self_attn.q_proj) is type(whole.model.layers[0].self_attn.q_proj)
    with torch.no_grad(), preview(whole, plan):
        torch.testing.assert_close(cut(token_ids).logits, whole(token_ids).logits, rtol=0, atol=0)
    after = read_checkpoint(short)
    assert compare_tensors(after, before, plan) == after.size
    assert {t.dtype for t in before.tensors.values()} == {t.dtype for t in after.tensors.values()}


NAMES = [f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("attn.q", "attn.k", "mlp.up")]
NAMES += ["model.embed.weight", "lm_head.weight", "vision_tower.layers.3.mlp.up.weight"]
KEPT = [0, 2, 3, 10, 11]
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "names": (
        {"modules_to_not_convert": ["lm_head", "model.layers.1.attn", "model.layers.10.mlp", "layers.3", "lm_head.0"]},
        {"modules_to_not_convert": ["lm_head", "model.layers.3.mlp", "layers.2", "lm_head.0"]},
    ),
    "another tower": (
        {"ignore": ["vision_tower.layers.3.mlp", "model.visual.layers.1"], "version": "0.18.0", "bits": 4},
        {"ignore": ["vision_tower.layers.3.mlp", "model.visual.layers.1"], "version": "0.18.0", "bits": 4},
    ),
    "names as keys": (
        {"extra": {"model.layers.3.mlp.up": {"bits": 8}, "model.layers.4.mlp.up": {"bits": 2}}},
        {"extra": {"model.layers.2.mlp.up": {"bits": 8}}},
    ),
    "a pattern about all blocks": (
        {"ignore": [r"re:.*layers\.\d+\.mlp.*", "re:.*attn.*", r"model.layers.\d+.mlp"]},
        {"ignore": [r"re:.*layers\.\d+\.mlp.*", "re:.*attn.*", r"model.layers.\d+.mlp"]},
    ),
    "a pattern about some": (
        {"ignore": [r"re:.*layers\.[0-2]\.mlp\..*"]},
        {"ignore": ["model.layers.0.mlp.up", "model.layers.1.mlp.up"]},
    ),
    "a pattern about none that stay": ({"ignore": [r"re:.*layers\.[456]\..*", "x"]}, {"ignore": ["x"]}),
    "GPTQ's patterns": (
        {"quant_method": "gptq", "dynamic": {r"-:.*\.10\..*mlp\..*": {}, r"+:.*layers\.3\.attn\.q": {"bits": 8}}},
        {
            "quant_method": "gptq",
            "dynamic": {"-:model.layers.3.mlp.up$": {}, "+:model.layers.2.attn.q$": {"bits": 8}},
        },
    ),
    "a prefix, as GPTQ reads it": (
        {"quant_method": "gptq", "dynamic": {"model.layers.1": {}}},  # blocks 1, 10 and 11
        {
            "quant_method": "gptq",
            "dynamic": {f"model.layers.{i}{rest}": {} for i in (3, 4) for rest in ("", ".attn", ".attn.q", ".attn.k")}
            | {f"model.layers.{i}{rest}": {} for i in (3, 4) for rest in (".mlp", ".mlp.up")},
        },
    ),
    "shell patterns": (
        {"producer": {"name": "modelopt"}, "exclude_modules": ["lm_head", "model.layers.1*.mlp*", "model.layers.*"]},
        {
            "producer": {"name": "modelopt"},
            "exclude_modules": ["lm_head"]
            + [f"model.layers.{i}.mlp{rest}" for i in (3, 4) for rest in ("", ".up")]
            + ["model.layers.*"],
        },
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_follow_their_blocks(case: str) -> None:
    """Names get their block's new number, patterns are kept or spelt out, and nothing else is touched."""
    settings, expected = SETTINGS[case]
    assert renumber_settings(settings, ANATOMY, KEPT, NAMES) == expected


ANATOMY = Anatomy("model.layers.", 12, (), ("num_hidden_layers",))
NOT_UNDERSTOOD = {
    "several names in one text": ({"blocks": ["model.layers.0,model.layers.1"]}, "cannot tell which blocks"),
    "a block that goes, as a value": ({"first": "model.layers.1"}, "cannot tell what becomes of 'model.layers.1'"),
    "a pattern that takes for ever": ({"ignore": [r"re:model\.(?:a|aa)+[bc]"]}, "takes too long"),
}


@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_settings_that_are_not_understood_are_refused(case: str) -> None:
    """A word that speaks of blocks in a way that cannot be told is an error, not a guess."""
    settings, message = NOT_UNDERSTOOD[case]
    with pytest.raises(ShortcutError, match=message):
        renumber_settings(settings, ANATOMY, KEPT, [*NAMES, "model." + "a" * 60 + ".weight"])


def test_metadata_of_single_tensors_follow_too() -> None:
    """torchao keeps JSON under the name of every tensor in the headers; free text in other headers is left alone."""
    kind = json.dumps({"_type": "Int8Tensor", "_tensor_data_names": ["qdata", "scale"]})
    metadata = {"model.layers.3.mlp.up.weight": kind, "model.layers.4.mlp.up.weight": kind, "format": "pt"}
    names = ["model.layers.3.mlp.up.weight", "model.layers.4.mlp.up.weight", "lm_head.weight"]
    renamed = renumber_metadata({**metadata, "tensor_names": json.dumps(names)}, ANATOMY, KEPT, NAMES)
    assert json.loads(renamed.pop("tensor_names")) == ["model.layers.2.mlp.up.weight", "lm_head.weight"]
    assert renamed == {"model.layers.2.mlp.up.weight": kind, "format": "pt"}
    assert renumber_metadata(metadata, ANATOMY, KEPT, NAMES) == metadata
    with pytest.raises(ShortcutError, match="but not as JSON"):
        renumber_metadata({"tensor_names": "[[["}, ANATOMY, KEPT, NAMES)


def test_settings_beside_the_config_follow_too(llama: Path, tmp_path: Path) -> None:
    """Files that repeat the quantisation settings for other programs are rewritten like config.json."""
    base, short = tmp_path / "base", tmp_path / "short"
    shutil.copytree(llama, base)
    (base / "quantize_config.json").write_text('{"modules_to_not_convert": ["model.layers.3.mlp", "lm_head"]}')
    shortcut.cut(base, short, drop="1")
    assert json.loads((short / "quantize_config.json").read_text()) == {
        "modules_to_not_convert": ["model.layers.2.mlp", "lm_head"]
    }


def test_packed_weights_of_other_methods_follow_their_modules(tmp_path: Path) -> None:
    """GPTQ's tensors, in four shards: packed integers, scales and group numbers stay together, as do the settings."""
    base, short = tmp_path / "base", tmp_path / "short"
    parts = {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16, "g_idx": np.int32}
    tensors: dict[str, np.ndarray[Any, Any]] = {"model.embed_tokens.weight": np.ones((7, 4), np.float16)}
    for block in range(5):
        for part, dtype in parts.items():
            tensors[f"model.layers.{block}.mlp.up_proj.{part}"] = np.full((2, 3), block, dtype)
    write_shards(base, tensors, 4)
    dynamic = {r"-:.*\.3\.mlp\..*": {}, r"+:.*\.4\.mlp\..*": {"bits": 8}}
    settings = {"quant_method": "gptq", "bits": 4, "dynamic": dynamic}
    (base / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
    (base / "quantize_config.json").write_text(json.dumps(settings))

    shortcut.cut(base, short, drop="1-2", quiet=True)
    result = read_checkpoint(short)
    expected = {"-:model.layers.1.mlp.up_proj$": {}, "+:model.layers.2.mlp.up_proj$": {"bits": 8}}
    assert result.config["quantization_config"]["dynamic"] == expected
    assert json.loads((short / "quantize_config.json").read_text())["dynamic"] == expected
    for new, old in enumerate([0, 3, 4]):
        for part, dtype in parts.items():
            tensor = result.tensors[f"model.layers.{new}.mlp.up_proj.{part}"]
            assert b"".join(read_chunks(tensor)) == np.full((2, 3), old, dtype).tobytes()
