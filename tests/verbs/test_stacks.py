"""Encoder-decoders, models for images and for sound: every stack of blocks scored, pruned and checked.

Every score is compared with states that hooks see in the whole model, and every result with the base whose blocks are
skipped, as a user loads both.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION, open_model
from shortcut.common.errors import ShortcutError
from shortcut.material.take import take_text
from shortcut.options.groups import SampledText
from shortcut.publish.card import PLACEHOLDER
from tests.conftest import VOCABULARY, make_tokenizer
from tests.test_cli import fails
from tests.verbs.test_encoders import framing_tokenizer
from tests.vision import FAMILIES, IMAGE, make_inputs, make_vision_model

pytestmark = pytest.mark.thorough

TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO = {
    **TOKENS,
    "decoder_start_token_id": 2,
    "d_model": 40,
    "encoder_layers": 5,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 47,
    "max_position_embeddings": 128,
}
T5 = {
    **TOKENS,
    "decoder_start_token_id": 0,
    "d_model": 40,
    "d_kv": 10,
    "d_ff": 53,
    "num_heads": 4,
    "num_layers": 5,
    "num_decoder_layers": 4,
}
WHISPER = {**TWO, "num_mel_bins": 16, "max_source_positions": 50, "max_target_positions": 64}
TOWER = {"num_attention_heads": 4, "intermediate_size": 53, "image_size": 32, "patch_size": 8}
READING = {
    **TOKENS,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
TOWERS = {
    "text_config": {**READING, "num_hidden_layers": 4, "projection_dim": 44, "projection_size": 44},
    "vision_config": {**TOWER, "hidden_size": 44, "num_hidden_layers": 5, "projection_dim": 44},
}
SOUND = {
    "vocab_size": 31,
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 53,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "T5ForConditionalGeneration": ("t5", T5),
    "BartForConditionalGeneration": ("bart", TWO),
    "MarianMTModel": ("marian", TWO),
    "WhisperForConditionalGeneration": ("whisper", WHISPER),
    "ViTForImageClassification": ("vit", {**TOWER, "hidden_size": 40, "num_hidden_layers": 4, "num_labels": 5}),
    "ViTModel": ("vit", {**TOWER, "hidden_size": 40, "num_hidden_layers": 4}),
    "Dinov2Model": (
        "dinov2",
        {**TOWER, "hidden_size": 40, "mlp_ratio": 1, "num_hidden_layers": 4, "drop_path_rate": 0.1},
    ),
    "SiglipModel": ("siglip", TOWERS),
    "CLIPModel": ("clip", {**TOWERS, "projection_dim": 24}),
    "Wav2Vec2ForCTC": ("wav2vec2", SOUND),
}
STACKS = [
    *((name, stack) for name in list(CASES)[:4] for stack in ("decoder", "encoder")),
    ("ViTForImageClassification", "decoder"),
    ("ViTModel", "decoder"),
    ("Dinov2Model", "decoder"),
    *((name, stack) for name in ("SiglipModel", "CLIPModel") for stack in ("decoder", "vision")),
    ("Wav2Vec2ForCTC", "decoder"),
]
TEXT: dict[str, Any] = {"samples": 5, "length": 24, "quiet": True}


def reader_of(name: str) -> Any:
    """What comes with a checkpoint of this architecture, and makes its inputs."""
    images = {"size": {"height": 32, "width": 32}}
    if name.startswith(("ViT", "Dino")):
        return transformers.ViTImageProcessor(**images)
    if name.startswith("Whisper"):
        hears = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
        return transformers.WhisperProcessor(hears, make_tokenizer())
    if name.startswith("Wav2Vec2"):
        return transformers.Wav2Vec2FeatureExtractor()
    if name.startswith("Siglip"):
        return transformers.SiglipProcessor(transformers.SiglipImageProcessor(**images), framing_tokenizer())
    if name.startswith("CLIP"):
        sees = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        return transformers.CLIPProcessor(sees, framing_tokenizer())
    return framing_tokenizer()


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random checkpoint of an architecture."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name not in made:
            family, sizes = CASES[name]
            torch.manual_seed(7)
            config = transformers.AutoConfig.for_model(family, **sizes)
            model = getattr(transformers, name)._from_config(config, attn_implementation="eager").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
            made[name] = tmp_path_factory.mktemp(name) / "base"
            model.save_pretrained(made[name])
            reader_of(name).save_pretrained(made[name])
        return made[name]

    return give


def load(folder: Path, name: str) -> Any:
    """As a user loads it who knows the class."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def blocks_of(model: Any, stack: str) -> torch.nn.ModuleList:
    """The blocks of a stack: of two lists of blocks, the deeper ones are the encoder's, or see."""
    lists = [each for each in model.modules() if isinstance(each, torch.nn.ModuleList) and len(each) in (3, 4, 5)]
    lists = [each for each in lists if "Layer" in type(each[0]).__name__ or "Block" in type(each[0]).__name__]
    lists = [each for each in lists if "Conv" not in type(each[0]).__name__ and len(list(each[0].parameters())) > 8]
    lists.sort(key=len)
    return lists[0] if stack == "decoder" else lists[-1]


