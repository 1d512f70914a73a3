"""Is the calibration set large enough? Parts of it, scored alone, should rank the blocks alike."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from shortcut.common.errors import ShortcutError
from shortcut.material.examples import Material
from shortcut.records.scores import Scores


def split_evenly(calibration: Material, parts: int) -> list[Material]:
    """Disjoint parts of a calibration set, every one of each n-th sequence, and so of all domains alike.

    Raises ShortcutError for fewer than two, or more than there are sequences.
    """
    if not 2 <= parts <= len(calibration.sequences):
        raise ShortcutError(f"cannot compare {parts} parts of {len(calibration.sequences)} sequences")
    return [calibration.take(range(part, len(calibration.sequences), parts)) for part in range(parts)]


def rank_agreement(rows: Sequence[Sequence[float]]) -> float:
    """Mean of Spearman's rank correlation over all pairs of rows: 1 where all rank alike, about 0 by chance."""
    ranks = [np.argsort(np.argsort(row, kind="stable"), kind="stable") for row in rows]
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in combinations(ranks, 2)]))


def agreements(parts: Sequence[Scores]) -> dict[str, float]:
    """`rank_agreement` of the blocks by every metric, given the scores of every part."""
    return {name: rank_agreement([part.columns[name] for part in parts]) for name in parts[0].columns}
