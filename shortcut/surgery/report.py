"""What a cut wrote, or would write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.remote import bytes_to_fetch
from shortcut.checkpoint.side_files import left_behind
from shortcut.common.text import format_count, format_size
from shortcut.modeling.editions import NEWEST, beyond_proof
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.cut import needed, plan_files


@dataclass(frozen=True)
class CutReport:
    """What a cut wrote, or would write: files with their bytes, and the model before and after."""

    out: str
    plan: Plan
    files: tuple[tuple[str, int], ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    bytes_to_fetch: int
    heads_dropped: tuple[str, ...]
    left_behind: tuple[str, ...]
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**vars(self), "plan": self.plan.to_dict()}

    def __str__(self) -> str:
        plan, heads, fetched = self.plan, self.heads_dropped, format_size(self.bytes_to_fetch)
        verb = "wrote" if self.written else "would write"
        return "\n".join(
            [
                f"{verb} {self.out}",
                f"{'drops' if plan.described[0].isdigit() else 'plan '}  {plan.described}",
                f"keeps  {format_blocks(plan.kept)} ({len(plan.kept)} of {plan.base.blocks} blocks)",
                *(_how_to_load() if plan.needs_code else []),
                f"parameters {format_count(self.parameters_before)} -> {format_count(self.parameters_after)}, "
                f"bytes {format_size(self.bytes_before)} -> {format_size(self.bytes_after)}",
                *(f"{format_size(size):>9}  {name}" for name, size in self.files),
                *([f"dropped too: {len(heads)} tensors that predict further tokens"] if heads else []),
                *([f"left behind: {', '.join(self.left_behind)}"] if self.left_behind else []),
                *([f"from the Hub: {fetched} of {format_size(self.bytes_before)}"] if self.bytes_to_fetch else []),
            ]
        )


def _how_to_load() -> list[str]:
    lines = ["loads with trust_remote_code=True, for the modeling file in it"]
    if beyond := beyond_proof():
        lines.append(
            f"that file is proven up to transformers {NEWEST}, and {beyond} is installed: see that check passes"
        )
    return lines


def report_cut(
    checkpoint: Checkpoint, plan: Plan, out: Path, max_shard_size: int | None, *, written: bool
) -> CutReport:
    """Say what carrying out this plan writes, before or after. Raises ShortcutError for a plan of another depth."""
    files = plan_files(checkpoint, plan, max_shard_size)
    return CutReport(
        out=str(out),
        plan=plan,
        files=tuple((file.name, file.size) for file in files),
        parameters_before=checkpoint.parameters,
        parameters_after=sum(tensor.parameters for file in files for _, tensor in file.tensors),
        bytes_before=checkpoint.size,
        bytes_after=sum(file.size for file in files),
        bytes_to_fetch=bytes_to_fetch(checkpoint.mirrors, needed(files)),
        heads_dropped=tuple(
            name
            for name in checkpoint.tensors
            if plan.dropped and not plan.keeps_heads and checkpoint.anatomy.predicts_further(name)
        ),
        left_behind=left_behind(checkpoint.folder),
        written=written,
    )
