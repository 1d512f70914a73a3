"""python -m tests.sweep.table RESULTS.jsonl: put what a sweep found into the table that `shortcut families` prints."""

import json
import sys
from pathlib import Path
from typing import Any

import transformers

import shortcut

TASKS = {
    "causal": "text",
    "image-text": "image and text",
    "masked": "masked tokens",
    "sequence": "classes of texts",
    "tokens": "classes of tokens",
    "bare": "states",
    "seq2seq": "text to text",
    "seq2seq encoder": "text to text, encoder",
    "speech": "speech to text",
    "speech encoder": "speech to text, encoder",
    "ctc": "frames of speech",
    "sounds": "classes of sounds",
    "images": "classes of images",
    "image-text towers": "two towers, text",
    "image-text towers vision": "two towers, vision",
}
TABLE = Path(shortcut.__file__).parent / "data" / "families.json"


def row(record: dict[str, Any]) -> list[str]:
    """Family, task, result and reason. Sets of blocks that were refused beside exact ones make it exact in part."""
    sets = [outcome["result"] for outcome in record["by_set"].values()]
    result = {"skipped": "untried", "different": "differs", "error": "unclear"}.get(record["result"], record["result"])
    if result == "refused" and "exact" in sets:
        result = "in part"
    return [record["model_type"], TASKS[record["kind"]], result, "" if result == "exact" else record["why"][:160]]


def main() -> None:
    records = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    rows = sorted(map(row, records))
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    TABLE.write_text(f'{{"transformers": "{transformers.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
