"""Pictures of scores: that there is one, that it shows what is dropped, and what is said where there is none."""

import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from shortcut.common.errors import ShortcutError
from shortcut.publish.plots import draw_scores, goes
from shortcut.records.actions import GONE
from shortcut.records.plan import Base
from shortcut.records.scores import Scores

BLOCKS = (0.9957, 0.1817, 0.0384, 0.0, 0.0502, 0.2628)
SPANS = tuple(tuple(0.05 * length + 0.01 * abs(first - 2) for first in range(7 - length)) for length in range(1, 7))


def make_scores(**metrics):
    calibration = {"data": "some/folder/text.txt", "samples": 4, "length": 64}
    return Scores(Base("org/a_$model$", None, 6), 600, (100,) * 6, metrics, calibration, {})


def draw(path, scores, dropped=(), action="drop"):
    """Draw and return the picture's bytes, width and height."""
    draw_scores(scores, path, [action if block in dropped else "keep" for block in range(6)])
    picture = path.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    return picture, *struct.unpack(">II", picture[16:24])


def test_the_picture_grows_with_the_metrics(tmp_path):
    _, width, height = draw(tmp_path / "a.png", make_scores(one=BLOCKS))
    assert 600 < width < 1200
    assert 300 < height < 800
    both = make_scores(one=BLOCKS, two=BLOCKS, three=(0.0,) * 6, angular=SPANS)
    _, wider, higher = draw(tmp_path / "b.PNG", both)
    assert wider == 2 * width
    assert higher > 2 * height


@pytest.mark.parametrize("metrics", [{"block-influence": BLOCKS}, {"angular": SPANS}], ids=["blocks", "spans"])
def test_dropped_blocks_are_seen(tmp_path, metrics):
    sets = [(), (3,), (3, 4), (2, 4, 5)]
    assert len({draw(tmp_path / "a.png", make_scores(**metrics), dropped)[0] for dropped in sets}) == len(sets)


def test_halves_have_panels_of_their_own(tmp_path):
    """Each of them marks the blocks that lose that half, and so does a dropped block."""
    halves = {"mlp-only": {"one": BLOCKS}, "attention-only": {"one": BLOCKS}}
    scores = replace(make_scores(), halves=halves)
    kinds = [draw(tmp_path / "a.png", scores, (2,), action)[0] for action in ("keep", "drop", "mlp-only")]
    assert len(set(kinds)) == 3


@pytest.mark.parametrize(("name", "reason"), [("a.svg", "has to be a .png file"), ("gone/a.png", "there is no folder")])
def test_a_place_that_cannot_be_drawn_to(tmp_path, name, reason):
    with pytest.raises(ShortcutError, match=reason):
        draw_scores(make_scores(one=BLOCKS), tmp_path / name)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ShortcutError, match=r'drawing needs matplotlib: pip install "shortcut\[plot\]"'):
        draw_scores(make_scores(one=BLOCKS), Path("a.png"))


def test_what_is_marked():
    """A panel marks blocks by what goes of them: halves go with whole blocks, images freeze alone."""
    marked = {(part, own) for part in GONE for own in GONE if goes(part, own)}
    assert {own for part, own in marked if part == "drop"} == {"drop"}
    assert {own for part, own in marked if part == "attention-only"} == {"drop", "attention-only"}
    assert {own for part, own in marked if part == "freeze-visual"} == {"freeze-visual"}
