"""Moves made one by one: what scores lowest goes, what is left is scored again, and so on (SLEB, arXiv:2402.09025).

What is left may be scored with the stream as long as it was: in the place of every block that went there is a number,
by which the block made it longer (Prune&Comp, arXiv:2507.18212).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from shortcut.common.errors import ShortcutError
from shortcut.common.progress import track
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.records.actions import GONE, Action, Move
from shortcut.scoring.blocks import score_walked
from shortcut.scoring.metrics import Metric
from shortcut.scoring.partial_sums import Partials
from shortcut.scoring.walk import outcomes


def growth(before: Tensor, after: Tensor) -> Tensor:
    """How many times as long the stream is behind a block as in front of it: ‖after‖ / ‖before‖; 1 where it is 0."""
    lengths = vector_norm(before, dim=-1)
    return torch.where(lengths > 0, vector_norm(after, dim=-1) / lengths, 1.0)


GROWTH = Metric("stream growth", growth, "states", "all", "‖y‖ / ‖x‖", "arXiv:2507.18212")


@dataclass(frozen=True)
class Removal:
    """Moves that are made one by one. count: so many at most; candidates: the blocks that may lose something.

    enough: with so many parameters gone no further move is made. scaled: in the place of every dropped block there is
    its `GROWTH`.
    """

    count: int
    candidates: Sequence[int]
    enough: float = math.inf
    scaled: bool = False


def check_greedy(metric: Metric, count: int | None, candidates: int, depth: int, allow: Sequence[Action]) -> int:
    """How many moves can be made one by one at most: the count, where one is given.

    Raises ShortcutError where that is more than so many candidates allow, and for metrics that cannot be had again.
    """
    if metric.needs not in ("states", "logits"):
        raise ShortcutError(f"{metric.name} cannot be scored again as blocks go: use a metric of states or logits")
    most = min(candidates, depth - 1) if len(allow) == 1 else 2 * candidates - (candidates == depth)
    if count is not None and not 0 < count <= most:
        raise ShortcutError(f"cannot leave out {count} blocks one by one: 1 to {most} can go")
    return most if count is None else count


def remove_greedily(
    decoder: Decoder,
    batches: Sequence[Batch],
    metric: Metric,
    removal: Removal,
    *,
    allow: Sequence[Action] = ("drop",),
    weights: Callable[[int, Action], int] = lambda _, __: 1,
    partials: Partials | None = None,
    quiet: bool = True,
) -> Iterator[tuple[Move, float]]:
    """Make the move that scores lowest, score what remains, and so on (SLEB); yields each move and its score then.

    Of several actions, that move is made that adds least to the score per weight that goes. weights: how many go by
    an action on a block. Metrics of logits compare with the whole model all along. Ties go to the
    deeper block. Raises ShortcutError as `score_blocks` and `check_greedy` do.
    """
    left, depth, scaled = list(removal.candidates), len(decoder.blocks), removal.scaled
    done, scales = dict[int, Action](), dict[int, float]()
    metrics = [metric, GROWTH] if scaled else [metric]
    check_greedy(metric, removal.count, len(left), depth, allow)
    for _ in track(range(removal.count), "removing", quiet=quiet):
        if sum(weights(*move) for move in done.items()) >= removal.enough:
            return
        found: Any = score_walked(decoder, batches, metrics, allow, done, scales, partials=partials, quiet=True)
        scores: dict[Move, float] = {
            Move(block, action): found[action][metric.name][block]
            for block in left
            for action in outcomes(done.get(block, "keep"), allow)
            if sum("attention" in GONE[own] for own in {**done, block: action}.values()) < depth
        }
        if not scores:
            return
        now = found["keep"][metric.name][0] if metric.needs == "logits" else 0.0

        def price(move: Move, scores: dict[Move, float] = scores, now: Any = now) -> tuple[float, int]:
            going = weights(*move) - weights(move.block, done.get(move.block, "keep"))
            return (scores[move] - now) / going if len(allow) > 1 else scores[move], -move.block

        lowest = min(scores, key=price)
        yield lowest, scores[lowest]
        done[lowest.block] = lowest.action
        if scaled and lowest.action == "drop":
            scales[lowest.block] = found["drop"][GROWTH.name][lowest.block]


def plan_removal(
    metric: Metric, count: int | None, may_go: Sequence[int], depth: int, allow: Sequence[Action], *, scaled: bool
) -> Removal:
    """The moves that can be made one by one: so many, where a count is given. Raises as `check_greedy` does."""
    return Removal(check_greedy(metric, count, len(may_go), depth, allow), may_go, scaled=scaled)


def check_scaled(scaled: bool, greedy: int) -> None:
    """Raise ShortcutError where there is no second scoring to scale anything for."""
    if scaled and not greedy:
        raise ShortcutError("--scaled is for blocks that go one by one: score --greedy N, or --select greedy")
