"""Freezing the tokens of images in some blocks (ShortV): score, plan, write and check in one go."""

from pathlib import Path
from typing import Literal

from shortcut.arguments import spell_out
from shortcut.choose.rules import Select, parse_ratio
from shortcut.errors import ShortcutError
from shortcut.road import PruneReport, prune
from shortcut.sources import open_model

ListName = Literal["llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-next-13b"]
# What ShortV (arXiv:2504.00502) freezes in its four models, as its code lists the blocks: the least important first.
LISTS: dict[ListName, str] = {
    "llava-1.5-7b": "31,29,30,28,0,26,27,25,24,22,23,21,2,3,20,18,17,12,19",
    "llava-1.5-13b": "39,32,28,36,27,37,29,30,1,38,25,31,2,26,23,34,0,33,35,22,24,21,20,17",
    "llava-next-7b": "31,29,30,28,26,27,22,24,21,23,25,20,19,17,18,15,12,0,2",
    "llava-next-13b": "39,32,29,36,27,30,37,23,25,31,26,2,28,22,33,35,34,24,38,21,20,18,1,17",
}


def freeze(
    model: str | Path,
    out: str | Path,
    *,
    count: int | None = None,
    ratio: str | None = None,
    blocks: str | None = None,
    drop: str | None = None,
    preset: ListName | None = None,
    select: Select = "lowest",
    metric: str = "kl",
    protect: str = "none",
    candidates: str = "all",
    data: str = "drawings",
    heldout: str = "heldout",
    split: str = "train",
    column: str | None = None,
    samples: int = 40,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PruneReport:
    """Freeze the tokens of images in the blocks that do least with them, and write a checkpoint that skips that work.

    Say how many blocks with --count, what share of them with --ratio, or which with --blocks or a --preset, of which
    --count takes the first. They are scored as by `score --allow freeze-visual`; the result is checked against the
    base, and both answer questions it was not chosen by. As in `prune`, OUT is there only if the check passed.
    """
    asked = dict(locals())
    if preset is not None and blocks is None:
        blocks, count = ",".join(LISTS[preset].split(",")[:count]), None
    if [count, ratio, blocks].count(None) != 2:
        raise ShortcutError("say what is frozen with one of --count, --ratio, --blocks and --preset")
    if drop is not None and blocks is None:
        raise ShortcutError("--drop goes with --blocks: blocks are scored for one thing at a time")
    if ratio is not None:
        depth = open_model(model, revision, weights=False, quiet=quiet).base.blocks
        count = max(1, round(parse_ratio(ratio) * depth))
    report = prune(
        model,
        out,
        count=count,
        freeze_visual=blocks,
        drop=drop,
        select=select,
        metric=metric,
        allow="freeze-visual",
        protect=protect,
        candidates=candidates,
        data=data,
        heldout=heldout,
        split=split,
        column=column,
        samples=samples,
        seed=seed,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
    return report.made_by(spell_out(freeze, asked), Path(out))
