"""Where a family keeps its blocks: in the tensor names, in the config, in a live model.

Discovered, not tabulated. The block container is the name prefix whose first integer component runs over exactly
0..L-1, with L the layer count in the part of the config that is about this stack of blocks; towers for images and
sound, encoders and projectors are told apart by their names. The same rule reads the names in a file and the parameter
names of a live model.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice, starmap
from typing import Any, Literal

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import STACKS, Stack

Part = Literal["attention", "mlp", "norms", "other"]

# Where composite models keep the config of each stack; the first that is there counts.
CONFIGS: Mapping[Stack, tuple[str, ...]] = {
    "decoder": ("text_config", "llm_config", "language_config", "decoder", "decoder_config"),
    "encoder": ("encoder", "encoder_config"),
    "vision": ("vision_config", "vit_config", "visual"),
    "audio": ("audio_config", "speech_config"),
}
# Names of the layer count. The decoder's own comes first: an encoder-decoder's num_hidden_layers is its encoder's.
DECODER_DEPTHS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers")
ENCODER_DEPTHS = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers")
# Lists whose length is the number of blocks, where no field names it.
DEPTH_LISTS = ("layers_block_type", "hybrid_override_pattern")
# Numbers of blocks behind the last one that predict further tokens, where they are stored in the same container.
EXTRA_HEADS = ("num_nextn_predict_layers", "num_mtp_layers")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "layers")
TOWER_DEPTHS = (*DEPTHS, *ENCODER_DEPTHS, "depth")

# Modules outside the blocks whose weight holds an equal part for every block, and along which axis (Gemma 3n and 4).
FUSED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}

COMPILED = "_orig_mod."  # what torch.compile puts in front of names

_NOT_TEXT = re.compile(r"(^|[._])(vision|visual|vit|image|audio|speech|qformer|projector|connector|aligner|vq|mtp)")
_EXTRA_HEAD = re.compile(r"(^|\.)mtp[._]")  # multi-token prediction, where it has a container of its own
_SIDE = re.compile(r"(?:^|[._])(encoder|decoder)[._]")  # the first counts: decoder.bert.encoder.layer
_VISION = re.compile(r"(^|[._])(vision|visual|vit|image)")
_AUDIO = re.compile(r"(^|[._])(audio|speech)")
_NORM = re.compile(r"norm|^ln_?\d*$|^ln_f$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm|conv|recurrent|temporal|^[qkvo]_proj", re.IGNORECASE)
_CROSS = re.compile(r"encoder_attn|cross_?att|encdec", re.IGNORECASE)  # attention to what an encoder made
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|expert|router|^fc_?\d|^fc_(in|out)|^wi|^wo|dense_(h|4h)|^channel_mix"
    r"|denserelu|densegated|^intermediate\.|^output\.dense",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Anatomy:
    """container: name prefix before the block number ("model.layers."); config_path: keys that lead to the part of
    config.json that is about these blocks; depth_fields: the names there that hold the number of blocks."""

    container: str
    depth: int
    config_path: tuple[str, ...]
    depth_fields: tuple[str, ...]
    stack: Stack = "decoder"

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


def find_anatomy(names: Iterable[str], config: Mapping[str, Any], stack: Stack = "decoder") -> Anatomy:
    """Find the block container among tensor names, given the content of config.json.

    stack: which one of several; a model that has only one is found as "decoder", whatever it is. Raises ShortcutError,
    saying what was found, where no container or more than one agrees with the config.
    """
    numbers = _numbers(names)
    try:
        return _find_container(_of_stack(numbers, stack), *stack_config(config, stack), stack)
    except ShortcutError:
        decodes = any(_side(prefix) == "decoder" for prefix in _of_stack(numbers, "decoder"))
        if stack != "decoder" or decodes or any(COMPILED in prefix for prefix in numbers):
            raise
        for other in STACKS[1:]:  # of an encoder without its decoder, or of one tower, the weights may be all there is
            if known := _of_stack(numbers, other):
                return replace(_find_container(known, *_part(config, other), other), stack="decoder")
        raise


def _find_container(
    numbers: Mapping[str, set[int]], path: tuple[str, ...], part: Mapping[str, Any], stack: Stack
) -> Anatomy:
    counts = {prefix: len(found) for prefix, found in numbers.items() if max(found) + 1 == len(found)}
    fields = depth_fields(part, stack)
    if not fields:
        looked = DECODER_DEPTHS + DEPTHS if stack == "decoder" else TOWER_DEPTHS
        raise ShortcutError(f"the config names no number of blocks: looked for {', '.join(looked)}")
    depth = part[fields[0]] if isinstance(part[fields[0]], int) else len(part[fields[0]])
    extra = next((part[name] for name in EXTRA_HEADS if isinstance(part.get(name), int)), 0)
    fitting = [prefix for prefix, count in counts.items() if count in (depth, depth + extra)]
    if len(fitting) > 1:  # an encoder as deep as the decoder
        fitting = [prefix for prefix in fitting if _side(prefix) == "decoder"] or fitting
    if len(fitting) != 1:
        none = "no numbered blocks at all" if stack == "decoder" else f"no numbered blocks of the {stack}"
        found = ", ".join(starmap(_describe, numbers.items())) or none
        raise ShortcutError(
            f"cannot tell where the {depth} blocks are ({fields[0]} = {depth} in config.json): the weights have {found}"
        )
    if COMPILED in fitting[0]:
        raise ShortcutError(
            f"the weights are those of a compiled model, whose names start with {COMPILED}: transformers does not load "
            "them; save the model that was compiled"
        )
    return Anatomy(fitting[0], depth, path, fields, stack)


def other_stacks(names: Iterable[str], config: Mapping[str, Any], stack: Stack) -> dict[Stack, int]:
    """The stacks that a model has beside this one, and how many blocks each has."""
    found: dict[Stack, int] = {}
    names = list(names)
    for other in STACKS:
        try:
            if other != stack:
                found[other] = find_anatomy(names, config, other).depth
        except ShortcutError:
            continue
    return found


def _of_stack(numbers: Mapping[str, set[int]], stack: Stack) -> dict[str, set[int]]:
    """Those prefixes that may be of a stack."""
    patterns = {"vision": _VISION, "audio": _AUDIO}
    if stack in patterns:
        return {prefix: found for prefix, found in numbers.items() if patterns[stack].search(prefix)}
    text = {prefix: found for prefix, found in numbers.items() if not _NOT_TEXT.search(prefix)}
    return text if stack == "decoder" else {prefix: text[prefix] for prefix in text if _side(prefix) == "encoder"}


def _side(name: str) -> str:
    """Of which half of an encoder-decoder a name is; those of other models count as decoders."""
    match = _SIDE.search(name)
    return match[1] if match else "decoder"


def _numbers(names: Iterable[str]) -> dict[str, set[int]]:
    """By prefix, the first integer components behind it."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if match := re.match(r"(.*?(?:^|\.))(\d+)\.", name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    return numbers


