"""`freeze`: the tokens of images pass by some blocks (ShortV); score, plan, write and check in one go."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from shortcut.checkpoint.open import open_model
from shortcut.choose.rules import Select, parse_ratio
from shortcut.common.errors import ShortcutError
from shortcut.options.groups import Data, Heldout, MayGo, Metrics, Model, Out, Overwrite, Revision, Running
from shortcut.options.verb import handed_on, spell_out, verb
from shortcut.verbs.prune import PruneOptions, PruneReport, prune_checkpoint

ListName = Literal["llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-13b"]
# What ShortV (arXiv:2504.00502) freezes in its four models, as its code lists the blocks: the least important first.
LISTS: dict[ListName, str] = {
    "llava-1.5-7b": "31,29,30,28,0,26,27,25,24,22,23,21,2,3,20,18,17,12,19",
    "llava-1.5-13b": "39,32,28,36,27,37,29,30,1,38,25,31,2,26,23,34,0,33,35,22,24,21,20,17",
    "llava-next-7b": "31,29,30,28,26,27,22,24,21,23,25,20,19,17,18,15,12,0,2",
    "llava-next-13b": "39,32,29,36,27,30,37,23,25,31,26,2,28,22,33,35,34,24,38,21,20,18,1,17",
}


@dataclass(frozen=True)
class FreezeOptions(Heldout, Data, MayGo, Running, Revision, Overwrite):
    """What is frozen"""

    model: Model
    out: Out
    _: KW_ONLY
    count: Annotated[int | None, "how many blocks are frozen; with --preset, so many of its first"] = None
    ratio: Annotated[str | None, "this share of the blocks, such as 50%"] = None
    blocks: Annotated[str | None, 'the blocks that leave the tokens of images as they are, by number: "31,29,30"'] = (
        None
    )
    drop: Annotated[str | None, "blocks that go as well, by number; with --blocks"] = None
    preset: Annotated[ListName | None, "the blocks published for a model"] = None
    select: Annotated[
        Select, "which blocks: those that score lowest, the span that does, the deepest, or those between spaced ones"
    ] = "lowest"
    metric: Metrics = "kl"
    data: str = "drawings"
    samples: Annotated[int, "number of questions about images"] = 40


@verb(FreezeOptions, first="count ratio blocks", example="org/model frozen --ratio 50% --data questions.jsonl")
def freeze(asked: FreezeOptions) -> PruneReport:
    """Freeze the tokens of images in the blocks that do least with them, and write a checkpoint that skips that work.

    Say how many blocks with --count, what share of them with --ratio, or which with --blocks or a --preset. They are
    scored as by `score --allow freeze-visual`. The result is checked against the base, and both answer questions that
    chose nothing. As in `prune`, OUT is there only if the check passed. Fails for a model that sees no images.
    """
    count, blocks = asked.count, asked.blocks
    if asked.preset is not None and blocks is None:
        blocks, count = ",".join(LISTS[asked.preset].split(",")[:count]), None
    if [count, asked.ratio, blocks].count(None) != 2:
        raise ShortcutError("say what is frozen with one of --count, --ratio, --blocks and --preset")
    if asked.drop is not None and blocks is None:
        raise ShortcutError("--drop goes with --blocks: blocks are scored for one thing at a time")
    if asked.ratio is not None:
        depth = open_model(asked.model, asked.revision, weights=False, quiet=asked.quiet).base.blocks
        count = max(1, round(parse_ratio(asked.ratio) * depth))
    pruning = handed_on(
        PruneOptions,
        asked,
        asked.model,
        asked.out,
        count=count,
        freeze_visual=blocks,
        drop=asked.drop,
        allow="freeze-visual",
        select=asked.select,
        metric=asked.metric,
        samples=asked.samples,
    )
    return prune_checkpoint(pruning).made_by(spell_out(freeze, asked), Path(asked.out))
