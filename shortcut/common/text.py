"""How sizes, counts and tables are written, and how a size is read."""

import re
from collections.abc import Sequence

from shortcut.common.errors import ShortcutError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def format_size(size: float) -> str:
    """Bytes in decimal units, three digits: 269030016 -> "269 MB"."""
    for unit, factor in reversed(_UNITS.items()):
        if unit and size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 999.5 * factor else f"{size / factor:.0f} {unit}"
    return f"{size:.0f} B"


def parse_size(text: str) -> int:
    """Read "5GB", "500 MB" or plain bytes. Raises ShortcutError for anything else, and for zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text, re.IGNORECASE)
    unit = match[2].upper().rstrip("B") if match else ""
    size = float(match[1]) * _UNITS[f"{unit}B" if unit else ""] if match else 0.0
    if not 1 <= size < 1 << 63:
        raise ShortcutError(f"cannot read the size {text!r}: write it like 5GB or 500MB")
    return int(size)


def format_count(count: int) -> str:
    """A count in short: 134515008 -> "134.5M"."""
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= factor * 0.99995:
            return f"{count / factor:.4g}{unit}"
    return str(count)


def format_table(head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1) -> str:
    """Columns two spaces apart under a head; the first `left` of them flush left, the others flush right."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
