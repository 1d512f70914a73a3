"""Families whose configs speak of single blocks: cut exactly, or refused with the reason. All of them: make sweep."""

import json
from pathlib import Path

import pytest

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.family.fields import PLAIN
from shortcut.family.known import RESULTS, is_proven, read_families
from tests.sweep.__main__ import run_pair

# What the three sets of blocks (1 and 3; 0 and 4; 5, of 6) come to.
EXACT = ["exact"] * 3
SAMPLE = {
    "deepseek_v3": EXACT,  # dense blocks first, extra heads behind
    "gemma4_text": EXACT,  # a part for every block outside the blocks, fields by block number
    "llama4_text": EXACT,  # experts and positions by lists
    "minicpm3": EXACT,  # residuals scaled by depth
    "nemotron_h": EXACT,  # one mixer per block, depth is the length of a list
    "qwen2_moe": EXACT,  # a period of sparse blocks
    "qwen3_next": EXACT,  # linear and full attention
    "recurrent_gemma": EXACT,  # a pattern that repeats
    "gemma3n_text": ["refused", "refused", "exact"],  # keys and values shared between blocks
    "glm_moe_dsa": ["refused", "exact", "exact"],  # a choice of tokens shared between blocks
    "jamba": ["exact", "refused", "exact"],  # periods with offsets
    "zamba": ["refused", "exact", "exact"],  # weights shared between blocks, stored under one
    "diffllama": ["refused"] * 3,  # scales by block number
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLE)
def test_exact_or_refused(family: str) -> None:
    """Logits and generation equal the bypassed base where a cut is made; where it is not, the reason is said."""
    record = run_pair(family, "causal", 240)
    assert [outcome["result"] for outcome in record["by_set"].values()] == SAMPLE[family], record
    assert all(outcome.get("why") for outcome in record["by_set"].values() if outcome["result"] == "refused")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "expected"), [("llava", EXACT), ("qwen3_vl", ["refused", "refused", "exact"])])
def test_the_text_decoder_of_a_vision_model_is_cut(family: str, expected: list[str]) -> None:
    """The blocks of the text decoder go and the vision tower stays; blocks where image features enter do not go."""
    record = run_pair(family, "image-text", 240)
    assert [outcome["result"] for outcome in record["by_set"].values()] == expected, record


def test_the_table_holds_no_silent_difference() -> None:
    """No family of the table is cut to something else without a word, and the plain ones are all exact."""
    rows = read_families().rows
    assert len(rows) > 800
    assert {row.result for row in rows} <= set(RESULTS)
    assert all(is_proven(family) for family in PLAIN)
    assert all(row.why for row in rows if row.result != "exact")


def test_the_guard_can_be_left_out_for_proven_families_only(llama: Path, tmp_path: Path) -> None:
    """--no-guard is refused for a family that the sweep did not prove."""
    config = json.loads((llama / "config.json").read_text()) | {"model_type": "own"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "model.safetensors").symlink_to(llama / "model.safetensors")
    with pytest.raises(ShortcutError, match="--no-guard is for families that were proven exact, and own is not one"):
        shortcut.cut(tmp_path / "own", tmp_path / "short", drop="1", no_guard=True, quiet=True)
    assert shortcut.cut(llama, tmp_path / "short", drop="1", no_guard=True, quiet=True).written