def inputs_of(folder: Path, **text: Any) -> list[dict[str, Any]]:
    """What `score` calls the model with, one example at a time."""
    asked = SampledText(**{**{name: value for name, value in TEXT.items() if name != "quiet"}, **text})
    given = take_text(open_model(folder), asked, asked.samples, trust_remote_code=False)
    return [batch.inputs for batch in given.batches(1)]


def result(model: Any, inputs: dict[str, Any], stack: str) -> torch.Tensor:
    """Logits, last states, or the embedding of a tower."""
    with torch.no_grad():
        found = model(**inputs)
    names = ("logits", "last_hidden_state", "image_embeds" if stack == "vision" else "text_embeds")
    return next(found[name] for name in names if found.get(name) is not None)


def skip(model: Any, stack: str, blocks: list[int]) -> None:
    """Have blocks of a live model hand on the states that they are given, and give the rest of what they give."""
    for number in blocks:

        def put_back(_: Any, args: Any, kwargs: Any, out: Any) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            return states if isinstance(out, torch.Tensor) else (states, *out[1:])

        blocks_of(model, stack)[number].register_forward_hook(put_back, with_kwargs=True)


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_scored_pruned_and_checked(name: str, stack: str, several: Callable[[str], Path], tmp_path: Path) -> None:
    """Scores are those of the states in the whole model; the result is the base without these blocks."""
    base, short = several(name), tmp_path / "short"
    scores = shortcut.score(base, stack=stack, metric="block-influence,angular-all", **TEXT)
    model, cosines, angles = load(base, name), list[list[Any]](), list[list[Any]]()
    for inputs in inputs_of(base):
        states: list[tuple[torch.Tensor, torch.Tensor]] = []

        def note(_: Any, args: Any, kwargs: Any, out: Any, states: Any = states) -> None:
            states.append(
                (args[0] if args else kwargs["hidden_states"], out if isinstance(out, torch.Tensor) else out[0])
            )

        hooks = [block.register_forward_hook(note, with_kwargs=True) for block in blocks_of(model, stack)]
        result(model, inputs, stack)
        for hook in hooks:
            hook.remove()
        mask = inputs.get({"decoder": "attention_mask"}.get(stack, ""))
        assert mask is None or bool(mask.all())
        pairs = [(before[0].double(), after[0].double()) for before, after in states]
        found = [torch.cosine_similarity(before, after, dim=-1) for before, after in pairs]
        cosines.append(found)
        angles.append([(each.clamp(-1, 1).arccos() / np.pi) for each in found])
    depth = len(cosines[0])
    assert scores.base.blocks == depth
    wanted = [1 - torch.cat([row[block] for row in cosines]).mean().item() for block in range(depth)]
    np.testing.assert_allclose(scores.of_blocks("block-influence"), wanted, rtol=1e-4, atol=1e-6)
    wanted = [torch.cat([row[block] for row in angles]).mean().item() for block in range(depth)]
    np.testing.assert_allclose(scores.of_blocks("angular-all"), wanted, rtol=1e-3, atol=1e-5)
    by_one = shortcut.score(base, stack=stack, metric="block-influence", batch_size=1, **TEXT)
    np.testing.assert_allclose(by_one.of_blocks("block-influence"), scores.of_blocks("block-influence"), rtol=1e-4)

    report = shortcut.prune(base, short, stack=stack, drop="1-2", **TEXT)
    assert report.cut.plan.base.stack == stack
    assert report.check.logit_difference == pytest.approx(0, abs=1e-4)
    kept, bypassed = load(short, name), load(base, name)
    skip(bypassed, stack, [1, 2])
    for inputs in inputs_of(base)[:2]:
        expected, whole = (result(each, inputs, stack) for each in (bypassed, model))
        torch.testing.assert_close(result(kept, inputs, stack), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(expected, whole, rtol=1e-3, atol=1e-3)
    card = (short / "README.md").read_text()
    assert (f"--drop 1-2 --stack {stack}" in card) == (stack != "decoder")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    made: dict[str, Any] = {}
    exec(code.replace(PLACEHOLDER, str(short)), made)
    assert type(made["model"]).__name__ in (name, "CLIPModel", "SiglipModel")
    assert type(made.get("tokenizer", made.get("processor"))).__name__ == type(reader_of(name)).__name__
    again = shortcut.check(short, samples=3, length=16, quiet=True)
    assert again.logit_difference == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_what_the_model_gives_without_a_block(name: str, stack: str, several: Callable[[str], Path]) -> None:
    """kl is that of what is predicted, tokens, classes or frames of sound; or the angle of an embedding."""
    base = several(name)
    metric = "kl-all" if stack == "decoder" and "Conditional" in name else "kl"
    scores = shortcut.score(base, stack=stack, metric=metric, **TEXT)
    inputs, distances = inputs_of(base), []
    model = load(base, name)
    whole = [result(model, each, stack) for each in inputs]
    for block in range(len(blocks_of(model, stack))):
        model = load(base, name)
        skip(model, stack, [block])
        found = []
        for one, each in zip(whole, inputs, strict=True):
            other = result(model, each, stack)
            if name in ("ViTModel", "Dinov2Model", "SiglipModel", "CLIPModel"):
                pair = [value.double() if value.dim() == 2 else value.double().mean(1) for value in (one, other)]
                found.append(torch.cosine_similarity(*pair, dim=-1).clamp(-1, 1).arccos() / np.pi)
            else:
                logs = [value.double().log_softmax(-1) for value in (one, other)]
                found.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).flatten())
        distances.append(torch.cat(found).mean().item())
    np.testing.assert_allclose(scores.of_blocks(metric), distances, rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize(("seen", "moved"), [(-2, -2), (-1, -1), (3, 1), ([1, -2], [1, -2]), ([2, 5], [1, 3])])
def test_towers_hand_on_the_same_states(seen: Any, moved: Any, tmp_path: Path) -> None:
    """Inside a vision-language model, what the tower hands on is counted anew where blocks in front of it go."""
    states = {"vision_config.num_hidden_layers": 5, "vision_feature_layer": seen}
    family = replace(FAMILIES["llava"], changes={**FAMILIES["llava"].changes, **states})
    model = make_vision_model(family)
    model.save_pretrained(tmp_path / "base")
    shortcut.cut(tmp_path / "base", tmp_path / "short", drop="1,2", stack="vision", quiet=True)
    assert json.loads((tmp_path / "short" / "config.json").read_text())["vision_feature_layer"] == moved
    short = load(tmp_path / "short", "LlavaForConditionalGeneration")
    inputs = make_inputs(model, family, [[3, IMAGE, 4]])
    whole = result(model, inputs, "vision")
    for number in (1, 2):
        model.model.vision_tower.encoder.layers[number].forward = lambda hidden, *_, **__: hidden
    expected = result(model, inputs, "vision")
    torch.testing.assert_close(result(short, inputs, "vision"), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole, expected, rtol=1e-3, atol=1e-3)


def test_towers_inside_a_vision_language_model(tmp_path: Path) -> None:
    """They are scored on images with questions, pruned by what that changes of the answers, and checked."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(EMBEDDED_VISION, base)
    config = transformers.AutoConfig.from_pretrained(base)
    config.vision_config.num_hidden_layers = 4
    torch.manual_seed(7)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(base)
    scores = shortcut.score(base, stack="vision", metric="kl,block-influence", samples=4, quiet=True)
    assert scores.base.blocks == 4
    assert min(scores.of_blocks("kl")) > 0
    report = shortcut.prune(base, out, stack="vision", count=2, metric="kl", samples=4, quiet=True)
    values = scores.of_blocks("kl")
    assert list(report.cut.plan.dropped) == sorted(sorted(range(4), key=lambda block: values[block])[:2])
    assert report.check.logit_difference == pytest.approx(0, abs=1e-4)
    short = load(out, "LlavaForConditionalGeneration")
    assert (len(short.model.vision_tower.encoder.layers), len(short.model.language_model.layers)) == (2, 12)


def test_towers_keep_a_block_behind_what_they_hand_on(tmp_path: Path) -> None:
    """States within a tower do not become those at its end: a norm may come there."""
    family = replace(FAMILIES["llava"], changes={**FAMILIES["llava"].changes, "vision_config.num_hidden_layers": 4})
    make_vision_model(family).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ShortcutError, match=r"states in front of block 3 are handed on \(vision_feature_layer\): it or"
    ):
        shortcut.cut(tmp_path / "base", tmp_path / "short", drop="3", stack="vision", quiet=True)


def test_the_stacks_are_named(several: Callable[[str], Path], tmp_path: Path, capsys: Any) -> None:
    """inspect says which other stacks there are; a stack that is none, and a plan for another, is one line."""
    base = several("T5ForConditionalGeneration")
    said = str(shortcut.inspect(base))
    assert "t5: 4 decoder blocks" in said
    assert "also 5 encoder blocks: --stack encoder" in said
    assert said.splitlines()[4].split() == [
        *("blocks", "kind", "attention", "cross", "mlp", "norms", "other", "each", "bytes", "of", "model")
    ]
    assert "cross" not in str(shortcut.inspect(base, stack="encoder"))
    command = ["score", str(several("ViTModel")), "--stack", "encoder"]
    assert "vit has no encoder stack of its own: leave out --stack" in fails(capsys, command, 1)
    plan = shortcut.plan(base, drop="2", stack="encoder")
    assert "stack: encoder" in str(plan)
    report = shortcut.cut(base, tmp_path / "short", plan=plan, quiet=True)
    assert report.plan.base.stack == "encoder"
    assert shortcut.inspect(tmp_path / "short").others == {"encoder": 4}
    assert shortcut.diff(base, tmp_path / "short").matches == (0, 1, 2, 3)
    assert shortcut.diff(base, tmp_path / "short", stack="encoder").matches == (0, 1, 3, 4)
    with pytest.raises(ShortcutError, match="the plan is for the decoder, not for --stack encoder"):
        shortcut.cut(base, tmp_path / "no", plan=shortcut.plan(base, drop="2"), stack="encoder", quiet=True)


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_the_block_with_the_positions_stays(stack: str, several: Callable[[str], Path], tmp_path: Path) -> None:
    """T5 keeps its table of relative positions in the first block of each stack: it cannot go."""
    with pytest.raises(ShortcutError, match="block 1 would become block 0 with .*relative_attention_bias"):
        shortcut.cut(several("T5ForConditionalGeneration"), tmp_path / "no", drop="0", stack=stack, quiet=True)


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_one_depth_for_both_stacks(stack: str, tmp_path: Path) -> None:
    """An old config names the depth of T5's encoder alone; what is cut of one stack leaves the other, and it writes."""
    config = transformers.AutoConfig.for_model("t5", **{**T5, "num_layers": 4})
    model = transformers.T5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "num_decoder_layers"}))
    shortcut.cut(tmp_path / "base", tmp_path / "short", drop="1-2", stack=stack, quiet=True)
    short = load(tmp_path / "short", "T5ForConditionalGeneration")
    assert (len(short.encoder.block), len(short.decoder.block)) == ((4, 2) if stack == "decoder" else (2, 4))
    for block in getattr(model, stack).block[1:3]:
        block.register_forward_hook(lambda _, args, out: (args[0], *out[1:]))
    ids = torch.tensor([[5, 6, 7, 8]])
    written = [each.generate(ids, max_new_tokens=6, min_new_tokens=6, num_beams=1).tolist() for each in (model, short)]
    assert written[0] == written[1]


