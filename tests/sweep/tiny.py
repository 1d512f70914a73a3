"""A tiny random model of every family and task of transformers that has blocks.

A config starts from the defaults of its class. Every size is made small by the NAME of its field, the decoder gets the
depth asked for and all other towers another one, and lists with one entry per block get both kinds of entry where the
family mixes kinds. Families that need more have a row in OVERRIDES, keyed by the model type of the config or of the
part of it.
"""

import copy
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shortcut.common.stacks import Stack

Kind = Literal[
    "causal",
    "image-text",
    "masked",
    "sequence",
    "tokens",
    "bare",
    "seq2seq",
    "seq2seq encoder",
    "speech",
    "speech encoder",
    "ctc",
    "sounds",
    "images",
    "image-text towers",
    "image-text towers vision",
]
# By kind, the auto class, the table of transformers that names its families, and the stack that is cut.
KINDS: dict[Kind, tuple[str, str, Stack]] = {
    "causal": ("AutoModelForCausalLM", "CAUSAL_LM", "decoder"),
    "image-text": ("AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "decoder"),
    "masked": ("AutoModelForMaskedLM", "MASKED_LM", "decoder"),
    "sequence": ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION", "decoder"),
    "tokens": ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION", "decoder"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "decoder"),
    "seq2seq encoder": ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "encoder"),
    "speech": ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "decoder"),
    "speech encoder": ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "encoder"),
    "ctc": ("AutoModelForCTC", "CTC", "decoder"),
    "sounds": ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION", "decoder"),
    "images": ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION", "decoder"),
    "image-text towers": ("AutoModelForZeroShotImageClassification", "ZERO_SHOT_IMAGE_CLASSIFICATION", "decoder"),
    "image-text towers vision": ("AutoModelForZeroShotImageClassification", "ZERO_SHOT_IMAGE_CLASSIFICATION", "vision"),
    "bare": ("AutoModel", "", "decoder"),  # of families with masked tokens, images or sounds: encoders
}
WRITING: tuple[Kind, ...] = ("causal", "image-text")
LOOKING: tuple[Kind, ...] = (  # which are given images or sounds
    *("bare", "speech", "speech encoder", "ctc", "sounds", "images", "image-text towers", "image-text towers vision"),
)
Tower = Literal["decoder", "around", "vision", "other"]  # around: a composite config, which holds the decoder's
Fields = dict[str, Any]

VOCABULARY = 101
DEPTH = 6
FIRST_SPECIAL = 70  # ids from here on belong to images, sounds and the like; 0, 1 and 2 are padding, BOS and EOS

# Where composite configs keep the decoder.
_DECODERS = ("text_config", "llm_config", "language_config", "decoder", "decoder_config", "vlm_config")
_DEPTHS = re.compile(
    r"((conf_|encoder_)?num_hidden|n|num|encoder|num_encoder|resampler)_layers?|num_blocks|layers|(resampler_)?depth"
)
_DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
_TOWER_DEPTHS: dict[Stack, dict[str, int]] = {
    "decoder": {"vision": 2, "other": 3},
    "vision": {"decoder": 3, "other": 2},  # where the blocks for images are those that go
    "encoder": {"vision": 2, "other": DEPTH + 1},  # of encoders with a config of their own
}

_DEPTH_NAMES = (*_DECODER_DEPTHS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "layers")
_TOKENS = re.compile(r"(?<!layer)_ids?$|_token_index$")

