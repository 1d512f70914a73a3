"""Where a family keeps its decoder blocks: in the tensor names, in the config, in a live model.

Discovered, not tabulated. The block container is the name prefix whose first integer component runs over exactly
0..L-1, with L the layer count of the (text) config; vision and audio towers, encoders and projectors are told apart by
their names. The same rule reads the names in a file and the parameter names of a live model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Any, Literal

from shortcut.common.errors import ShortcutError

Part = Literal["attention", "mlp", "norms", "other"]

# Where composite models keep the config of their text decoder; the first that is there counts.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "decoder", "decoder_config")
# Names of the layer count. The decoder's own comes first: an encoder-decoder's num_hidden_layers is its encoder's.
DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers")
# Lists whose length is the number of blocks, where no field names it.
DEPTH_LISTS = ("layers_block_type", "hybrid_override_pattern")
# Numbers of blocks behind the last one that predict further tokens, where they are stored in the same container.
EXTRA_HEADS = ("num_nextn_predict_layers", "num_mtp_layers")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "layers")

# Modules outside the blocks whose weight holds an equal part for every block, and along which axis (Gemma 3n and 4).
FUSED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}

COMPILED = "_orig_mod."  # what torch.compile puts in front of names

_NOT_TEXT = re.compile(r"(^|[._])(vision|visual|vit|image|audio|speech|qformer|projector|connector|aligner|vq|mtp)")
_EXTRA_HEAD = re.compile(r"(^|\.)mtp[._]")  # multi-token prediction, where it has a container of its own
_ENCODER = re.compile(r"(^|[._])encoder[._]")
_NORM = re.compile(r"norm|^ln_?\d*$|^ln_f$")
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm|conv|recurrent|temporal|^[qkvo]_proj")
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|expert|router|^fc_?\d|^fc_(in|out)|^wi|^wo|dense_(h|4h)|^channel_mix")


@dataclass(frozen=True)
class Anatomy:
    """container: name prefix before the block number ("model.layers."); config_path: keys that lead to the text config
    inside config.json; depth_fields: the names there that hold the number of blocks."""

    container: str
    depth: int
    config_path: tuple[str, ...]
    depth_fields: tuple[str, ...]

    def split(self, name: str) -> tuple[int, str] | None:
        """("model.layers.7.mlp.up_proj.weight") -> (7, "mlp.up_proj.weight"); None for a tensor of no block."""
        match = re.match(r"(\d+)\.(.+)", name[len(self.container) :]) if name.startswith(self.container) else None
        return (int(match[1]), match[2]) if match else None

    def predicts_further(self, name: str) -> bool:
        """Whether a tensor is of a head behind the last block that predicts further tokens."""
        where = self.split(name)
        return _EXTRA_HEAD.search(name) is not None if where is None else where[0] >= self.depth

    def join(self, block: int, rest: str) -> str:
        """The inverse of `split`."""
        return f"{self.container}{block}.{rest}"


def find_anatomy(names: Iterable[str], config: Mapping[str, Any]) -> Anatomy:
    """Find the block container among tensor names, given the content of config.json.

    Raises ShortcutError, saying what was found, where no container or more than one agrees with the config.
    """
    path, text = text_config(config)
    numbers = _numbers(names)
    counts = {prefix: len(found) for prefix, found in numbers.items() if max(found) + 1 == len(found)}
    fields = depth_fields(text)
    if not fields:
        raise ShortcutError(f"the config names no number of blocks: looked for {', '.join(DECODER_DEPTHS + DEPTHS)}")
    depth = text[fields[0]] if isinstance(text[fields[0]], int) else len(text[fields[0]])
    extra = next((text[name] for name in EXTRA_HEADS if isinstance(text.get(name), int)), 0)
    fitting = [prefix for prefix, count in counts.items() if count in (depth, depth + extra)]
    if len(fitting) > 1:  # an encoder as deep as the decoder
        fitting = [prefix for prefix in fitting if not _ENCODER.search(prefix)] or fitting
    if len(fitting) != 1:
        found = ", ".join(starmap(_describe, numbers.items())) or "no numbered blocks at all"
        raise ShortcutError(
            f"cannot tell where the {depth} blocks are ({fields[0]} = {depth} in config.json): the weights have {found}"
        )
    if COMPILED in fitting[0]:
        raise ShortcutError(
            f"the weights are those of a compiled model, whose names start with {COMPILED}: transformers does not load "
            "them; save the model that was compiled"
        )
    return Anatomy(fitting[0], depth, path, fields)


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """By prefix outside other towers, the first integer components behind it."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        match = re.match(r"(.*?(?:^|\.))(\d+)\.", name)
        if match and not _NOT_TEXT.search(match[1]):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    return numbers


def _describe(prefix: str, numbers: set[int]) -> str:
    """What there is under a prefix, for people."""
    missing = islice((number for number in range(max(numbers)) if number not in numbers), 10)
    return f"{prefix}0-{max(numbers)}" + (f" without {gap}" if (gap := ", ".join(map(str, missing))) else "")


def is_other_tower(prefix: str, container: str) -> bool:
    """Whether a name prefix belongs to a tower for images or sound, or to an encoder, and not to the decoder."""
    return bool(_NOT_TEXT.search(prefix)) or bool(_ENCODER.search(prefix) and not _ENCODER.search(container))


def fused_axis(name: str) -> int | None:
    """Along which axis a tensor outside the blocks holds an equal part for every block; None where it does not."""
    return FUSED.get(name.rpartition(".")[0].rpartition(".")[2])


def text_config(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The part of config.json that describes the text decoder, and the keys that lead to it."""
    for key in TEXT_CONFIGS:
        if isinstance(config.get(key), dict):
            return (key,), config[key]
    return (), config


def depth_fields(text: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a text config that hold its number of blocks: all of them, since some configs store it twice."""
    for names in (DECODER_DEPTHS, DEPTHS):
        present = [name for name in names if isinstance(text.get(name), int) and not isinstance(text[name], bool)]
        if present:
            return tuple(name for name in present if text[name] == text[present[0]])
    return tuple(name for name in DEPTH_LISTS if isinstance(text.get(name), list | str))[:1]


def visual_tokens(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of tokens that stand for parts of images and videos. Raises ShortcutError where there are none."""
    found = {config.get(f"{kind}_token_{word}") for kind in ("image", "video") for word in ("id", "index")}
    ids = tuple(sorted(number for number in found if isinstance(number, int)))
    if not ids:
        raise ShortcutError(f"{config.get('model_type')} sees no images: its config names no tokens of images")
    return ids


def sees_images(config: Mapping[str, Any]) -> bool:
    """Whether a model has tokens that stand for parts of images."""
    try:
        return bool(visual_tokens(config))
    except ShortcutError:
        return False


def part_of(rest: str) -> Part:
    """Which part of a block a tensor belongs to, by its name inside the block."""
    head = rest.split(".")[0]
    if _NORM.search(head) and "." in rest:
        return "norms"
    for pattern, part in ((_ATTENTION, "attention"), (_MLP, "mlp")):
        if pattern.search(head):
            return part  # type: ignore[return-value]
    for pattern, part in ((_ATTENTION, "attention"), (_MLP, "mlp")):
        if pattern.search(rest):
            return part  # type: ignore[return-value]
    return "other"
