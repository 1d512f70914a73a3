"""Healing by training: what is asked for, and one training from start to end."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut.checkpoint.checkpoint import Checkpoint, read_json
from shortcut.checkpoint.open import identify
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import say, track
from shortcut.family.tasks import find_task
from shortcut.options.groups import Running
from shortcut.options.healing import Own, TrainingInDetail
from shortcut.records.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

    from shortcut.healing.loop import Pace
    from shortcut.healing.lora import Adapter
    from shortcut.healing.losses import Notes, Student, Teacher
    from shortcut.healing.saved import SavedTraining
    from shortcut.healing.saved_fit import SavedFit
    from shortcut.live.decoder import Decoder
    from shortcut.material.examples import Material

ASIDE, ASIDE_MOST = 10, 32  # one sequence of ten is set aside, and so many at most


@dataclass(frozen=True, kw_only=True)
class Tuning(TrainingInDetail, Own):
    """How a shortened model is trained: the options of `heal` that say so, by which method, and in what batches."""

    distill: bool
    batch_size: int
    seed: int

    def check(self) -> None:
        """Raise ShortcutError for what cannot be meant."""
        positive = ("rank", "learning_rate", "epochs", "batch_size", "accumulate", "patience", "temperature")
        for name in (*positive, *(name for name in ("minutes", "tokens", "alpha") if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                raise ShortcutError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number")
        if not 0 <= self.dropout < 1:
            raise ShortcutError(f"--dropout {self.dropout} is not between 0 and 1")
        for name in ("top_k", "match"):
            if getattr(self, name) < 0:
                raise ShortcutError(f"--{name.replace('_', '-')} cannot be negative")
        if (self.top_k or self.match or self.temperature != 1) and not self.distill:
            raise ShortcutError("--top-k, --match and --temperature are for --method distill")
        if self.keep_adapter and self.full:
            raise ShortcutError("--keep-adapter is for low-rank changes: leave out --full")
        if self.top_k and self.match:
            raise ShortcutError("--match needs the states of the base at every step, and --top-k is to do without them")

    @property
    def method(self) -> str:
        """What it is called."""
        return "distill" if self.distill else "lora"

    def pace(self, material: "Material") -> "Pace":
        """How long and how fast, given what there is to train on."""
        from shortcut.healing.loop import Pace

        limit = self.tokens
        if limit is None and self.minutes is None:
            limit = max(1, round(self.epochs * material.tokens))
        steps = (self.learning_rate, self.batch_size, self.accumulate, self.patience, self.seed)
        return Pace(limit, self.minutes, *steps)

    def depends_on(self) -> dict[str, Any]:
        """What a training depends on from its start: it can go on with more time, or another learning rate."""
        free = ("minutes", "tokens", "epochs", "learning_rate", "patience", "keep_adapter")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Patient:
    """A shortened checkpoint, what it was cut from and by which plan, and how models are run."""

    cut: Checkpoint
    base: Checkpoint
    plan: Plan
    how: Running


@dataclass(frozen=True)
class Healing:
    """One way of healing, carried out.

    changed: new weights by name in the checkpoint; record: what was done, as plain data; lines: the same for people;
    adapter: PEFT's, where there is one; saved: what holds the state of it while it goes on.
    """

    changed: "Mapping[str, Tensor]"
    record: dict[str, Any]
    lines: tuple[str, ...]
    adapter: "Adapter | None" = None
    saved: "SavedTraining | SavedFit | None" = None

    def forget(self) -> None:
        """Remove what was kept while it went on."""
        if self.saved is not None:
            self.saved.forget()


def train_checkpoint(
    patient: Patient, tuning: Tuning, material: "Material", changed: "Mapping[str, Tensor]", out: Path
) -> Healing:
    """Train a shortened model from its weights with these changes; the state of the training goes beside `out`.

    Raises ShortcutError where its weights cannot be written back, and as `train` does.
    """
    from shortcut.healing.changes import check_changes, read_tensor
    from shortcut.healing.loop import train
    from shortcut.healing.own_text import with_own_text, with_text
    from shortcut.healing.saved import SavedTraining
    from shortcut.live.load import load_model
    from shortcut.material.pictures import Pictures

    cut, quiet = patient.cut, patient.how.quiet
    if isinstance(material, Pictures):
        material = material.with_answers()
    own = _count_own(patient, material, tuning)
    _set_aside(with_text(material, [()] * own))  # of as many, to see whether it can be done
    tuning, dtype = _pick_arithmetic(tuning, patient)
    decoder, adapter = _adapt(patient, tuning, material, changed, dtype)
    names = {(block, name): cut.anatomy.join(block, f"{name}.weight") for block, name in adapter.projections}
    check_changes(cut, {names[where]: shape for where, shape in adapter.shapes.items()})
    run = {**_identify(patient, changed), "data": material.hash, **tuning.depends_on(), "own": own}
    saved = SavedTraining.open(out.with_name(f"{out.name}.training"), run)
    base = cache(lambda: load_model(patient.base.folder, replace(patient.how, dtype=dtype)).requires_grad_(False))
    try:
        both = with_own_text(material, own, patient.base, base, patient.how, seed=tuning.seed, quiet=quiet)
    except ShortcutError:
        saved.forget_unless_used()
        raise
    rest, aside = _set_aside(both)
    teacher = _teach(base, patient, tuning, rest, saved) if tuning.distill else None
    base.cache_clear()  # where it teaches, the teacher has it
    student = _student(patient, tuning, decoder, teacher)
    say(f"training on {rest.tokens} tokens, with {aside.tokens} others set aside", quiet=quiet)
    batches = aside.batches(tuning.batch_size, decoder.model.device)
    state = train(student, adapter.trained, rest, batches, tuning.pace(rest), saved, quiet=quiet)
    old = {name: changed[name] if name in changed else read_tensor(cut, name) for name in names.values()}
    weights = {name: adapter.new_weight(*where, old[name]).to(old[name].dtype) for where, name in names.items()}
    record = {"method": tuning.method, **asdict(tuning), "own": own, "data": material.record(), **asdict(state)}
    source = f", also on {own} sequences that the base wrote" if own else ""
    line = f"{tuning.method}{source}: {state}"
    return Healing(weights, record, (line,), adapter if tuning.keep_adapter else None, saved)


def _count_own(patient: Patient, material: "Material", tuning: Tuning) -> int:
    """How many sequences the base writes: none where it does not predict the next token. Raises as `count_own` does."""
    from shortcut.healing.own_text import count_own

    if find_task(patient.cut.config).gives == "next tokens":
        return count_own(material, tuning.own)
    if tuning.own:
        raise ShortcutError("--own is text that the base writes, and this one writes none")
    return 0


def _student(patient: Patient, tuning: Tuning, decoder: "Decoder", teacher: "Teacher | Notes | None") -> "Student":
    """The shortened model as it is trained. Raises ShortcutError where it predicts masked tokens, and masks none."""
    from shortcut.healing.losses import Student
    from shortcut.live.load import load_tokenizer
    from shortcut.live.outcomes import check_mask

    mask = None
    if decoder.gives == "masked tokens":
        tokenizer = load_tokenizer(patient.cut.folder, trust_remote_code=patient.how.trust_remote_code)
        mask = check_mask(tokenizer.mask_token_id)
    return Student(decoder, teacher, recompute=tuning.gradient_checkpointing, bf16=tuning.bf16, mask=mask)


def _adapt(
    patient: Patient, tuning: Tuning, material: "Material", changed: "Mapping[str, Tensor]", dtype: str
) -> "tuple[Decoder, Adapter]":
    """The shortened model, loaded with these changes, and what of it is trained. Raises as `train_checkpoint` does."""
    from shortcut.healing.changes import put_tensors
    from shortcut.healing.lora import adapt, check_kept
    from shortcut.live.decoder import Decoder
    from shortcut.live.load import load_model

    cut = patient.cut
    model = load_model(cut.folder, replace(patient.how, dtype="float32" if tuning.full else dtype))
    put_tensors(model, cut, changed)
    decoder, (first,) = Decoder.of(model), material.take([0]).batches(1, model.device)
    for option in ("match", "gradient_checkpointing"):
        if getattr(tuning, option):
            decoder.check_alone(f"--{option.replace('_', '-')}")
    if first.visual is not None and decoder.fault is None:
        decoder.check_images(first)
    rank, alpha = (0 if tuning.full else tuning.rank), tuning.alpha or 2.0 * tuning.rank
    adapter = adapt(decoder, rank=rank, alpha=alpha, dropout=tuning.dropout, tune=tuning.tune, seed=tuning.seed)
    if tuning.keep_adapter:
        check_kept(adapter, cut.config, cut.folder if "auto_map" in cut.config else None)
    return decoder, adapter


def _pick_arithmetic(tuning: Tuning, patient: Patient) -> tuple[Tuning, str]:
    """Whether products are in bfloat16, and the type of what is not trained. Raises ShortcutError for float16.

    On a GPU they are unless another type is asked for.
    """
    from shortcut.live.load import pick_device

    asked = patient.how.dtype
    if asked == "float16":
        raise ShortcutError("training in float16 loses small gradients: use --dtype bfloat16 or float32")
    on_gpu = asked == "auto" and pick_device(patient.how.device).type != "cpu"
    bf16 = tuning.bf16 or on_gpu or asked == "bfloat16"
    return replace(tuning, bf16=bf16), "bfloat16" if bf16 else "float32"


def _identify(patient: Patient, changed: "Mapping[str, Tensor]") -> dict[str, Any]:
    """What tells the weights that a training starts from: those of the base, the plan, and what was healed before."""
    digest = hashlib.sha256()
    for name in sorted(changed):
        digest.update(name.encode() + changed[name].float().cpu().numpy().tobytes())
    before = read_json(patient.cut.folder / RECORD).get("healed")
    healed = None if before is None else {"healed": before, **identify(patient.cut)}
    found = {**identify(patient.base), "plan": patient.plan.to_dict()}
    return {**found, "start": [digest.hexdigest(), healed]}


def _set_aside(material: "Material") -> "tuple[Material, Material]":
    """What is trained on, and what decides."""
    return material.split(min(ASIDE_MOST, max(1, len(material.sequences) // ASIDE)))


def _teach(
    base: Callable[[], Any], patient: Patient, tuning: Tuning, material: "Material", saved: "SavedTraining"
) -> "Teacher | Notes":
    """The base as a teacher; or where only its likeliest tokens count, what it says, noted on the disk."""
    import torch

    from shortcut.healing.losses import Notes, Teacher
    from shortcut.live.decoder import Decoder

    live = base()
    decoder = Decoder.of(live)
    if tuning.top_k and not decoder.predicts:
        raise ShortcutError("--top-k is for models that predict the next token")
    if not tuning.top_k:
        return Teacher(decoder, patient.plan, tuning.temperature, tuning.match)
    folder, count = saved.folder / "teacher", len(material.sequences)
    folder.mkdir(exist_ok=True)
    batches = [range(start, min(start + tuning.batch_size, count)) for start in range(0, count, tuning.batch_size)]
    notes = Notes(folder, tuning.top_k, tuning.temperature)
    for places in track(share(batches), "predictions of the base", quiet=patient.how.quiet):
        (batch,) = material.take(places).batches(len(places), live.device)
        with torch.autocast(live.device.type, torch.bfloat16, enabled=tuning.bf16):
            notes.take(decoder, places, batch)
    add_up(torch.zeros(1))  # until all have noted theirs
    return notes