# Sizes by name: the first pattern that matches a whole name counts. A value is never made larger.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"(.*_)?vocab_size(_.*)?|.*_vocab|num_embeddings|codebook_size", VOCABULARY),
    (r"sliding_window(_size)?|.*_window_size|local_attention(_window_len)?|attention_chunk_size|index_topk", 4),
    (r"(.*_)?chunk_size|block_size|.*chunk_length|keep_window_size|index_block_size", 4),
    (
        r"(.*_)?max_(.*_)?(position_embeddings|positions|seq_len|length)|n_positions|n_ctx|max_seq_len|context_length",
        64,
    ),
    (r"model_max_length|rel_extent|.*_max_distance|original_max_position_embeddings", 64),
    (r"qk_rope_head_dim|rotary_dim", 4),
    (r"qk_head_dim", 12),
    (r"(.*_)?(head_dim|head_size|headdim)|d_kv|d_head|dim_head|kv_channels|mamba_d_head|d_rel|.*_dim_head", 8),
    (r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"(.*_)?(num_)?(attention_)?heads?|n_head|.*_n_heads|n_heads|linear_num_(key|value)_heads|(.*_)?heads_per_.*", 4),
    (r"(.*_)?(num|n)_(local_|routed_|)experts|moe_num_experts|zero_expert_num", 4),
    (r"(.*_)?experts_per_tok(en)?|(.*_)?top_?k(_.*)?|moe_k|(num|n)_(expert_)?groups?|.*shared_experts", 2),
    (r".*rank", 8),
    (r"(.*_)?(state_size|d_state)", 8),
    (r"(.*_)?(intermediate_(size|dim)(_.*)?|ffn_(dim|hidden_size)|ff_size|mlp_dim|mlp_hidden_size)", 48),
    (r"d_ff|dff|dim_ff|d_inner|feed_forward_size|share_expert_dim", 48),
    (
        r"(.*_)?(hidden_(size|dim)s?|embed_dims?|emb_dim|embedding_(dim|size)|embd|width|output_dim|channels|input_size)(_.*)?",
        32,
    ),
    (r"d_model|dim_model.*|word_embed_proj_dim|projection_dim|attention_hidden_size|.*_(in|out)_dim|mamba_d_ssm", 32),
    (r"num_query_tokens|image_seq_length|num_image_tokens|latent_query_num|(.*_)?num_latents|.*_n_latents", 4),
    (r"(.*_)?image_size|crop_size|resolution", 16),
    (r"(.*_)?patch_size", 8),
)
# Numbers and sets of blocks of the decoder, by name.
_BLOCKS: Fields = {
    "num_kv_shared_layers": 2,
    "first_k_dense_replace": 2,
    "num_dense_layers": 2,
    "max_window_layers": 2,
    "moe_layer_start_index": 2,
    "num_hash_layers": 2,
    "use_sliding_window": True,
    "is_decoder": True,
    "cross_attention_layers": [1, 4],
    "full_attn_idxs": [1, 2, 5],
    "attn_layer_indices": [1, 3],  # without these two no block with attention is left
    "local_layer_ids": [0, 3, 4],
    "mlp_only_layers": [1, 4],
    "moe_layers": [0, 3, 4],
    "rope_scaling_layers": [1, 4],
    "hybrid_layer_ids": [1, 2, 5],
    "ple_layer_ids": [2, 5],
}

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
}
_WINDOWS = [*["sliding_attention", "full_attention"], *["sliding_attention"] * 2, *["full_attention"] * 2]
_MOE = ["dense", "sparse", "dense", "dense", "sparse", "sparse"]
_THETAS = [10000.0, 0, 10000.0, 500000.0, 0, 10000.0]
_LINEAR = "linear_attention"
_HYBRID = ["linear_attention", "full_attention", "moe"] * 2
_INDEXERS = {"indexer_types": ["full", "full", "shared", "full", "shared", "shared"]}
_SWA = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "head_dim": 12}

