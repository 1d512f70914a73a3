"""Blocks that go one by one, each as it will be once healed: against least squares and perplexities elsewhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import shortcut
from shortcut.checking.perplexity import perplexity
from shortcut.choose.healed import RIDGE, Search
from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.load import load_model
from shortcut.material.calibration import Calibration
from shortcut.material.documents import Source
from shortcut.options.groups import Running
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, VOCABULARY
from tests.healing.test_refit import blocks_of, least_squares, look, put
from tests.scoring.test_halves import carried_out
from tests.verbs.test_heal import base as base

pytestmark = pytest.mark.thorough

BASE = Base("", None, DEPTH)


def text_of(seed: int, count: int = 8) -> Calibration:
    """Random tokens."""
    ids = torch.randint(4, VOCABULARY - 3, (count, 24), generator=torch.Generator().manual_seed(seed))
    rows = tuple(tuple(row) for row in ids.tolist())
    return Calibration(Source("default"), 24, seed, False, False, rows, (0,) * count)


def batches_of(text: Calibration) -> list[Batch]:
    return text.batches(4)


def priced(
    folder: Path, dropped: list[int], fitting: Calibration, deciding: Calibration, newest: int | None = None
) -> float:
    """The perplexity without these blocks, the MLP in front of every gap solved anew, one gap after the other.

    newest: the block that goes last, when what stands for the other gaps is known already.
    """
    model, short = load_model(folder), load_model(folder)
    starts = [block for block in dropped if block - 1 not in dropped]
    gaps = [list(range(first, next(b for b in range(first, DEPTH) if b + 1 not in dropped) + 1)) for first in starts]
    for gap in sorted(gaps, key=lambda gap: newest in gap):
        gone = {b: "drop" for b in dropped if b <= gap[-1] and (newest in gap or b != newest)}
        seen = look(model, short, "llama", gone, batches_of(fitting), ["mlp.down_proj"], gap[0] - 1)
        change = least_squares(seen.inputs["mlp.down_proj"], seen.base - seen.short, seen.base, RIDGE)
        weight = blocks_of(short)[gap[0] - 1].mlp.down_proj.weight.detach()
        put(short, {gap[0] - 1: {"mlp.down_proj.weight": weight + torch.tensor(change.T).float()}})
    with carried_out(short, "llama", dict.fromkeys(dropped, "drop")):
        return perplexity(short, batches_of(deciding))


def test_blocks_go_by_what_they_cost_refitted(llama: Path, tmp_path: Path) -> None:
    """In every round the block whose gap costs least, and its price; the first block of the model stays."""
    fitting, deciding = text_of(1), text_of(2, 4)
    search = Search.of(load_model(llama), BASE, fitting, deciding, Running(batch_size=4), tmp_path)
    with torch.inference_mode():
        search._walk(0)
        prices = {block: search._try(block)[0] for block in range(1, DEPTH - 1)}
    expected = {block: priced(llama, [block], fitting, deciding) for block in prices}
    assert prices == pytest.approx(expected, rel=1e-3)
    plan = Plan.dropping(BASE, [1, 2, 4])
    assert search.price(plan) == pytest.approx(priced(llama, [1, 2, 4], fitting, deciding), rel=1e-3)
    order = [move.block for move in search.remove(range(DEPTH - 1), 3, lambda _: False, quiet=True)]
    first = min(expected, key=lambda block: (expected[block], -block))
    whole = perplexity(load_model(llama), batches_of(deciding))
    added = {block: expected[block] / whole for block in expected if block != first}
    tried = dict[int, float]()
    for block in sorted(added, key=lambda block: (added[block], -block)):
        if added[block] < min(tried.values(), default=math.inf):
            tried[block] = priced(llama, sorted([first, block]), fitting, deciding, block) / expected[first]
    assert 0 < len(tried) < len(added)  # else the lazy rule is not seen
    assert order[:2] == [first, min(tried, key=lambda block: tried[block])]
    assert len(search.remove(range(DEPTH), 5, lambda gone: len(gone) == 2, quiet=True)) == 2


def test_prune_chooses_with_healing_in_mind(base: Path, tmp_path: Path) -> None:
    """Healed as a rule, alone or among others; what was chosen stands in the record, and goes on into healing."""
    how: dict[str, Any] = {"samples": 20, "length": 24, "quiet": True, "own": 8}
    report = shortcut.prune(base, tmp_path / "out", count=2, select="healed", **how)
    assert report.scores is not None
    order = [move.block for move in report.scores.orders["healed"]]
    assert sorted(order) == list(report.cut.plan.dropped)
    assert report.scores.settings["own"] == 8
    assert report.trials is None
    again = shortcut.plan(tmp_path / "out" / "scores.json", count=1, select="healed")
    assert again.dropped == (order[0],)
    both = shortcut.prune(base, tmp_path / "both", count=2, select="lowest,healed", heal="refit", **how)
    assert both.trials is not None
    assert both.trials.text.endswith("every plan as it is once refitted")
    assert [trial.select for trial in both.trials.trials] == ["lowest", "healed"]
    chosen = json.loads((tmp_path / "both" / "shortcut.json").read_text())
    assert [step["method"] for step in chosen["healed"]["steps"]] == ["refit"]
    ratio = shortcut.prune(base, tmp_path / "ratio", ratio="20%", select="healed", **how)
    assert len(ratio.cut.plan.dropped) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "healed", "allow": "drop,mlp-only", "count": 1}, "--select healed takes one action"),
        ({"select": "healed", "candidates": "0-2", "count": 3}, "cannot drop 3 of 7 blocks: 1 to 2 can go"),
        ({"select": "lowest", "own": 3, "count": 1}, "--own say how to heal: name a way with --heal"),
    ],
)
def test_what_cannot_be_meant(options: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    """One line, and nothing is written."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.prune(llama, tmp_path / "out", quiet=True, **options)
    with pytest.raises(ShortcutError, match="no order by 'healed' in these scores .*: prune with --select healed"):
        shortcut.plan(shortcut.score(llama, samples=4, length=24, quiet=True), count=1, select="healed")
    assert not (tmp_path / "out").exists()
