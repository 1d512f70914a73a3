"""`diff`: what two checkpoints share."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from shortcut.checkpoint.open import open_model
from shortcut.options.groups import Quiet, WhoseBlocks
from shortcut.options.verb import verb
from shortcut.surgery.diff import Difference, compare_checkpoints


@dataclass(frozen=True)
class DiffOptions(Quiet):
    """The model"""

    one: Annotated[str | Path, "a folder, a Hub id or a .gguf file"]
    other: Annotated[str | Path, "another one"]
    _: KW_ONLY
    revision: Annotated[str | None, "branch, tag or commit of the first, on the Hub"] = None
    stack: WhoseBlocks = "decoder"


@verb(DiffOptions, example="org/model shorter")
def diff(asked: DiffOptions) -> Difference:
    """Show what two checkpoints share: which block of the one every block of the other is, byte for byte.

    Fails where one of the two cannot be read.
    """
    one = open_model(asked.one, asked.revision, stack=asked.stack, quiet=asked.quiet)
    return compare_checkpoints(one, open_model(asked.other, stack=asked.stack, quiet=asked.quiet))