# What the rules by name cannot know. Rows are merged over the fields of the config of that model type; their lists
# with one entry per block are for the usual depth.
OVERRIDES: dict[str, Fields] = {
    "chameleon": {"vocabulary_map": {"<image>": 90}},
    "bros": {"hidden_size": 64},
    "cohere2_moe": {"mlp_layer_types": _MOE},
    "cohere_compass_text": {"layer_types": _WINDOWS, "rope_parameters": _ROPES},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": _MOE, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"global_head_dim": 16, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dory": {"layer_types": _WINDOWS, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "head_dim": 12,
        **{f"swa_{name}": value for name, value in {**_SWA, "qk_nope_head_dim": 8, "v_head_dim": 8}.items()},
    },
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 4]},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]}},
    "esm": {"vocab_size": VOCABULARY},
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "gemma3n_text": {  # the last two blocks use the keys and values of blocks 3 and 0
        "intermediate_size": [48, 32, 48, 16, 32, 48],
        "layer_types": ["full_attention", *["sliding_attention"] * 4, "full_attention"],
    },
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}},
    "glm5_next_text": {"index_kpool": 2, "indexer_types": [*["full"] * 5, "shared"]},
    "glm_moe_dsa": _INDEXERS,
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "gpt_neo": {"attention_types": [[["local", "global"], 1], [["local"], 2], [["global"], 2]]},
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "spatial_target_layers": [0, 1],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
    },
    "granite_swa": {"layer_rope_theta": _THETAS},
    "granitemoe_swa": {"layer_rope_theta": _THETAS},
    "granitemoehybrid": {"layer_types": [_LINEAR, "full_attention", _LINEAR, _LINEAR, *["full_attention"] * 2]},
    "hy_v4": _INDEXERS,
    "hy_v4_vl_text": {"rope_parameters": _MROPE, "qk_rope_head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}},
    "inkling_text": {"mlp_layer_types": _MOE},
    "lasr_ctc": {"encoder_config": {"num_hidden_layers": DEPTH}},
    "laguna": {"layer_types": _WINDOWS, "num_attention_heads_per_layer": [2, 4, 2, 2, 4, 4]},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "full_attention"]},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8, "layer_types": _WINDOWS},
    "mistral_large4_text": {"kv_source_layers": [0, 1, 2, 2, 4, 5], **_INDEXERS},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"image_size": [16, 16]},
    "mellum": {"layer_types": _WINDOWS},
    "minicpm_ocr": {"image_token_id": 90},
    "minicpmv4_6": {"image_token_id": 90},
    "minicpmv4_7": {"image_token_id": 90},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", *["full_attention"] * 2, *["minimax_m3_sparse"] * 2],
        "mlp_layer_types": _MOE,
    },
    "mimi": {"codebook_size": 64},
    "muse_spark_audio": {"patch_sizes": [4, 2], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2},
    "nemotron_h": {"layers_block_type": _HYBRID},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "omniasr_ctc": {"audio_config": {"num_hidden_layers": DEPTH}},
    "parakeet_ctc": {"encoder_config": {"num_hidden_layers": DEPTH}},
    "perception_lm": {"vision_config": {"model_type": "clip_vision_model", "model_args": {"embed_dim": 32}}},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 91},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 91},
    "udop": {"decoder_start_token_id": 1},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1, 4],
        "split_ngram_parts": 2,
        "eos_token_id": 2,
        "make_ngram_vocab_size_divisible_by": 8,
    },
    "blip-2": {"image_token_index": 90},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "step3p5": {
        "sliding_window": 4,
        "num_sliding_attention_heads": 2,
        "layer_types": _WINDOWS,
        "mlp_layer_types": _MOE,
    },
    "vision-encoder-decoder": {"decoder_start_token_id": 1},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
}

# Shapes of what a forward wants besides token ids, by the name of the argument.
INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    "blip": {"pixel_values": (2, 3, 16, 16)},
    "blip-2": {"pixel_values": (2, 3, 16, 16), "attention_mask": (2, 12)},
    "dia": {"decoder_input_ids": (2, 12, 9)},
    "idefics": {"pixel_values": (2, 1, 3, 16, 16)},
    "instructblip": {"pixel_values": (2, 3, 16, 16), "qformer_input_ids": (2, 5)},
    "instructblipvideo": {"pixel_values": (2, 1, 3, 16, 16), "qformer_input_ids": (2, 5)},
    "kosmos-2": {"image_embeds": (2, 0, 32), "image_embeds_position_mask": (2, 12)},
    "mllama": {"cross_attention_states": (2, 4, 32)},
    "pix2struct": {"flattened_patches": (2, 4, 34)},
    "pp_formulanet": {"pixel_values": (2, 3, 16, 16)},
    "siglip2": {"pixel_values": (2, 4, 192), "pixel_attention_mask": (2, 4), "spatial_shapes": (2, 2)},
    "udop": {"bbox": (2, 12, 4)},
    "bros": {"bbox": (2, 12, 4)},
    "vision-encoder-decoder": {"pixel_values": (2, 3, 16, 16)},
}

