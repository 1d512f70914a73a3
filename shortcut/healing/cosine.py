"""The other objective of folding: the angle between the streams, whatever their lengths (ReplaceMe, arXiv:2505.02819).

A pre-norm model reads directions, and the few tokens whose states are a hundred times as long as the others, which
decide least squares almost alone, weigh no more than any other here. There is no closed form, but nearly: least squares
of directions, solved again and again, goes downhill and has settled after a few times.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shortcut.healing.streams import Streams

STEPS = 20  # at most
SETTLED = 1e-3  # part of the loss: a step that gains less is the last


def turn(
    fitting: Sequence[Streams], change: Tensor, ridge: float, *, steps: int = STEPS, settled: float = SETTLED
) -> Tensor:
    """Go from one change D towards that which minimises mean(1 - cos(x + M D, y)) + ridge ‖D‖² / 2, always downhill.

    The unit of the ridge is the mean square of what M adds, as a part of ‖y‖: it means what it means in least squares.
    Returns (width, width), float64.
    """
    gram = sum(_gram(streams) for streams in fitting) / sum(int(streams.batch.mask.sum()) for streams in fitting)
    price = ridge * gram.diagonal().mean()
    curved = torch.linalg.cholesky(gram + price * torch.eye(len(gram)).to(gram))
    length, (loss, slope) = 1.0, evaluate(fitting, change, price)
    for _ in range(steps):
        there = change - length * torch.cholesky_solve(slope, curved)
        found, turned = evaluate(fitting, there, price)
        if not found < loss:
            length /= 2
            continue
        gained = loss - found
        change, loss, slope = there, found, turned
        if gained < settled * loss:
            break
    return change


def evaluate(fitting: Sequence[Streams], change: Tensor, price: Any) -> tuple[float, Tensor]:
    """The loss of a change, and its gradient: M' G + price D, with rows (cos z/‖z‖ - y/‖y‖) / ‖z‖ of G, z = x + M D."""
    total, count = 0.0, 0
    slope = torch.zeros_like(change)
    for streams in fitting:
        added, short, base = _rows(streams)
        sums = short + added @ change
        length = sums.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        sums, base = sums / length, base / base.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        cosines = (sums * base).sum(-1, keepdim=True)
        slope += added.T @ ((cosines * sums - base) / length)
        total, count = total + (1 - cosines).sum().item(), count + len(base)
    return total / count + 0.5 * float(price * change.square().sum()), slope / count + price * change


def _gram(streams: Streams) -> Any:
    added, _, base = _rows(streams)
    added = added / base.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return added.T @ added


def _rows(streams: Streams) -> list[Tensor]:
    """Of the real tokens: what the projection adds, and the states of shortened model and base; float64."""
    assert streams.added is not None
    return [each[streams.batch.mask].double() for each in (streams.added, streams.short, streams.base)]