def test_backbones_hand_on_the_same_states(several: Callable[[str], Path], tmp_path: Path) -> None:
    """Where every block is a stage, the stages that are handed on follow the blocks; they do not become one."""
    model = load(several("Dinov2Model"), "Dinov2Backbone")
    model.config.out_indices = [2, 4]
    model.save_pretrained(tmp_path / "base")
    shortcut.cut(tmp_path / "base", tmp_path / "short", drop="1", quiet=True)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["stage_names"] == ["stem", "stage1", "stage2", "stage3"]
    assert config["out_features"] == ["stage1", "stage3"]
    images = torch.randn(1, 3, 32, 32)
    blocks_of(model, "decoder")[1].forward = lambda hidden, *_, **__: hidden
    short = load(tmp_path / "short", "Dinov2Backbone")
    for one, other in zip(short(images).feature_maps, model(images).feature_maps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShortcutError, match=r"states in front of block 2 are handed on \(out_indices\): it or"):
        shortcut.cut(tmp_path / "base", tmp_path / "no", drop="2-3", quiet=True)
    model.config.out_indices = [1, 2, 4]
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ShortcutError, match=r"states are handed on at \[1, 2, 4\] \(out_indices\): a block between"):
        shortcut.cut(tmp_path / "base", tmp_path / "no", drop="1", quiet=True)