# Spread of the random weights where the usual one is too much: blocks that normalise what they return, and look at an
# image or an encoder, forget what the blocks before them did.
GAINS = {"blip": 0.1, "florence2": 0.1, "vision-encoder-decoder": 0.1}

_DRAFTER = "A drafter: each of its blocks reads the keys and values of another model, so it cannot run by itself."
_TEXT_ONLY = "AutoModelForCausalLM saves the text part alone, under a type that no auto class loads."
_SIZES_TOGETHER = "The sizes of its convolutions and stages hang together in ways that a tiny config does not keep."
_DEFAULTS = "Its config cannot be built from its own defaults: one of its parts has no type there."
_QFORMER = "Its Q-Former reads the text, and the one that from_config of this release builds does not run."
_CODEC = "AutoModelForCausalLM lists its decoder, but cannot build or load it from the config that goes with the name."
# Families that cannot be built, reloaded or run tiny here; with the kind where that is true of one kind only.
SKIPPED: dict[str, str] = {
    "align image-text towers": _SIZES_TOGETHER,
    "apertus1p5 image-text": "Tokens of images and sounds are ranges of its vocabulary, larger than a tiny one; "
    "apertus1p5_text covers the decoder.",
    "emu3 causal": _TEXT_ONLY,
    "evolla": "AutoModelForImageTextToText of this release lists the family, but does not recognise its config class.",
    "gemma3n": "Its vision tower is a timm model, and timm is no dependency; gemma3n_text covers the decoder.",
    "gemma4_assistant": _DRAFTER,
    "gemma4_unified_assistant": _DRAFTER,
    "layoutlmv2": "It needs detectron2, which is no dependency.",
    "layoutlmv3": "The sizes of its embeddings of places hang together in ways that a tiny config does not keep.",
    "llama4 image-text": "Its forward in this release asks its text model for an output that it does not give.",
    "mllama causal": _TEXT_ONLY,
    "musicgen": _CODEC,
    "musicgen_melody": _CODEC,
    "pi0": "A robot policy: it turns images and states into actions, and has no logits to compare.",
    "squeezebert": "Its blocks are called past the hooks by which the reference bypasses them.",
    "blip-2 image-text towers": _QFORMER,
    "blip-2 image-text towers vision": _QFORMER,
    "dinat": "It needs natten, which is no dependency.",
    "donut-swin": _SIZES_TOGETHER,
    "fun_asr_nano": _DEFAULTS,
    "granite_speech5_ctc": "Its first blocks halve the number of frames: what it is without one is not defined.",
    "kyutai_speech_to_text speech": _SIZES_TOGETHER,
    "moonshine_streaming": "Its model of this release asks its config for num_key_value_heads, which is not there.",
    "nemo_speechlm": _DEFAULTS,
    "swinv2": _SIZES_TOGETHER,
    "timm_wrapper": "It wraps a model of timm, and timm is no dependency.",
    "videoprism": "It sees videos, of which the sweep makes none.",
    "voxtral_realtime": "It hears and writes frame by frame: a tiny text and a tiny sound do not fit each other.",
    "shieldgemma2": "from_pretrained of this release does not find the keys that its own save_pretrained writes.",
}


def model_types() -> list[tuple[str, Kind]]:
    """Every family with a model of each kind."""
    pairs: list[tuple[str, Kind]] = []
    for kind, (_, table, stack) in KINDS.items():
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES", {})
        pairs += [(name, kind) for name in names if stack != "encoder" or CONFIG_MAPPING[name]().is_encoder_decoder]
    towers = {name for name, kind in pairs if kind == "image-text towers"}
    encoders = {name for name, kind in pairs if kind in ("masked", "images", "sounds", "ctc")} - towers
    pairs += [(name, "bare") for name in modeling_auto.MODEL_MAPPING_NAMES if name in encoders]
    return sorted(pairs)


