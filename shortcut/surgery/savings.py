"""What every move saves: parameters, cache, and arithmetic, from headers and config alone.

Arithmetic is counted in floating point operations, a multiplication and an addition being two. Of experts only those
count that a token goes to. Attention to n tokens takes 4 n times the width of the queries for every token; in a prompt
of n tokens it is to (n + 1) / 2 of them on average.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.tensors import FLOATS, Tensor
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_count
from shortcut.family.anatomy import part_of, text_config
from shortcut.family.halves import Hollowing, can_be_hollow, hollowing_of
from shortcut.records.actions import GONE, Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan

CONTEXT = 1024  # tokens of a prompt, and in front of a new token
CACHED = 2  # bytes of a number in the cache: half precision, as models are served
_EXPERT = re.compile(r"experts?\.")


@dataclass(frozen=True)
class Saving:
    """What goes by an action on one block: parameters, bytes of cache per token, and operations per token.

    prefill: of a prompt of `CONTEXT` tokens; decode: of a new token behind as many. None where it cannot be told.
    """

    action: Action
    parameters: int
    cache: int | None
    prefill: int | None
    decode: int | None


def savings(checkpoint: Checkpoint, number: int) -> tuple[Saving, ...]:
    """What each action on a block saves; halves are there for architectures that can lose them."""
    hollowing = hollowing_of(checkpoint.config) if can_be_hollow(checkpoint.config) else None
    actions: tuple[Action, ...] = ("drop", "attention-only", "mlp-only", "last-token") if hollowing else ("drop",)
    return tuple(_saving(checkpoint, number, action, hollowing) for action in actions)


def _saving(checkpoint: Checkpoint, number: int, action: Action, hollowing: Hollowing | None) -> Saving:
    _, text = text_config(checkpoint.config)
    tensors = checkpoint.blocks[number]

    def goes(rest: str) -> bool:
        return hollowing is None or action == "drop" or hollowing.half_of(rest, part_of(rest)) in GONE[action]

    going = [(rest, tensor) for rest, tensor in tensors if goes(rest)]
    parameters, widths = sum(tensor.parameters for _, tensor in going), attention_widths(text)
    if widths is None or not all(tensor.dtype in FLOATS for _, tensor in tensors):
        return Saving(action, parameters, None, None, None)
    queries, keys = widths
    if action == "last-token":  # of all but the last token: all but keys and values, and queries made with them
        whole = _saving(checkpoint, number, "drop", hollowing).prefill or 0
        asks = not any("q_proj" in rest.split(".") for rest, _ in tensors)
        stays = 2 * (queries * asks + 2 * keys) * int(text.get("hidden_size") or text.get("n_embd") or 0)
        return Saving(action, 0, 0, round((whole - stays) * (1 - 1 / CONTEXT)), 0)
    linear = sum(_operations(rest, tensor, text) for rest, tensor in going)
    attends = "attention" in GONE[action] and any(part_of(rest) == "attention" for rest, _ in tensors)
    return Saving(
        action=action,
        parameters=parameters,
        cache=2 * keys * CACHED if attends else 0,
        prefill=linear + (2 * queries * (CONTEXT + 1) if attends else 0),
        decode=linear + (4 * queries * (CONTEXT + 1) if attends else 0),
    )


def cache_per_token(checkpoint: Checkpoint, plan: Plan) -> int | None:
    """Bytes of keys and values that a token leaves in the cache, of a base under a plan; None where nobody can tell."""
    sizes = [
        savings(checkpoint, number)[0].cache
        for number, action in enumerate(plan.actions)
        if action != "drop" and ("attention" not in GONE[action] or plan.format == "zeroed")
    ]
    return None if None in sizes else sum(size or 0 for size in sizes)


@dataclass(frozen=True)
class Prefill:
    """Floating point operations of the blocks for a prompt with images, as a model is and with blocks frozen.

    Every token counts as attending to all: as ShortV counts, and attention without a causal kernel. blocks: the frozen
    ones; text, visual: tokens of the prompt.
    """

    blocks: tuple[int, ...]
    text: int
    visual: int
    dense: int
    frozen: int

    def __str__(self) -> str:
        tokens = f"{self.text} tokens of text and {self.visual} of images"
        change = f"{format_count(self.dense)} -> {format_count(self.frozen)} FLOPs, {self.frozen / self.dense:.1%}"
        head = f"with images frozen in {len(self.blocks)} blocks ({format_blocks(self.blocks)})"
        return f"{head}, a prompt of {tokens} takes {change}: at best {self.dense / self.frozen:.2f} times as fast"


def prefill(text: Mapping[str, Any], frozen: Iterable[int], text_tokens: int, visual_tokens: int) -> Prefill:
    """What freezing saves, from the config of a text decoder alone, with three matrices in every MLP.

    Raises ShortcutError where the config does not say how wide its parts are.
    """
    widths = attention_widths(text)
    depth: Any = text.get("num_hidden_layers")
    hidden: Any = text.get("hidden_size")
    inner: Any = text.get("intermediate_size")
    if widths is None or not all(isinstance(number, int) for number in (hidden, inner, depth)):
        raise ShortcutError("the config does not say how wide attention and MLP are: cannot tell what freezing saves")
    queries, keys = widths
    stored = 2 * 2 * hidden * keys  # per token, for its key and value
    tokens = text_tokens + visual_tokens

    def block(active: int) -> int:
        experts = text.get("num_experts_per_tok") or 1
        rest = 2 * 2 * hidden * queries + 2 * 3 * hidden * (text.get("moe_intermediate_size") or inner) * experts
        return tokens * stored + active * (rest + 4 * queries * tokens)

    blocks = tuple(sorted(set(frozen)))
    dense, less = depth * block(tokens), len(blocks) * (block(tokens) - block(text_tokens))
    return Prefill(blocks, text_tokens, visual_tokens, dense, dense - less)


def attention_widths(text: Mapping[str, Any]) -> tuple[int, int] | None:
    """How wide all queries of a token are together, and all keys; None where a config does not say."""
    if "kv_lora_rank" in text or "layers_block_type" in text:  # latent attention and hybrids have other caches
        return None
    heads = text.get("num_attention_heads", text.get("n_head", text.get("num_heads")))
    hidden = text.get("hidden_size", text.get("n_embd"))
    if not isinstance(heads, int) or not isinstance(hidden, int) or not heads:
        return None
    width = text.get("head_dim") or hidden // heads
    key_heads = text.get("num_key_value_heads") or heads
    return (heads * width, key_heads * width) if isinstance(width, int) and isinstance(key_heads, int) else None


def _operations(rest: str, tensor: Tensor, text: Mapping[str, Any]) -> int:
    """Of one token with one weight; vectors are not counted."""
    if len(tensor.shape) < 2:
        return 0
    experts = text.get("num_local_experts") or text.get("num_experts") or text.get("n_routed_experts") or 1
    chosen = text.get("num_experts_per_tok") or text.get("moe_topk") or experts
    routed = bool(_EXPERT.search(rest)) and "shared" not in rest
    return round(2 * math.prod(tensor.shape) * (chosen / experts if routed else 1))