def _describe(prefix: str, numbers: set[int]) -> str:
    """What there is under a prefix, for people."""
    missing = islice((number for number in range(max(numbers)) if number not in numbers), 10)
    return f"{prefix}0-{max(numbers)}" + (f" without {gap}" if (gap := ", ".join(map(str, missing))) else "")


def is_other_tower(prefix: str, container: str) -> bool:
    """Whether a name prefix belongs to another tower or stack than the container of blocks."""
    tower, own = (match[2] if (match := _NOT_TEXT.search(name)) else None for name in (prefix, container))
    return tower != own or (_SIDE.search(prefix) is not None and _side(prefix) != _side(container))


def fused_axis(name: str) -> int | None:
    """Along which axis a tensor outside the blocks holds an equal part for every block; None where it does not."""
    return FUSED.get(name.rpartition(".")[0].rpartition(".")[2])


def text_config(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The part of config.json that describes the text decoder, and the keys that lead to it."""
    return _part(config, "decoder")


def stack_config(config: Mapping[str, Any], stack: Stack) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The part of config.json that describes a stack, and the keys that lead to it.

    Raises ShortcutError where the model has no such stack beside its decoder.
    """
    path, part = _part(config, stack)
    if stack == "decoder" or path or (stack == "encoder" and config.get("is_encoder_decoder")):
        return path, part
    raise ShortcutError(f"{config.get('model_type')} has no {stack} stack of its own: leave out --stack")


def _part(config: Mapping[str, Any], stack: Stack) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    for key in CONFIGS[stack]:
        if isinstance(config.get(key), dict):
            return (key,), config[key]
    return (), config


def depth_fields(part: Mapping[str, Any], stack: Stack = "decoder") -> tuple[str, ...]:
    """The fields of a config that hold the number of blocks: all of them, since some configs store it twice."""
    kinds = {"decoder": (DECODER_DEPTHS, DEPTHS), "encoder": ((*ENCODER_DEPTHS, *DEPTHS),)}
    for names in kinds.get(stack, (TOWER_DEPTHS,)):
        present = [name for name in names if isinstance(part.get(name), int) and not isinstance(part[name], bool)]
        if present:
            return tuple(name for name in present if part[name] == part[present[0]])
    return tuple(name for name in DEPTH_LISTS if isinstance(part.get(name), list | str))[:1]


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
    head, _, inner = rest.partition(".")
    if _NORM.search(head) and inner:
        return "norms"
    if part := _named(head):
        return part
    if _NORM.search(rest.split(".")[-2] if inner else ""):
        return "norms"
    return _named(rest) or "other"


def _named(name: str) -> Part | None:
    kinds: tuple[tuple[re.Pattern[str], Part], ...] = ((_ATTENTION, "attention"), (_MLP, "mlp"))
    return next((part for pattern, part in kinds if pattern.search(name)), None)


def attends_to_encoder(rest: str) -> bool:
    """Whether a tensor belongs to attention to what an encoder made, by its name inside the block."""
    return _CROSS.search(rest) is not None
