"""Rank agreement of parts of the calibration set."""

from itertools import combinations
from pathlib import Path

import pytest

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.material.calibration import make_calibration
from shortcut.material.documents import Source
from shortcut.records.scores import read_scores
from shortcut.scoring.stability import rank_agreement, split_evenly
from tests.conftest import make_tokenizer
from tests.verbs.test_score import sequences_of


def spearman(one: list[float], other: list[float]) -> float:
    """1 - 6 Σd² / n(n² - 1), for rows without ties."""
    places = [[sorted(row).index(value) for value in row] for row in (one, other)]
    n = len(one)
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*places, strict=True)) / (n * (n * n - 1))


def test_agreement_is_the_mean_of_spearman() -> None:
    """As by the textbook's formula; equal rankings agree fully, opposite ones not at all."""
    rows = [[0.3, 0.1, 0.9, 0.5, 0.2], [0.2, 0.1, 0.5, 0.9, 0.3], [9.0, 8.0, 7.0, 1.0, 3.0]]
    expected = [spearman(one, other) for one, other in combinations(rows, 2)]
    assert rank_agreement(rows) == pytest.approx(sum(expected) / 3)
    assert rank_agreement([rows[0], [10 * value for value in rows[0]]]) == pytest.approx(1)
    assert rank_agreement([[1, 2, 3], [3, 2, 1]]) == pytest.approx(-1)


def test_parts_are_disjoint_and_all_there() -> None:
    """Every sequence is in exactly one part; too many parts, or one, cannot be compared."""
    calibration = sequences_of(5, 6, 7, 8, 9)
    parts = split_evenly(calibration, 2)
    assert sorted(row for part in parts for row in part.sequences) == sorted(calibration.sequences)
    for wrong in (1, 6):
        with pytest.raises(ShortcutError, match=f"cannot compare {wrong} parts of 5 sequences"):
            split_evenly(calibration, wrong)


def test_parts_are_of_all_domains_alike() -> None:
    """Every part has each domain's share of sequences, to one."""
    both = make_calibration(make_tokenizer(), Source("2*default,heldout"), samples=12, length=20)
    for parts in (2, 3, 4):
        for domain in (0, 1):
            counts = [part.domains.count(domain) for part in split_evenly(both, parts)]
            assert max(counts) - min(counts) <= 1


def test_score_says_how_far_parts_agree(llama: Path, tmp_path: Path) -> None:
    """score --stability K: an agreement per metric, printed and kept; the scores are those of all the text."""
    text = {"metric": "block-influence,angular", "samples": 6, "length": 24, "quiet": True}
    scores = shortcut.score(llama, stability=3, out=tmp_path / "s.json", **text)
    assert scores.metrics == shortcut.score(llama, **text).metrics
    stable = scores.settings["stability"]
    assert stable["parts"] == 3
    assert -1 <= stable["angular"] <= 1
    assert f"rank agreement of 3 parts of the text (1 is full): block-influence {stable['block-influence']:.2f}" in str(
        scores
    )
    assert read_scores(tmp_path / "s.json") == scores
