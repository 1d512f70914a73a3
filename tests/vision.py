"""Tiny random vision-language models of many families, and inputs for them with images in any place.

A prompt is a row of segments: a number of text tokens, or `IMAGE`. Sizes come from the sweep, but for what images need.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.sweep.tiny import _stir, tiny_config

IMAGE = "image"
DEPTH = 6
FIRST_WORD, WORDS = 5, 60  # ids of text are from the first up to the second: none of them is special
Segments = Sequence[int | str]
Inputs = dict[str, Tensor]
Draw = Callable[[Any, torch.Generator], Inputs]  # what the forward of a model of this config needs for one image


@dataclass(frozen=True)
class Family:
    """A kind of tiny model. changes: fields of its config that differ from the sweep's, by their path."""

    model_type: str
    draw: Draw
    changes: dict[str, Any] = field(default_factory=dict)
    types: str | None = None  # the argument that tells the tokens of images, 1, from text, 0
    prefix: bool = False  # whether all are of type 0: a prompt in which every token sees all others
    gain: float = 0.15


def plain(config: Any, generator: torch.Generator) -> Inputs:
    """Images of one size."""
    side = config.vision_config.image_size
    side = side[0] if isinstance(side, list | tuple) else side
    return {"pixel_values": torch.randn(1, 3, side, side, generator=generator)}


def sized(config: Any, generator: torch.Generator) -> Inputs:
    """Images of several sizes, padded to the largest."""
    step = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    height, width = (step * int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
    pixels = torch.zeros(1, 3, 3 * step, 3 * step)
    pixels[:, :, :height, :width] = torch.randn(1, 3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}


def tiled(config: Any, generator: torch.Generator) -> Inputs:
    """Images of several sizes, cut into tiles of one size, with a small picture of the whole in front."""
    side = config.vision_config.image_size
    sizes = torch.tensor([[side, 2 * side], [2 * side, side], [side + 3, 2 * side - 5]])
    size = sizes[torch.randint(len(sizes), (1,), generator=generator)]
    return {"pixel_values": torch.randn(1, 5, 3, side, side, generator=generator), "image_sizes": size}


def gridded(config: Any, generator: torch.Generator) -> Inputs:
    """Images of several sizes, as a row of patches."""
    vision = config.vision_config
    merge = getattr(vision, "spatial_merge_size", 2)
    height, width = (merge * int(torch.randint(1, 4, (), generator=generator)) for _ in range(2))
    channels = getattr(vision, "in_channels", None) or getattr(vision, "num_channels", 3)
    size = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    pixels = torch.randn(height * width, size, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}


def by_row(config: Any, generator: torch.Generator) -> Inputs:
    """Images of one size, in a dimension of their own for every row of the batch."""
    pixels = plain(config, generator)["pixel_values"][None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).bool()}