def test_an_encoder_as_deep_as_its_decoder(tmp_path: Path) -> None:
    """Of a decoder that is called an encoder by its own family, the name of its half comes first (bert2bert)."""
    part = {**READING, "num_hidden_layers": 3}
    halves = [transformers.AutoConfig.for_model("bert", **part) for _ in range(2)]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
    transformers.EncoderDecoderModel(config).save_pretrained(tmp_path / "base")
    assert open_model(tmp_path / "base", stack="decoder").anatomy.container == "decoder.bert.encoder.layer."
    assert open_model(tmp_path / "base", stack="encoder").anatomy.container == "encoder.encoder.layer."


def test_what_training_drops_does_not_matter(tmp_path: Path) -> None:
    """BEiT drops paths of deeper blocks more often in training, and not at all of the first; otherwise never."""
    config = transformers.AutoConfig.for_model("beit", **TOWER, hidden_size=40, num_hidden_layers=4, drop_path_rate=0.3)
    model = transformers.BeitModel(config).eval()
    rates = {getattr(block.drop_path, "drop_prob", 0.0) for block in blocks_of(model, "decoder")}
    assert len(rates) == 4
    model.save_pretrained(tmp_path / "base")
    shortcut.cut(tmp_path / "base", tmp_path / "short", drop="1", quiet=True)
    images = {"pixel_values": torch.randn(1, 3, 32, 32)}
    skip(model, "decoder", [1])
    found = [result(each, images, "decoder") for each in (load(tmp_path / "short", "BeitModel"), model)]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
