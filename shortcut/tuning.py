"""Healing by training: what is asked for, and one training from start to end."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import runs
from shortcut.errors import ShortcutError
from shortcut.progress import say, track
from shortcut.records.healing import Tune
from shortcut.records.plan import Plan
from shortcut.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from shortcut.repair.keeper import Keeper
    from shortcut.repair.lora import Adapter
    from shortcut.repair.losses import Notes, Teacher
    from shortcut.repair.train import Pace
    from shortcut.scoring.pictures import Material

ASIDE, ASIDE_MOST = 10, 32  # one sequence of ten is set aside, and so many at most


@dataclass(frozen=True)
class Tuning:
    """How a shortened model is trained: the options of `heal` that say so."""

    distill: bool
    tune: Tune
    rank: int
    alpha: float | None
    dropout: float
    full: bool
    learning_rate: float
    minutes: float | None
    tokens: int | None
    epochs: float
    batch_size: int
    accumulate: int
    patience: int
    temperature: float
    match: float
    top_k: int
    gradient_checkpointing: bool
    bf16: bool
    keep_adapter: bool
    seed: int

    def check(self) -> None:
        """Raise ShortcutError for what cannot be meant."""
        positive = ("rank", "learning_rate", "epochs", "batch_size", "accumulate", "patience", "temperature")
        for name in (*positive, *(name for name in ("minutes", "tokens", "alpha") if getattr(self, name) is not None)):
            if not getattr(self, name) > 0:
                raise ShortcutError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a positive number")
        if not 0 <= self.dropout < 1:
            raise ShortcutError(f"--dropout {self.dropout} is not between 0 and 1")
        if self.top_k < 0 or self.match < 0:
            raise ShortcutError("--top-k and --match cannot be negative")
        if (self.top_k or self.match or self.temperature != 1) and not self.distill:
            raise ShortcutError("--top-k, --match and --temperature are for --method distill")
        if self.keep_adapter and self.full:
            raise ShortcutError("--keep-adapter is for low-rank changes: leave out --full")
        if self.top_k and self.match:
            raise ShortcutError("--match needs the states of the base at every step, and --top-k is to do without them")

    def pace(self, material: "Material") -> "Pace":
        """How long and how fast, given what there is to train on."""
        from shortcut.repair.train import Pace

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
    """A shortened checkpoint, what it was cut from and how, and how models are loaded: as for `load_model`."""

    cut: Checkpoint
    base: Checkpoint
    plan: Plan
    batch_size: int
    loading: dict[str, Any]
    quiet: bool


@dataclass(frozen=True)
class Step:
    """One way of healing, carried out.

    changed: new weights by name in the checkpoint; record: what was done, as plain data; lines: the same for people;
    adapter: PEFT's, where there is one; keeper: what holds the state of a training.
    """

    changed: "Mapping[str, Tensor]"
    record: dict[str, Any]
    lines: tuple[str, ...]
    adapter: "Adapter | None" = None
    keeper: "Keeper | None" = None

    def forget(self) -> None:
        """Remove what was kept while it went on."""
        if self.keeper is not None:
            self.keeper.forget()


def train_checkpoint(
    patient: Patient, tuning: Tuning, material: "Material", changed: "Mapping[str, Tensor]", folder: Path
) -> Step:
    """Train a shortened model from its weights with these changes; folder: where the state of the training goes.

    Raises ShortcutError where its weights cannot be written back, and as `train` does.
    """
    from shortcut.decoder import Decoder
    from shortcut.live import load_model
    from shortcut.repair.keeper import Keeper
    from shortcut.repair.lora import adapt, check_kept
    from shortcut.repair.losses import Student
    from shortcut.repair.train import train
    from shortcut.repair.write import check_changes, put_tensors
    from shortcut.scoring.pictures import Pictures

    cut, quiet = patient.cut, patient.quiet
    if isinstance(material, Pictures):
        material = material.with_answers()
    rest, aside = material.split(min(ASIDE_MOST, max(1, len(material.sequences) // ASIDE)))
    frozen = "float32" if tuning.full else "bfloat16" if tuning.bf16 else patient.loading["dtype"]
    model = load_model(cut.folder, **{**patient.loading, "dtype": frozen})
    put_tensors(model, cut, changed)
    decoder = Decoder.of(model)
    rank, alpha = (0 if tuning.full else tuning.rank), tuning.alpha or 2.0 * tuning.rank
    adapter = adapt(decoder, rank=rank, alpha=alpha, dropout=tuning.dropout, tune=tuning.tune, seed=tuning.seed)
    if tuning.keep_adapter:
        check_kept(adapter, cut.config)
    check_changes(cut, {cut.anatomy.join(*where): shape for where, shape in adapter.shapes.items()})
    run = {**runs.identify(patient.base), "plan": patient.plan.to_dict(), "changed": sorted(changed), "data": rest.hash}
    keeper = Keeper.open(folder, {**run, **tuning.depends_on()})
    teacher = _teach(patient, tuning, rest, keeper) if tuning.distill else None
    student = Student(decoder, teacher, recompute=tuning.gradient_checkpointing, bf16=tuning.bf16)
    say(f"training on {rest.tokens} tokens, with {aside.tokens} others set aside", quiet=quiet)
    batches, pace = aside.batches(tuning.batch_size, model.device), tuning.pace(rest)
    state = train(student, adapter.trained, rest, batches, pace, keeper, quiet=quiet)
    weights = {cut.anatomy.join(*where): weight for where, weight in adapter.changed().items()}
    record = {"method": "distill" if tuning.distill else "lora", **asdict(tuning), "data": material.record()}
    return Step(weights, {**record, **asdict(state)}, (str(state),), adapter if tuning.keep_adapter else None, keeper)


def _teach(patient: Patient, tuning: Tuning, material: "Material", keeper: "Keeper") -> "Teacher | Notes":
    """The base as a teacher; or where only its likeliest tokens count, what it says, noted on the disk."""
    import torch

    from shortcut.decoder import Decoder
    from shortcut.live import load_model
    from shortcut.repair.losses import Notes, Teacher

    dtype = "bfloat16" if tuning.bf16 else patient.loading["dtype"]
    live = load_model(patient.base.folder, **{**patient.loading, "dtype": dtype}).requires_grad_(False)
    decoder = Decoder.of(live)
    if not tuning.top_k:
        return Teacher(decoder, patient.plan, tuning.temperature, tuning.match)
    folder, count = keeper.folder / "teacher", len(material.sequences)
    folder.mkdir(exist_ok=True)
    notes = Notes(folder, tuning.top_k, tuning.temperature)
    for start in track(range(0, count, tuning.batch_size), "predictions of the base", quiet=patient.quiet):
        places = range(start, min(start + tuning.batch_size, count))
        (batch,) = material.take(places).batches(len(places), live.device)
        with torch.autocast(live.device.type, torch.bfloat16, enabled=tuning.bf16):
            notes.take(decoder, places, batch)
    return notes
