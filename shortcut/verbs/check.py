"""`check`: whether a checkpoint is what its record says."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from shortcut.checkpoint.open import open_base, open_folder, read_record
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.material.take import take_text
from shortcut.options.groups import ModelBase, Running, SampledText
from shortcut.options.verb import verb

if TYPE_CHECKING:
    from shortcut.checking.verify import CheckReport


@dataclass(frozen=True)
class CheckOptions(SampledText, Running):
    """The base"""

    checkpoint: Annotated[str | Path, "the folder of a checkpoint"]
    _: KW_ONLY
    base: ModelBase = None
    revision: Annotated[str | None, "branch, tag or commit of the base on the Hub"] = None
    data: str = "heldout"


@verb(CheckOptions, first="base data", example="shorter")
def check(asked: CheckOptions) -> "CheckReport":
    """Verify a shortened checkpoint against its base, and measure the perplexity of both.

    It has to load with plain from_pretrained without a missing or unexpected key, its tensors have to be the base's
    byte for byte, and its logits those of the base with the dropped blocks bypassed. Fails at the first thing that is
    not so. A checkpoint that shortcut did not write is only loaded and measured.
    """
    from shortcut.checking.verify import check_checkpoint

    folder = Path(asked.checkpoint)
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    short = open_folder(folder, quiet=asked.quiet)
    plan = read_record(folder)
    if plan is None and asked.base is not None:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what was dropped from {asked.base}")
    original, images = None, False
    if plan is not None:
        original, images = (open_base(plan, asked.base, asked.revision, quiet=asked.quiet), plan), bool(plan.frozen)
    heldout = take_text(short, asked, asked.samples, images=images, trust_remote_code=asked.trust_remote_code)
    return check_checkpoint(short, original, heldout, asked)