def tiny_config(model_type: str, depth: int = DEPTH, stack: Stack = "decoder") -> PreTrainedConfig:
    """The config of a tiny model of a family, its decoder, or its tower for images, of this many blocks."""
    config_class = CONFIG_MAPPING[model_type]
    fields = _Maker(depth, stack).fields(config_class, {}, "decoder")
    _mix_kinds(fields, config_class(), depth)
    tiny = config_class(**copy.deepcopy(fields))
    for part in _parts(tiny):
        part.dtype = torch.float32
    return tiny


def tiny_model(model_type: str, kind: Kind, depth: int = DEPTH, gain: float | None = None) -> Any:
    """A random model of a family in float32, whose every block turns its input by a good deal.

    gain: the spread of its weights, if not the one that the family is known to need.
    """
    torch.manual_seed(11)
    auto, stack = getattr(transformers, KINDS[kind][0]), KINDS[kind][2]
    if kind == "images" and "vision_config" in CONFIG_MAPPING[model_type].sub_configs:
        stack = "vision"  # of two towers the one that sees

    def config() -> PreTrainedConfig:
        made = tiny_config(model_type, depth, stack)
        if kind not in WRITING and not made.is_encoder_decoder:
            made.is_decoder = False
        made.num_labels, made.decoder_start_token_id = 3, 1
        made.architectures = made.architectures or []  # of two classes for a task, the first
        if kind == "ctc" and made.vocab_size is None:
            made.vocab_size = VOCABULARY
        for part in _parts(made) if kind == "sequence" else ():
            part.pad_token_id = 0
        return made

    try:
        model = auto.from_config(config(), attn_implementation="eager", dtype=torch.float32)
    except (ValueError, TypeError, KeyError):  # families with an attention of their own
        model = auto.from_config(config(), dtype=torch.float32)
    for name in ("forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens"):
        if model.can_generate():
            setattr(model.generation_config, name, None)
    return _stir(model.float(), gain or GAINS.get(model_type, 0.3)).eval()


