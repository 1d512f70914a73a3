"""Block lists: the small language "3,5,21-28" that every option and every file uses.

Blocks are numbered from 0 in the base model; `21-28` includes both ends.
"""

import re
from collections import Counter
from collections.abc import Iterable

from shortcut.common.errors import ShortcutError


def parse_blocks(text: str, depth: int | None = None) -> tuple[int, ...]:
    """Read "3,5,21-28" into ascending block numbers.

    depth: number of blocks of the model, where it is known. Raises ShortcutError for text that is not a block list, a
    block named twice, a span that runs backwards, and a block the model does not have.
    """
    blocks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise ShortcutError(f'cannot read {part.strip()!r} in the block list {text!r}: write it like "3,5,21-28"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ShortcutError(f"the span {part.strip()} in {text!r} runs backwards: write {last}-{first}")
        blocks.extend(range(first, last + 1))
    if twice := [block for block, times in Counter(blocks).items() if times > 1]:
        raise ShortcutError(f"the block list {text!r} names {format_blocks(twice)} twice")
    if depth is not None and max(blocks) >= depth:
        beyond = format_blocks(block for block in blocks if block >= depth)
        raise ShortcutError(f"no block {beyond}: the model has blocks 0-{depth - 1}")
    return tuple(sorted(blocks))


def parse_kept(text: str, depth: int) -> tuple[int, ...]:
    """Read the blocks that stay: a list, or "every-second", "every-third" and so on, of which the first block is one,
    or "first-and-last".

    Raises ShortcutError as `parse_blocks` does.
    """
    words = {f"every-{word}": step for step, word in enumerate(("second", "third", "fourth", "fifth", "sixth"), 2)}
    words["first-and-last"] = max(1, depth - 1)
    if re.match("every-|first", text) and text not in words:
        raise ShortcutError(f"cannot read {text!r}: there are {', '.join(words)}")
    return tuple(range(0, depth, words[text])) if text in words else parse_blocks(text, depth)


def format_blocks(blocks: Iterable[int]) -> str:
    """Write block numbers as the shortest list that `parse_blocks` reads back, such as "3,5,21-28"; "none" for none."""
    ordered = sorted(set(blocks))
    spans: list[tuple[int, int]] = []
    for block in ordered:
        if spans and block == spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], block)
        else:
            spans.append((block, block))
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) or "none"
