"""The other objective of folding: the angle between the streams, whatever their lengths (ReplaceMe, arXiv:2505.02819).

A pre-norm model reads directions, and the few tokens whose states are a hundred times as long as the others, which
decide least squares almost alone, weigh no more than any other here. There is no closed form, but nearly: least squares
of directions, solved again and again, goes downhill and has settled after a few times.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from shortcut.common.processes import add_up

STEPS = 20  # at most
SETTLED = 1e-3  # part of the loss: a step that gains less is the last


class Rows(NamedTuple):
    """Of real tokens: what a projection adds to the stream, and the states of shortened model and base; float64."""

    added: Tensor
    short: Tensor
    base: Tensor


def turn(rows: Rows, change: Tensor, ridge: float, *, steps: int = STEPS, settled: float = SETTLED) -> Tensor:
    """Go from one change D towards that which minimises mean(1 - cos(x + M D, y)) + ridge ‖D‖² / 2, always downhill.

    The unit of the ridge is the mean square of what M adds, as a part of ‖y‖: it means what it means in least squares.
    Of several processes each has rows of its own. Returns (width, width), float64.
    """
    shares = rows.added / _lengths(rows.base)
    gram, count = add_up(shares.T @ shares), add_up(torch.tensor(float(len(shares)), dtype=change.dtype)).item()
    price = float(ridge * gram.diagonal().mean() / count)
    curved = torch.linalg.cholesky(gram / count + price * torch.eye(len(gram)).to(gram))
    length, (loss, slope) = 1.0, evaluate(rows, change, price)
    for _ in range(steps):
        there = change - length * torch.cholesky_solve(slope, curved)
        found, turned = evaluate(rows, there, price)
        if not found < loss:
            length /= 2
            continue
        gained = loss - found
        change, loss, slope = there, found, turned
        if gained < settled * loss:
            break
    return change


def evaluate(rows: Rows, change: Tensor, price: float) -> tuple[float, Tensor]:
    """The loss of a change, and its gradient: M' G + price D, with rows (cos z/‖z‖ - y/‖y‖) / ‖z‖ of G, z = x + M D."""
    sums = rows.short + rows.added @ change
    length = _lengths(sums)
    sums, base = sums / length, rows.base / _lengths(rows.base)
    cosines = (sums * base).sum(-1, keepdim=True)
    slope = add_up(rows.added.T @ ((cosines * sums - base) / length))
    total, count = add_up(torch.stack([(1 - cosines).sum().cpu(), torch.tensor(float(len(base))).double()])).tolist()
    return total / count + 0.5 * price * change.square().sum().item(), slope / count + price * change


def _lengths(states: Tensor) -> Tensor:
    return states.norm(dim=-1, keepdim=True).clamp_min(1e-12)
