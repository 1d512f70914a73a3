"""What the probe found, as a table: one row for each kind of checkpoint and its families, one column per release."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Cell = Literal["same", "refused", "unknown family", "WRONG", "OBSCURE"]
TOLERANCE = 1e-4  # of the largest logit
BAD = ("WRONG", "OBSCURE")
MARKED = re.compile(r"(<!-- matrix -->\n).*?(<!-- /matrix -->)", re.DOTALL)
CARRIED = ("modeling_hollow.py:", "modeling_shortv.py:", "modeling_decilm.py:")
WAYS_OUT = ("pip install -U transformers", "shortcut refresh")


@dataclass(frozen=True)
class Result:
    """What one release made of one checkpoint.

    code: whether it carries a modeling file. difference, cached, uncached: how far logits are off, in parts of the
    largest, and whether tokens with a cache and without are the noted ones; error, message, place: what was raised, and
    the file and line it comes from; log: what was written meanwhile.
    """

    kind: str
    family: str
    code: bool
    release: str
    difference: float | None = None
    cached: bool = False
    uncached: bool = False
    error: str = ""
    message: str = ""
    place: str = ""
    log: str = ""

    @property
    def cell(self) -> Cell:
        """What the table says of it."""
        if self.difference is not None:
            return "same" if self.difference <= TOLERANCE and self.cached and self.uncached else "WRONG"
        if not self.code and "does not recognize this architecture" in self.message:
            return "unknown family"
        clear = "\n" not in self.message and any(way in self.message for way in WAYS_OUT)
        return "refused" if clear and self.place.startswith(CARRIED) else "OBSCURE"

    def __str__(self) -> str:
        where = f"{self.release}: {self.kind}, {self.family}: {self.cell}"
        if self.difference is None:
            return f"{where}: {self.error} in {self.place}: {self.message}"
        return f"{where}: logits off by {self.difference:.1e}, tokens {self.cached} cached and {self.uncached} uncached"


def read_results(made: Sequence[dict[str, object]], release: str, printed: str, ending: str) -> list[Result]:
    """The results of one run of the probe. made: kind, family and code of its checkpoints, in their order."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('{"checkpoint": ')]
    wrong = [line["release"] for line in lines if line["release"] != release]
    if wrong:
        raise RuntimeError(f"transformers {wrong[0]} was loaded instead of {release}")
    told = [{key: line[key] for key in line.keys() - {"checkpoint", "release"}} for line in lines]
    told += [{"error": "no answer", "message": ending, "place": "the probe"}] * (len(made) - len(told))
    return [Result(release=release, **each, **line) for each, line in zip(made, told, strict=True)]


def table_of(results: Iterable[Result]) -> str:
    """Markdown; families of a kind whose cells are equal share a row."""
    cells: dict[str, dict[str, dict[str, Cell]]] = {}
    for result in results:
        cells.setdefault(result.kind, {}).setdefault(result.family, {})[result.release] = result.cell
    releases = list(dict.fromkeys(release for rows in cells.values() for row in rows.values() for release in row))
    lines = [["written by shortcut", *releases], ["---"] * (1 + len(releases))]
    for kind, rows in cells.items():
        merged: dict[tuple[str, ...], list[str]] = {}
        for family, row in rows.items():
            merged.setdefault(tuple(row.get(release, "") for release in releases), []).append(family)
        lines += [[f"{kind}: {', '.join(families)}", *map(_shown, row)] for row, families in merged.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _shown(cell: str) -> str:
    return f"**{cell}**" if cell in BAD else cell


def put_into(readme: Path, table: str) -> bool:
    """Put a table between the markers of a file; False where it has none."""
    text = readme.read_text(encoding="utf-8")
    changed, count = MARKED.subn(lambda found: f"{found[1]}{table}{found[2]}", text)
    if count:
        readme.write_text(changed, encoding="utf-8")
    return bool(count)


def format_lines(results: Iterable[Result]) -> str:
    """One line of JSON for every result."""
    return "".join(json.dumps({**asdict(result), "cell": result.cell}) + "\n" for result in results)