@torch.no_grad()
def _stir(model: Any, gain: float) -> Any:
    """New values for all parameters: matrices large enough to matter, vectors around what the family starts from."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * gain
        centre = parameter.mean() if parameter.dim() < 2 else torch.zeros(())
        parameter.copy_(noise + (centre if abs(centre) < 10 else 0))  # not abs >= 10: it may be NaN
    return model


def tiny_inputs(model: Any, kind: Kind) -> Fields:
    """What the forward of a tiny model needs, for two texts of twelve tokens without special ones, images or sounds."""
    generator = torch.Generator().manual_seed(5)
    config = model.config
    wanted = inspect.signature(model.forward).parameters
    inputs: Fields = {}
    for name in ("input_ids", "decoder_input_ids"):
        if name in wanted and (name == "input_ids" or config.is_encoder_decoder):
            inputs[name] = torch.randint(5, FIRST_SPECIAL, (2, 12), generator=generator)
    if kind == "sequence" and config.is_encoder_decoder:
        inputs["input_ids"][:, -1] = 2  # what ends a text is what they look at
        inputs.pop("decoder_input_ids", None)
    shapes = {name: shape for name, shape in _shapes(config).items() if name in wanted and kind in LOOKING}
    if kind == "bare" and "input_ids" in wanted:
        shapes = {}
    for name, shape in shapes.items():
        inputs[name] = torch.randn(shape, generator=generator)
    for name, shape in INPUTS.get(config.model_type, {}).items():
        value = torch.rand(shape, generator=generator)
        inputs[name] = value.round().long() + 5 if name.endswith("_ids") else value
        if name.endswith("_mask"):
            inputs[name] = torch.zeros(shape).long()
        if name in (
            "attention_mask",
            "pixel_attention_mask",
            "spatial_shapes",
        ):  # all tokens; all of two by two patches
            inputs[name] = torch.full(shape, 1 if name.endswith("_mask") else 2)
    return _fitting(model, inputs)


@torch.no_grad()
def _fitting(model: Any, inputs: Fields) -> Fields:
    """The same inputs in the first form in which the model runs; as they are where it does not run in any.

    Families differ in whether features or frames of sounds come first, whether there are channels, and which of two
    inputs stands for the other.
    """
    forms = [inputs]
    if "input_values" in inputs:
        forms.append({**inputs, "input_values": inputs["input_values"][:, None]})
    if "input_features" in inputs:
        forms.append({**inputs, "input_features": inputs["input_features"].mT.contiguous()})
    forms += [
        {name: value for name, value in form.items() if name != left_out}
        for form in list(forms)
        for left_out in ("input_ids", "input_features", "input_values")
        if left_out in form and len(form) > 1
    ]
    for form in forms:
        try:
            model(**form)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            continue
        return form
    return inputs


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of images and sounds, by the name of the argument."""

    parts = (config, *_parts(config))

    def find(*names: str) -> Any:
        found = (getattr(part, name, None) for name in names for part in parts)
        return next((value for value in found if value is not None), None)

    side, channels = find("image_size") or 16, find("num_channels") or 3
    bins = find("num_mel_bins", "input_feat_per_channel")
    height, width = side if isinstance(side, list | tuple) else (side, side)
    frames = 2 * (find("max_source_positions") or 16)
    spectrum = (2, find("max_length"), bins) if bins and find("max_length") else (2, 4000)
    return {
        "pixel_values": (2, channels, height, width),
        "input_values": spectrum,
        "input_features": (2, bins or find("feature_projection_input_dim") or 16, frames),
    }


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield from _parts(part)


def _text_key(config_class: type[PreTrainedConfig]) -> str | None:
    return next((key for key in _DECODERS if key in config_class.sub_configs_defaults), None)


def _role(key: str) -> Tower:
    return "vision" if re.search("vision|vit|image", key) else "other"


