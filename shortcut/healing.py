"""Healing a shortened checkpoint: what was lost is won back in part, and how much of it is measured."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from shortcut import runs
from shortcut.commands import read_record
from shortcut.errors import ShortcutError
from shortcut.progress import byte_bar, say
from shortcut.records.plan import Plan
from shortcut.scoring.documents import Source
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import Checkpoint, read_checkpoint, read_json
from shortcut.surgery.cut import write_checkpoint, write_json
from shortcut.surgery.stage import RECORD, check_target, staged
from shortcut.text import format_table

if TYPE_CHECKING:
    from shortcut.checking.verify import CheckReport
    from shortcut.repair.fold import Fold

Method = Literal["fold"]


@dataclass(frozen=True)
class HealReport:
    """What healing did, and the perplexity of base, shortened and healed model on text that chose nothing."""

    out: str
    method: Method
    changes: tuple[str, ...]
    perplexity_cut: float
    check: "CheckReport"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        found = {"out": self.out, "method": self.method, "changes": list(self.changes)}
        return {**found, "perplexity_cut": self.perplexity_cut, "check": self.check.to_dict()}

    def __str__(self) -> str:
        values = (self.check.perplexity_base, self.perplexity_cut, self.check.perplexity)
        row: list[object] = ["perplexity", *("" if value is None else f"{value:.2f}" for value in values)]
        return "\n".join(
            [
                f"wrote {self.out}, healed by {self.method}",
                *self.changes,
                "",
                format_table(["", "base", "cut", "healed"], [row]),
                "",
                str(self.check),
            ]
        )


def heal(
    short: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    method: Method = "fold",
    data: str = "default",
    heldout: str = "heldout",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 64,
    length: int = 512,
    by_document: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> HealReport:
    """Win back some of what deleting blocks cost, and write the healed checkpoint to OUT; SHORT stays as it is.

    fold trains nothing: what every deleted span did to the stream is fitted by a linear map and merged into weights in
    front of it. A quarter of the text decides how strongly, and whether at all: where no map lowers its perplexity,
    nothing is written. OUT is there only if it loads, and is the base with these maps in the place of its spans.
    """
    from shortcut.checking.perplexity import perplexity
    from shortcut.checking.verify import check_checkpoint, read_healed
    from shortcut.live import device_of, load_model, pick_device, pick_dtype

    folder, target = Path(short), Path(out)
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    cut, plan = read_checkpoint(folder), read_record(folder)
    if plan is None or not plan.dropped:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of blocks that were dropped: there is nothing to heal")
    if read_healed(folder):
        raise ShortcutError(f"{folder} was healed already: heal the checkpoint that it was made from")
    check_target(target, overwrite=overwrite, base=folder)
    pick_dtype(dtype, pick_device(device))
    original = open_model(base or plan.base.model, revision or plan.base.revision, quiet=quiet)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    loading, source = {"device": device, "dtype": dtype, **trust}, Source(data, split, column, chat_template)
    text: dict[str, Any] = {"length": length, "by_document": by_document, **trust}
    fitting, deciding = runs.take_text(original, source, samples, seed=seed, **text).split(max(1, samples // 4))
    unseen = runs.take_text(cut, replace(source, data=heldout), 16, seed=0, **text)
    say(f"folding on {fitting.tokens} tokens, and {deciding.tokens} others that decide", quiet=quiet)
    with runs.start(original, offload=offload, quiet=quiet, **loading) as live:
        parts = [each.batches(batch_size, device_of(live)) for each in (fitting, deciding)]
        folds, changed = _fold(live, plan, parts, quiet=quiet)
    with (
        TemporaryDirectory(prefix="shortcut-") as scratch,
        staged(target, overwrite=overwrite, base=folder, size=cut.size) as stage,
    ):
        healed = _write(cut, plan, changed, Path(scratch), stage, record=folds, quiet=quiet)
        before = perplexity(load_model(folder, **loading), unseen.batches(batch_size, pick_device(device)))
        compared, named = (original, plan), replace(healed, name=str(out))
        checked = check_checkpoint(named, compared, unseen, batch_size=batch_size, quiet=quiet, **loading)
    return HealReport(str(out), method, tuple(map(str, folds)), before, checked)


def _fold(live: Any, plan: Plan, parts: Sequence[Any], *, quiet: bool) -> tuple[list["Fold"], dict[int, Any]]:
    """The maps that help, and by block of the base the weights that hold them. Raises ShortcutError where none does."""
    from shortcut.decoder import Decoder
    from shortcut.offload import resident
    from shortcut.repair.fold import fit_folds

    decoder = Decoder.of(live)
    folds = fit_folds(decoder, plan, *parts, quiet=quiet)
    if not folds:
        raise ShortcutError("no linear map in the place of these blocks lowers the perplexity: nothing to heal by fold")
    changed = {}
    for fold in folds:
        with resident(decoder.blocks[fold.block]):
            changed[fold.block] = fold.weights(decoder.blocks[fold.block])
    return folds, changed


def _write(
    cut: Checkpoint,
    plan: Plan,
    changed: dict[int, Any],
    scratch: Path,
    folder: Path,
    *,
    record: Sequence["Fold"],
    quiet: bool,
) -> Checkpoint:
    """Write the shortened checkpoint with other values in some tensors, and into its record what was done."""
    from shortcut.repair.write import names_in, with_tensors

    named = names_in(cut, plan, changed)
    changes = with_tensors(cut, named, scratch / "changed.safetensors")
    keeping = Plan.dropping(cut.base, ())
    with byte_bar(cut.size, "writing", quiet=quiet) as advance:
        written = write_checkpoint(changes, keeping, dict(cut.config), folder, advance=advance)
    done = [{"span": list(f.span), "block": f.block, "module": f.module, "ridge": f.ridge} for f in record]
    healed = {"method": "fold", "folds": done, "tensors": sorted(named)}
    write_json(folder / RECORD, {**read_json(cut.folder / RECORD), "healed": healed})
    return written
