"""python -m tests.editions: notes the modeling files that shortcut writes now in shortcut/data/editions.json.

Run it before a changed file is shipped: with a higher EDITION, unless the one before it was never shipped.
"""

import json
from pathlib import Path

import shortcut
from shortcut.family.halves import Modeling, decilm, read_hollowings
from shortcut.modeling.editions import EDITION, hash_of

EDITIONS = Path(shortcut.__file__).parent / "data" / "editions.json"


def modeling_files() -> list[Modeling]:
    """All files that this version of shortcut writes."""
    rows = read_hollowings().values()
    return [decilm(), *(row.modeling for row in rows), *(row.freezing for row in rows if row.freezes)]


def main() -> None:
    known = json.loads(EDITIONS.read_text(encoding="utf-8")) if EDITIONS.exists() else {}
    now = {hash_of(modeling.code) for modeling in modeling_files()}
    known[str(EDITION)] = sorted(now | set(known.get(str(EDITION), ())))
    EDITIONS.write_text(json.dumps(known, indent=0) + "\n", encoding="utf-8")
    print(f"{len(now)} files of edition {EDITION}, {sum(map(len, known.values()))} of all editions")


if __name__ == "__main__":
    main()
