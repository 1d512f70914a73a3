"""python -m tests.bench.table RESULTS.jsonl: what `tests.bench.quality` found, as tables for the README.

In brackets the part of the gap between base and cut that was closed, in log perplexity.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

HEAD = ("", "a novel", "other text", "PIQA", "cloze", "seconds", "parameters")


def cells(row: dict[str, Any], base: dict[str, Any], cut: dict[str, Any]) -> list[str]:
    """One row."""
    prices = []
    for name in ("prose", "text"):
        gap = math.log(cut[name] / base[name])
        closed = "" if row in (base, cut) else f" ({math.log(cut[name] / row[name]) / gap:.0%})"
        prices.append(f"{row[name]:.2f}{closed}")
    seconds = f"{row['seconds']:.0f}"
    extra = f" + {row['extra'] / 1e6:.2f}" if row["extra"] else ""
    parameters = f"{(row['parameters'] - row['extra']) / 1e6:.1f}{extra} M"
    return [row["row"], *prices, f"{row['questions']:.1f}", f"{row['cloze']:.1f}", seconds, parameters]


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    for model in dict.fromkeys(row["model"] for row in rows):
        base = next(row for row in rows if row["model"] == model and row["row"] == "base")
        for share in sorted({row["share"] for row in rows if row["model"] == model} - {0.0}):
            found = [row for row in rows if row["model"] == model and row["share"] == share]
            cut = next(row for row in found if row["row"] == "cut")
            less = 1 - cut["parameters"] / base["parameters"]
            print(f"\n{model} without {cut['dropped']}: {less:.1%} of the parameters\n")
            lines = [list(HEAD), ["---"] * len(HEAD), *(cells(row, base, cut) for row in (base, *found))]
            print("\n".join(f"| {' | '.join(line)} |" for line in lines))
            others = [row for row in found if row["dropped"] != cut["dropped"]]
            print("".join(f"\n`{row['row']}`: without {row['dropped']}" for row in others))


if __name__ == "__main__":
    main()
