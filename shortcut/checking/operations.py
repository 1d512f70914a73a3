"""How much arithmetic a model really does: matrix products, experts and attention, counted while it runs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from shortcut.checking.speed import Work, run_once
from shortcut.live.load import Model

Shape = Sequence[int]


@torch.inference_mode()
def count_operations(model: Model, work: Work) -> tuple[int, int] | None:
    """Floating point operations of a run: for the prompts, and for all new tokens behind the first.

    A multiplication and an addition are two; attention counts as if every token of a prompt saw all others. None for
    quantised models, whose products are not all seen.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    with FlopCounterMode(display=False, custom_mapping=_counted()) as counter:
        (start, read, first, end), _ = run_once(
            model, work.ids([model]).to(model.device), work.new_tokens, counter.get_total_flops
        )
    return read - start, end - first


def _attention(queries: Shape, keys: Shape, values: Shape, *_: Any, **__: Any) -> int:
    """queries, keys, values: (batch, heads, tokens, width); there may be fewer heads of keys than of queries."""
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _experts(tokens: Shape, weights: Shape, *_: Any, **__: Any) -> int:
    """tokens: (rows, width), sorted by expert; weights: (experts, width, width of the result)."""
    return 2 * math.prod(tokens) * weights[-1]


def _counted() -> dict[Any, Any]:
    """What torch's counter leaves out, or refuses where heads share keys, as far as this torch has it."""
    attention = [f"_scaled_dot_product_{kernel}_attention" for kernel in ("flash", "efficient", "cudnn")]
    formulas = dict.fromkeys([*attention, f"{attention[0]}_for_cpu"], _attention) | {"_grouped_mm": _experts}
    aten = torch.ops.aten
    return {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}
