"""`cut`: the shortened checkpoint, written."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Annotated

from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import check_target, staged
from shortcut.choose.plans import BY_HAND, given_by_hand
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import byte_bar
from shortcut.common.text import parse_size
from shortcut.options.groups import FORMAT, ByHand, Model, Out, Overwrite, Stacked, TrustRemoteCode, Writing
from shortcut.options.verb import verb
from shortcut.records.plan import Format, Plan, parse_moves, read_plan
from shortcut.surgery.cut import shorten_config, write_checkpoint
from shortcut.surgery.diff import compare_tensors
from shortcut.surgery.report import CutReport, report_cut


@dataclass(frozen=True)
class CutOptions(ByHand, Stacked, Writing, Overwrite):
    """Writing"""

    model: Model
    out: Out
    _: KW_ONLY
    plan: Annotated[str | Path | Plan | None, "a plan.yaml of `shortcut plan`"] = None
    format: Annotated[Format | None, FORMAT] = None
    dry_run: Annotated[bool, "say what would be written, and write nothing"] = False
    verify: Annotated[bool, "compare every byte written with the base, as prune and check always do"] = False
    no_guard: Annotated[
        bool, "skip building both models without weights, which imports torch; for families proven before"
    ] = False
    trust_remote_code: TrustRemoteCode = False


@verb(CutOptions, first="plan drop", example="org/model shorter --plan plan.yaml")
def cut(asked: CutOptions) -> CutReport:
    """Write the shortened checkpoint: byte for byte the base's tensors, without those of the dropped blocks.

    Works on the files alone: any size, any number type, a few megabytes of memory. Of a model on the Hub, only what
    stays is fetched. OUT is there whole or not at all. Fails where the result would not compute what the base does
    without these blocks.
    """
    by_hand = given_by_hand(asked)
    if (asked.plan is None) == (not by_hand):
        raise ShortcutError(f"say what goes with one of --plan and {BY_HAND}")
    checkpoint, out = open_model(asked.model, asked.revision, weights=False, quiet=asked.quiet), Path(asked.out)
    if by_hand:
        checkpoint = replace(checkpoint, stack=asked.stack)
        plan = Plan.of(checkpoint.base, parse_moves(by_hand, checkpoint.base.blocks))
    else:
        plan = asked.plan if isinstance(asked.plan, Plan) else read_plan(Path(str(asked.plan)))
        checkpoint = replace(checkpoint, stack=plan.base.stack)
        if asked.stack not in ("decoder", plan.base.stack):
            raise ShortcutError(f"the plan is for the {plan.base.stack}, not for --stack {asked.stack}")
    if asked.format is not None:
        plan = replace(plan, format=asked.format)
    plan = replace(plan, keeps_heads=plan.keeps_heads or asked.keep_mtp)
    limit = None if asked.max_shard_size is None else parse_size(asked.max_shard_size)
    check_target(out, overwrite=asked.overwrite, base=checkpoint.folder)
    report = report_cut(checkpoint, plan, out, limit, written=not asked.dry_run)
    config = shorten_config(checkpoint, plan, no_guard=asked.no_guard, trust_remote_code=asked.trust_remote_code)
    if not asked.dry_run:
        with (
            staged(out, overwrite=asked.overwrite, base=checkpoint.folder, size=report.bytes_after) as folder,
            byte_bar(report.bytes_after, "writing", quiet=asked.quiet) as advance,
        ):
            written = write_checkpoint(checkpoint, plan, config, folder, max_shard_size=limit, advance=advance)
            if asked.verify:
                compare_tensors(written, checkpoint, plan)
    return report
