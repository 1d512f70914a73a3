"""The matrix of releases: the table made from results, and the probe in an interpreter of its own."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file, save_file

from shortcut.modeling.editions import NEWEST
from tests.matrix.releases import RELEASES, run_probe
from tests.matrix.table import BAD, Result, format_lines, put_into, read_results, table_of
from tests.matrix.write import KINDS, write_all

OLD, NEW = "5.0.0", "5.24.0"
NEEDED = (
    "this checkpoint needs transformers 5.14 or newer, and transformers 5.0.0 is installed: pip install -U transformers"
)
UNKNOWN = "Transformers does not recognize this architecture"
SAME = {"difference": 1e-6, "cached": True, "uncached": True}
RESULTS = [
    Result("drop", "llama", False, OLD, **SAME),
    Result("drop", "gpt2", False, OLD, **SAME),
    Result("drop", "qwen9", False, OLD, error="ValueError", message=UNKNOWN),
    Result("halves", "llama", True, OLD, error="ImportError", message=NEEDED, place="modeling_hollow.py:13"),
    Result("halves", "gpt2", True, OLD, error="TypeError", message="no such\nthing", place="modeling_hollow.py:99"),
    Result("drop", "llama", False, NEW, **SAME),
    Result("drop", "gpt2", False, NEW, **SAME),
    Result("drop", "qwen9", False, NEW, **SAME),
    Result("halves", "llama", True, NEW, **{**SAME, "difference": 2e-4}),
    Result("halves", "gpt2", True, NEW, **{**SAME, "uncached": False}),
]
TABLE = """\
| written by shortcut | 5.0.0 | 5.24.0 |
| --- | --- | --- |
| drop: llama, gpt2 | same | same |
| drop: qwen9 | unknown family | same |
| halves: llama | refused | **WRONG** |
| halves: gpt2 | **OBSCURE** | **WRONG** |
"""


def test_the_table_of_the_readme() -> None:
    """It has a column for every release, up to the one that modeling files say they are proven with; nothing is bad."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- matrix -->")[2].partition("<!-- /matrix -->")[0]
    releases = [cell.strip() for cell in table.strip().splitlines()[0].split("|")[2:-1]]
    assert set(RELEASES) <= set(releases)
    assert releases[-1] == NEWEST
    assert not any(bad in table for bad in BAD)
    assert all(f"{kind.name}: " in table for kind in KINDS)


def test_families_with_equal_cells_share_a_row() -> None:
    """Rows and columns keep the order of the results."""
    assert table_of(RESULTS) == TABLE
    assert [json.loads(line)["cell"] for line in format_lines(RESULTS).splitlines()] == [one.cell for one in RESULTS]


@pytest.mark.parametrize(
    ("message", "place", "cell"),
    [
        (NEEDED, "modeling_hollow.py:13", "refused"),
        (NEEDED, "modeling_llama.py:400", "OBSCURE"),  # it is not the modeling file that says so
        ("zip() argument 2 is shorter than argument 1", "modeling_hollow.py:354", "OBSCURE"),
        (UNKNOWN, "configuration_auto.py:1", "OBSCURE"),  # it carries code: it has to
    ],
)
def test_what_counts_as_refused(message: str, place: str, cell: str) -> None:
    """One line that says what to do, from the file that the checkpoint carries."""
    assert Result("halves", "llama", True, OLD, error="E", message=message, place=place).cell == cell


def test_no_number_is_not_the_same() -> None:
    """Logits that are not numbers are wrong."""
    assert Result("drop", "llama", False, OLD, **{**SAME, "difference": float("nan")}).cell == "WRONG"


def test_the_table_in_the_readme(tmp_path: Path) -> None:
    """It goes between the markers, and nowhere else."""
    readme = tmp_path / "README.md"
    readme.write_text("# A\n\n<!-- matrix -->\nold\n<!-- /matrix -->\n\nB\n")
    assert put_into(readme, TABLE)
    assert put_into(readme, TABLE)
    assert readme.read_text() == f"# A\n\n<!-- matrix -->\n{TABLE}<!-- /matrix -->\n\nB\n"
    readme.write_text("# A\n")
    assert not put_into(readme, TABLE)
    assert readme.read_text() == "# A\n"


def test_a_probe_that_breaks_off() -> None:
    """What it did not get to is obscure; another release than the one wanted is an error."""
    made = [{"kind": "drop", "family": family, "code": False} for family in ("llama", "gpt2")]
    line = json.dumps({"checkpoint": "drop-llama", "release": OLD, **SAME, "log": ""})
    cells = [one.cell for one in read_results(made, OLD, f"a word\n{line}\n", "exit code -11: no word")]
    assert cells == ["same", "OBSCURE"]
    with pytest.raises(RuntimeError, match=r"transformers 5\.0\.0 was loaded instead of 5\.24\.0"):
        read_results(made, NEW, line, "")


@pytest.mark.thorough
def test_the_probe_on_the_installed_release(tmp_path: Path) -> None:
    """Loaded without shortcut, the answers are the noted ones; with a changed weight they are not."""
    made = [*write_all(tmp_path, "drop-llama"), *write_all(tmp_path, "last-token-llama")]
    (drop, plain), (last, custom) = made
    made += [(copied(drop, "spoiled"), plain), (copied(last, "raising"), custom)]
    weights = load_file(tmp_path / "checkpoints" / "spoiled" / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3] *= 1.5
    save_file(weights, tmp_path / "checkpoints" / "spoiled" / "model.safetensors", {"format": "pt"})
    code = tmp_path / "checkpoints" / "raising" / "modeling_hollow.py"
    code.write_text(f"import shortcut\n\n{code.read_text()}")
    told = [{key: how[key] for key in ("kind", "family", "code")} for _, how in made]
    printed, ending = run_probe([folder for folder, _ in made], None, tmp_path / "home")
    results = read_results(told, transformers.__version__, printed, ending)
    assert [result.cell for result in results] == ["same", "same", "WRONG", "OBSCURE"]
    assert results[0].difference == 0
    assert "use_cache=False is not followed" in results[1].log
    assert "shortcut" in results[3].message


def copied(folder: Path, name: str) -> Path:
    """A checkpoint under another name, with what stands beside it."""
    other = folder.with_name(name)
    shutil.copytree(folder, other)
    for ending in (".json", ".safetensors"):
        shutil.copyfile(folder.with_suffix(ending), other.with_suffix(ending))
    return other