def _defaults(config_class: type[PreTrainedConfig]) -> Fields:
    """The fields that a config class declares itself, with their defaults before anything is derived from them."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    found: Fields = {}
    for field in dataclasses.fields(config_class):
        if field.name in common:
            continue
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> Fields:
    """Fields with changes laid over them, dicts in them likewise."""
    result = dict(fields)
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def _mix_kinds(fields: Fields, usual: PreTrainedConfig, depth: int) -> None:
    """Give every list with one entry per block both kinds of entry, where the usual config of the family has both.

    fields: of the tiny config, changed in place.
    """
    fixed: Fields = {}
    while key := _text_key(type(usual)):
        fixed = OVERRIDES.get(type(usual).model_type, {}).get(key, {})
        fields, usual = fields[key], getattr(usual, key)
    fixed = {**_BLOCKS, **fixed, **OVERRIDES.get(type(usual).model_type, {})}
    values = usual.to_dict()
    usual_depth = next((values[name] for name in _DEPTH_NAMES if values.get(name) is not None), None)
    for name in _defaults(type(usual)).keys() - fixed.keys():
        value = values.get(name)
        if isinstance(value, list) and len(value) == usual_depth and not _TOKENS.search(name):
            kinds = list({json.dumps(entry): entry for entry in value}.values())
            if 2 <= len(kinds) <= 4 or isinstance(fields.get(name), list):
                fields[name] = _mixed(kinds, depth)


def _mixed(kinds: list[Any], depth: int) -> list[Any]:
    """Kinds over the blocks so that all stay, and the main one stays last, whichever of the tested blocks go."""
    main = next((kind for kind in ("full_attention", "sparse") if kind in kinds), kinds[-1])
    others = [kind for kind in kinds if kind != main] or [main]
    pattern = [others[0], main, others[-1], others[0], main, main]
    return [pattern[i % len(pattern)] for i in range(depth - 1)] + [main]


class _Maker:
    """Makes the fields of one config, its parts included. `ids`: special token ids by field name, one for all parts."""

    def __init__(self, depth: int, stack: Stack) -> None:
        self.depth = depth
        tower = "vision" if stack == "vision" else "decoder"
        self.depths = {**_TOWER_DEPTHS["encoder" if stack == "encoder" else tower], tower: depth}
        self.ids: dict[str, int] = {}

    def fields(self, config_class: type[PreTrainedConfig], given: Mapping[str, Any], tower: Tower) -> Fields:
        """Fields for a config class, small; `given`: what the config around it says differently from the class."""
        overrides = OVERRIDES.get(config_class.model_type, {})
        parts = config_class.sub_configs_defaults
        text = _text_key(config_class)
        defaults = {**_defaults(config_class), **given}
        made: Fields = {}
        for name, value in defaults.items():
            if name not in parts and name not in overrides:
                small = self.small(name, value, tower if text is None else "around", defaults)
                if small is not None:
                    made[name] = small
        for key, spec in parts.items():
            wanted = overrides.get(key, {})
            if wanted is None or (spec.optional and key not in overrides and defaults.get(key) is None):
                continue
            inner = CONFIG_MAPPING[wanted["model_type"]]() if "model_type" in wanted else spec.default_config
            part = self.fields(type(inner), dict(spec.init_kwargs), tower if key == text else _role(key))
            made[key] = _merged({"model_type": inner.model_type, **part}, wanted)
        rows = {key: self.fitted(value) for key, value in overrides.items() if key not in parts}
        return _merged(made, rows)

    def fitted(self, value: Any) -> Any:
        """What a row says, lists of the usual depth made as long as this decoder is deep."""
        if isinstance(value, list) and len(value) == DEPTH:
            return [value[i % DEPTH] for i in range(self.depth)]
        return value

    def small(self, name: str, value: Any, tower: Tower, defaults: Mapping[str, Any]) -> Any:
        """What a field of this name and default is in a tiny model; None leaves it to the class."""
        if tower != "around" and (depth := self.depth_of(name, tower, defaults)):
            return depth
        if name in _BLOCKS and tower == "decoder" and (value is not None or isinstance(_BLOCKS[name], list)):
            return _BLOCKS[name] if value or not isinstance(value, int) or isinstance(value, bool) else value
        if value is None or isinstance(value, str | float):
            return value
        if isinstance(value, bool):
            return value
        if isinstance(value, dict):
            return {key: self.small(str(key), inner, "around", defaults) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            if _TOKENS.search(name) and all(isinstance(entry, int) for entry in value):
                return [self.token(f"{name}{i}") for i, _ in enumerate(value)]
            return [self.small(name, entry, tower, defaults) for entry in value]
        if not isinstance(value, int):
            return value
        if name == "num_key_value_heads" and value == defaults.get("num_attention_heads"):
            return min(value, 4)
        if _TOKENS.search(name):
            return self.token(name)
        return next((min(value, size) for pattern, size in _SIZES if re.fullmatch(pattern, name)), value)

    def depth_of(self, name: str, tower: Tower, defaults: Mapping[str, Any]) -> int | None:
        """The number of blocks, where a field of this name holds one."""
        if name in _DECODER_DEPTHS:
            return self.depths[tower]
        if not _DEPTHS.fullmatch(name) or isinstance(defaults.get(name), list | tuple):
            return None
        if tower == "decoder":  # an encoder beside the decoder is deeper, as caches are made as deep as the encoder
            return self.depths["decoder"] + any(field in defaults for field in _DECODER_DEPTHS)
        return self.depths["vision" if tower == "vision" else "other"]

    def token(self, name: str) -> int:
        """A token id of its own for every name; the usual ones for padding, beginning and end."""
        usual = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 2}
        if name in usual:
            return usual[name]
        return self.ids.setdefault(re.sub("index$", "id", name), FIRST_SPECIAL + len(self.ids))