_TILES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
_WIDE = {"vision_config.image_size": 32}
_MROPE = {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_WINDOW = ["sliding_attention", "full_attention"] * 3
FAMILIES: dict[str, Family] = {
    "llava": Family("llava", plain, _WIDE),
    "pixtral": Family(
        "llava",
        sized,
        {
            "vision_config": "pixtral",
            "vision_config.num_hidden_layers": 2,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
    ),
    "llava_next": Family("llava_next", tiled, _TILES),
    "llava_next_video": Family("llava_next_video", tiled, _TILES),
    "llava_onevision": Family("llava_onevision", tiled, _TILES),
    "qwen2_vl": Family("qwen2_vl", gridded, _MROPE, "mm_token_type_ids"),
    "qwen2_5_vl": Family("qwen2_5_vl", gridded, _MROPE, "mm_token_type_ids"),
    "qwen2_5_vl_window": Family(
        "qwen2_5_vl",
        gridded,
        {**_MROPE, "text_config.layer_types": _WINDOW, "text_config.sliding_window": 5},
        "mm_token_type_ids",
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        gridded,
        {**_MROPE, "vision_config.deepstack_visual_indexes": [0, 1], "vision_config.num_position_embeddings": 16},
        "mm_token_type_ids",
    ),
    "idefics3": Family("idefics3", by_row, _WIDE),
    "smolvlm": Family("smolvlm", by_row, _WIDE),
    "internvl": Family("internvl", plain, {"vision_config.image_size": [32, 32]}),
    "gemma3": Family("gemma3", plain, {**_WIDE, "mm_tokens_per_image": 4}, "token_type_ids"),
    "paligemma": Family("paligemma", plain, {"image_token_index": 300}, "token_type_ids", prefix=True),
    "mistral3": Family("mistral3", sized),
}


def make_vision_model(family: Family) -> Any:
    """A random model of a family, in float32, whose every block turns its input by a good deal."""
    torch.manual_seed(11)
    config = tiny_config(family.model_type, DEPTH)
    for path, value in {"text_config.max_position_embeddings": 256, **family.changes}.items():
        *parts, name = path.split(".")
        part = config
        for key in parts:
            part = getattr(part, key)
        setattr(part, name, tiny_config(value) if name == "vision_config" else value)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    return _stir(model, family.gain).eval()


def image_id(model: Any) -> int:
    """The id of the tokens that stand for parts of images, found without shortcut."""
    return getattr(model.config, "image_token_id", None) or model.config.image_token_index


def visual_ids(model: Any) -> list[int]:
    """The ids of tokens that stand for parts of images and videos, found without shortcut."""
    config = model.config
    video = getattr(config, "video_token_id", None) or getattr(config, "video_token_index", None)
    return [image_id(model), *([video] if video else [])]


@torch.no_grad()
def count_tokens(model: Any, image: Inputs) -> int:
    """How many tokens an image has, by the model's own features."""
    features = model.get_image_features(**image)
    features = getattr(features, "pooler_output", features)
    features = features if isinstance(features, Tensor) else torch.cat(list(features))
    return features.numel() // features.shape[-1]


def make_inputs(
    model: Any, family: Family, rows: Sequence[Segments], *, side: str = "left", seed: int = 3
) -> dict[str, Any]:
    """What a model needs to read these rows, padded on one side to the length of the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids, images = [], []
    for row in rows:
        words: list[Tensor] = []
        images.append([])
        for segment in row:
            if segment == IMAGE:
                images[-1].append(family.draw(model.config, generator))
                words.append(torch.full((count_tokens(model, images[-1][-1]),), image_id(model)))
            else:
                words.append(torch.randint(FIRST_WORD, WORDS, (int(segment),), generator=generator))
        ids.append(torch.cat(words))
    length = max(len(row) for row in ids)
    gaps = [(length - len(row), 0) if side == "left" else (0, length - len(row)) for row in ids]
    padded = [torch.nn.functional.pad(row, gap) for row, gap in zip(ids, gaps, strict=True)]
    mask = [torch.nn.functional.pad(torch.ones_like(row), gap) for row, gap in zip(ids, gaps, strict=True)]
    inputs = {"input_ids": torch.stack(padded), "attention_mask": torch.stack(mask)}
    if family.types:
        inputs[family.types] = ((inputs["input_ids"] == image_id(model)) & (not family.prefix)).long()
    return {**inputs, **(_by_row(images) if family.draw is by_row else _in_one(images))}


def as_videos(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in families of type `gridded`, every image a video of one picture."""
    renamed = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}
    inputs = {renamed.get(name, name): value for name, value in inputs.items()}
    image, video = visual_ids(model)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == image, video)
    return {**inputs, "mm_token_type_ids": 2 * inputs["mm_token_type_ids"]}


def _in_one(images: Sequence[Sequence[Inputs]]) -> Inputs:
    """The images of all rows one after another."""
    every = [image for row in images for image in row]
    return {name: torch.cat([image[name] for image in every]) for name in (every[0] if every else ())}


def _by_row(images: Sequence[Sequence[Inputs]]) -> Inputs:
    """The images of every row, and zeros where it has fewer than others."""
    most = max(len(row) for row in images)
    names = next((row[0] for row in images if row), {})
    shape = {name: tensor.shape[2:] for name, tensor in names.items()}
    inputs = {name: torch.zeros(len(images), most, *shape[name], dtype=names[name].dtype) for name in names}
    for number, row in enumerate(images):
        for place, image in enumerate(row):
            for name, tensor in image.items():
                inputs[name][number, place] = tensor[0, 0]
    return inputs
