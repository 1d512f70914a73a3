"""The metrics, each a pure function of the hidden states before and after a block or span, with its name and source.

Every function works token by token and knows nothing of padding: it is given real tokens only. Arithmetic is float32
whatever the model's type: in float16 squared norms overflow (token norms reach 100,000) and small angles are lost.
Higher is always more important.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shortcut.errors import ShortcutError


@dataclass(frozen=True)
class Metric:
    """A rule that says how much a block changes what passes through it.

    spans False: measure(before, after), both (tokens, width), gives (tokens,), and every block has one score.
    spans True: measure(cosines), of any shape, gives that shape, and every span of every length has a score.
    tokens: whether the mean runs over all tokens, or over the last one of every sequence.
    """

    name: str
    measure: Callable[..., Tensor]
    spans: bool
    tokens: Literal["all", "last"]
    formula: str
    source: str


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of the angle between vectors: (..., width) twice -> (...,), in [-1, 1].

    Two zero vectors count as the same direction (1), a zero vector against another as unrelated (0): never NaN.
    """
    norm = torch.linalg.vector_norm
    return _normalised(torch.linalg.vecdot(before, after), norm(before, dim=-1), norm(after, dim=-1))


def pairwise_cosines(states: Tensor) -> Tensor:
    """`cosine` between all pairs of points of a walk: (tokens, points, width) -> (tokens, points, points)."""
    products = states @ states.mT
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    return _normalised(products, norms[..., :, None], norms[..., None, :])


def _normalised(products: Tensor, norms: Tensor, other_norms: Tensor) -> Tensor:
    lengths = norms * other_norms
    undefined = ((norms == 0) & (other_norms == 0)).to(products)
    return torch.where(lengths > 0, products / lengths, undefined).clamp(-1, 1)


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine of the angle by which a block turns its input: from 0 (direction unchanged) to 2 (ShortGPT, eq. 1)."""
    return 1 - cosine(before, after)


def relative_magnitude(before: Tensor, after: Tensor) -> Tensor:
    """Length of what a block adds, relative to what leaves it: ‖after - before‖ / ‖after‖ (ShortGPT, section 4)."""
    added = torch.linalg.vector_norm(after - before, dim=-1)
    return added / torch.linalg.vector_norm(after, dim=-1).clamp_min(torch.finfo(added.dtype).tiny)


def l2(before: Tensor, after: Tensor) -> Tensor:
    """Length of what a block adds: ‖after - before‖ (ShortX)."""
    return torch.linalg.vector_norm(after - before, dim=-1)


def variance(before: Tensor, after: Tensor) -> Tensor:
    """By how much a block changes the variance over features: |Var(after) - Var(before)|, unbiased (ShortX)."""
    return (_variance(after) - _variance(before)).abs()


def _variance(states: Tensor) -> Tensor:
    """As `states.var(-1)`, by fused operations: thirty times faster on a CPU."""
    centred = states - states.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1).square() / (states.shape[-1] - 1)


def angular_distance(cosines: Tensor) -> Tensor:
    """Angle between before and after as a fraction of a half turn: arccos(cosine) / pi, from 0 to 1 (Deeper Layers)."""
    return torch.arccos(cosines.clamp(-1, 1)) / math.pi


_SHORTGPT, _DEEPER, _SHORTX = "arXiv:2403.03853", "arXiv:2403.17887", "github.com/icip-cas/ShortX"
METRICS = {
    metric.name: metric
    for metric in (
        Metric("block-influence", block_influence, False, "all", "1 - cos(x, y)", _SHORTGPT),
        Metric("relative-magnitude", relative_magnitude, False, "all", "‖y - x‖ / ‖y‖", _SHORTGPT),
        Metric("l2", l2, False, "all", "‖y - x‖", _SHORTX),
        Metric("variance", variance, False, "all", "|Var y - Var x|", _SHORTX),
        Metric("angular", angular_distance, True, "last", "arccos(cos(x, y)) / pi, last token", _DEEPER),
        Metric("angular-all", angular_distance, True, "all", "arccos(cos(x, y)) / pi, all tokens", _DEEPER),
    )
}


def pick_metrics(names: str) -> list[Metric]:
    """The metrics of a comma-separated list. Raises ShortcutError for an unknown name, saying which there are."""
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in METRICS]:
        raise ShortcutError(f"unknown metric {unknown[0]!r}: there are {', '.join(METRICS)}")
    return [METRICS[name] for name in dict.fromkeys(wanted)]
