"""Healing without training, and the weights that healing changed, written."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shortcut.checkpoint.checkpoint import Checkpoint, read_json
from shortcut.checkpoint.open import identify
from shortcut.checkpoint.side_files import write_json
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import byte_bar, say
from shortcut.healing.training import Healing, Patient
from shortcut.options.groups import Offload
from shortcut.options.healing import Own
from shortcut.records.methods import Method, Objective
from shortcut.records.plan import Plan
from shortcut.surgery.cut import write_checkpoint

if TYPE_CHECKING:
    from shortcut.material.examples import Material


@dataclass(frozen=True, kw_only=True)
class Fitting(Own, Offload):
    """How weights are fitted: the options of `heal` that say so, and the seed of the text."""

    objective: Objective
    seed: int


def fit(patient: Patient, method: Method, material: "Material", asked: Fitting) -> Healing:
    """Heal without training. Raises ShortcutError where that does not help."""
    from shortcut.healing import refit, scale
    from shortcut.healing.changes import names_in
    from shortcut.healing.own_text import count_own, with_own_text
    from shortcut.healing.saved_fit import SavedFit
    from shortcut.live.blocks import device_of
    from shortcut.live.decoder import Decoder
    from shortcut.live.offload import open_live

    plan, quiet = patient.plan, patient.how.quiet
    saved = None
    with open_live(patient.base, patient.how, offload=asked.offload, quiet=quiet) as live:
        own = count_own(material, asked.own, live, quiet=quiet)
        both = with_own_text(material, own, patient.base, lambda: live, patient.how, seed=asked.seed, quiet=quiet)
        fitting, deciding = both.split(max(1, len(both.sequences) // 4))
        say(f"{method}: fitted on {fitting.tokens} tokens, and {deciding.tokens} others decide", quiet=quiet)
        decoder, device = Decoder.of(live), device_of(live)
        parts = [each.batches(patient.how.batch_size, device) for each in (fitting, deciding)]
        fits: Sequence[Any]
        if method == "scale":
            fits = scale.fit_scales(decoder, plan, *parts, quiet=quiet)
            changed = scale.new_weights(decoder, fits)
        else:
            key = [method, asked.objective, identify(patient.base), plan.to_dict(), both.hash, str(live.dtype)]
            saved = SavedFit(key)
            fits = refit.fit_refits(
                decoder, plan, *parts, method=method, objective=asked.objective, saved=saved, quiet=quiet
            )
            changed = refit.new_weights(decoder, fits)
    if not fits:
        if saved is not None:
            saved.forget()
        raise ShortcutError(f"nothing that {method} can do lowers the perplexity: nothing is written")
    record = {"method": method, "fits": [fit.record() for fit in fits], "data": material.record(), "own": own}
    lines = tuple(f"{method}: {fit}" for fit in fits)
    return Healing(names_in(patient.cut, plan, changed), record, lines, saved=saved)


def write_healed(patient: Patient, steps: Sequence[Healing], folder: Path) -> Checkpoint:
    """Write the shortened checkpoint with other values in some tensors, and into its record what was done."""
    from shortcut.healing.changes import with_tensors

    cut = patient.cut
    changed = {name: values for step in steps for name, values in step.changed.items()}
    with TemporaryDirectory(prefix=".shortcut-", dir=folder.parent) as scratch:
        changes = with_tensors(cut, changed, Path(scratch) / "changed.safetensors")
        with byte_bar(cut.size, "writing", quiet=patient.how.quiet) as advance:
            written = write_checkpoint(changes, Plan.dropping(cut.base, ()), dict(cut.config), folder, advance=advance)
    record = read_json(cut.folder / RECORD)
    before = record.get("healed", {"steps": [], "tensors": []})
    tensors = sorted({*before["tensors"], *changed})
    healed = {"steps": [*before["steps"], *(step.record for step in steps)], "tensors": tensors}
    write_json(folder / RECORD, {**record, "healed": healed})
    if (adapter := steps[-1].adapter) is not None:
        adapter.save(folder / "adapter")
    return written
