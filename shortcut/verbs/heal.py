"""`heal`: what shortening cost is won back in part, and how much of it is measured."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_base, open_folder, read_record
from shortcut.checkpoint.stage import RECORD, check_target, staged
from shortcut.common.errors import ShortcutError
from shortcut.common.processes import are_several, is_writer, writer_first
from shortcut.family.tasks import check_writes, find_task
from shortcut.healing.fit import Fitting, fit, write_healed
from shortcut.healing.training import Healing, Patient, Tuning, train_checkpoint
from shortcut.material.take import take_text, take_unseen
from shortcut.options.groups import Heldout, ModelBase, Offload, Out, Overwrite, Questions, Running, Text
from shortcut.options.healing import Own, TrainingInDetail
from shortcut.options.presets import HEAL_PRESETS, HealPresetName
from shortcut.options.verb import handed_on, spell_out, verb, verb_of
from shortcut.records.methods import FITTED, TRAINED, Method, Objective
from shortcut.surgery.diff import compare_tensors

if TYPE_CHECKING:
    from shortcut.checking.questions import Question
    from shortcut.material.examples import Material
    from shortcut.publish.heal_report import HealReport

SAMPLES = (32, 2048)  # sequences to fit on, and to train on at most, where --samples does not say


@dataclass(frozen=True)
class HealOptions(TrainingInDetail, Own, Heldout, Text, Offload, Running, Overwrite):
    """How to heal"""

    short: Annotated[str | Path, "the folder of a shortened checkpoint"]
    out: Out
    _: KW_ONLY
    method: Annotated[
        str,
        "by refit, fold or scale, which train nothing, by lora or distill, which do, or by one of the first and then "
        "one of the second: refit,distill",
    ] = "refit"
    preset: Annotated[HealPresetName | None, "a published way to heal; what is given beside it wins"] = None
    base: ModelBase = None
    revision: Annotated[str | None, "branch, tag or commit of the base on the Hub"] = None
    objective: Annotated[Objective, "what a map is fitted by: the distance to the base's states, or the angle"] = (
        "least-squares"
    )
    samples: Annotated[int | None, "number of sequences; 32 to fit on, up to 2048 to train on if not given"] = None
    check: Annotated[
        Literal["fast", "full"], "full: base, shortened and healed model answer questions as well, and are timed"
    ] = "fast"
    questions: Questions = "default"


@verb(HealOptions, first="method minutes data", example="shorter healed --method refit", presets=HEAL_PRESETS)
def heal(asked: HealOptions) -> "HealReport":
    """Win back some of what shortening cost, and write the healed checkpoint to OUT; SHORT stays as it is.

    refit, fold and scale train nothing: refit solves projections around and behind every deleted span anew, in closed
    form, fold merges a linear map into the one in front of it, scale a single number into those behind it. lora and
    distill train until --minutes, --tokens or --epochs are over: lora learns to predict text, distill to predict what
    the base predicts. One of the first three may be followed by one of the others: refit,distill. Part of what is
    learnt from is text that the base writes itself. Text set aside decides which weights are kept. Where nothing was
    gained, nothing is written, and the command fails. What was killed goes on when the command is given again. OUT is
    there only if it loads, and is the base with these weights in it.
    """
    return heal_checkpoint(asked)


def heal_checkpoint(asked: HealOptions) -> "HealReport":
    """What `heal` does."""
    from shortcut.publish.heal_report import describe_healed

    methods, tuning = read_methods(asked)
    target = Path(os.path.realpath(asked.out))
    check_target(target, overwrite=asked.overwrite, base=Path(asked.short))
    patient = _admit(asked, methods)
    cut, images, trust = patient.cut, bool(patient.plan.frozen), asked.trust_remote_code
    unseen = take_unseen(cut, asked, asked.heldout, images=images, trust_remote_code=trust)
    full = asked.check == "full"
    questions = _read_questions(cut, asked) if full and asked.questions != "none" and not images else ()
    fitting = handed_on(Fitting, asked, objective=asked.objective, seed=asked.seed)
    steps: list[Healing] = []
    for method in methods:
        samples, fewer = asked.samples or SAMPLES[method in TRAINED], method in TRAINED
        taken = take_text(cut, asked, samples, images=images, fewer=fewer, trust_remote_code=trust)
        if method in FITTED:
            steps.append(fit(patient, method, taken, fitting))
        else:
            steps.append(train_checkpoint(patient, tuning, taken, steps[-1].changed if steps else {}, target))
    if not is_writer():
        raise SystemExit  # the others have done their part
    with staged(target, overwrite=asked.overwrite, base=cut.folder, size=2 * cut.size) as stage:
        healed = replace(write_healed(patient, steps, stage), name=str(asked.out))
        report = _report(patient, steps, healed, unseen, questions, timed=full and not asked.offload)
        report = describe_healed(patient.base, patient.plan, cut, healed, report, spell_out(heal, asked))
    for step in steps:
        step.forget()
    return report


def check_heals(checkpoint: Checkpoint, methods: Sequence[Method]) -> None:
    """Raise ShortcutError for a model with several stacks, and for what only one that writes can be healed by."""
    if tuple(methods) != ("distill",):
        check_writes(checkpoint.config, f"healing by {methods[0]}")
    if checkpoint.config.get("is_encoder_decoder") or checkpoint.stack != "decoder":
        raise ShortcutError("healing is for models with one stack: train this one as you trained its base")


def read_methods(asked: HealOptions) -> tuple[tuple[Method, ...], Tuning]:
    """By what is healed, one after the other, and how the one that trains is to do it.

    Raises ShortcutError for what cannot be meant.
    """
    methods = parse_methods(asked.method)
    if asked.keep_adapter and methods[0] in FITTED:
        raise ShortcutError(f"--keep-adapter is for {' and '.join(TRAINED)} alone: heal by {methods[0]} first")
    tuning = handed_on(Tuning, asked, distill="distill" in methods, batch_size=asked.batch_size, seed=asked.seed)
    tuning.check()
    _check_meant(asked, methods)
    return methods, tuning


def parse_methods(text: str) -> tuple[Method, ...]:
    """Read "refit,distill": one that is fitted, one that is trained, or the one and then the other."""
    known: tuple[Method, ...] = (*FITTED, *TRAINED)
    methods = tuple(name for word in text.split(",") for name in known if name == word.strip())
    if len(methods) != len(text.split(",")):
        raise ShortcutError(
            f"--method {text}: there are {', '.join(known)}, and of {', '.join(FITTED)} one may go first"
        )
    kinds = ["fit" if name in FITTED else "train" for name in methods]
    if kinds not in (["fit"], ["train"], ["fit", "train"]):
        raise ShortcutError(
            f"--method {text}: one of {', '.join(FITTED)}, then one of {', '.join(TRAINED)}, or one alone"
        )
    return methods


def _check_meant(asked: HealOptions, methods: Sequence[Method]) -> None:
    """Raise ShortcutError for options of methods that are not asked for, and for a device in several processes."""
    meant: dict[str, tuple[Method, ...]] = dict.fromkeys((field.name for field in fields(TrainingInDetail)), TRAINED)
    meant |= {"objective": ("fold",), "offload": FITTED}
    for name, option in verb_of(heal).options.items():
        if name in meant and getattr(asked, name) != option.default and not set(meant[name]) & set(methods):
            raise ShortcutError(f"{option.flag} is for --method {' or '.join(meant[name])}")
    if asked.check == "fast" and asked.questions not in ("default", "none"):
        raise ShortcutError("--questions are asked by --check full alone")
    if asked.offload and set(methods) & set(TRAINED):
        raise ShortcutError("--offload is for what trains nothing")
    if are_several() and asked.device != "auto":
        raise ShortcutError("several processes take a device each: leave out --device")


def _admit(asked: HealOptions, methods: Sequence[Method]) -> Patient:
    """The shortened checkpoint, the plan that made it, and its base. Raises ShortcutError where nothing is to heal."""
    from shortcut.checking.verify import read_healed
    from shortcut.live.load import pick_device, pick_dtype

    folder = Path(asked.short)
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    pick_dtype(asked.dtype, pick_device(asked.device))
    cut, plan = open_folder(folder, quiet=asked.quiet), read_record(folder)
    check_heals(cut, methods)
    if plan is None or not plan.changes:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what went: there is nothing to heal")
    if methods[0] in FITTED and read_healed(folder):
        raise ShortcutError(f"{folder} was healed already: {methods[0]} takes the checkpoint that it was made from")
    with writer_first():  # it may have to fetch or convert
        original = open_base(plan, asked.base, asked.revision, quiet=asked.quiet)
    compare_tensors(cut, original, plan, read_healed(folder))  # of what is changed, nobody could tell afterwards
    return Patient(cut, original, plan, asked)


def _read_questions(cut: Checkpoint, asked: HealOptions) -> "tuple[Question, ...]":
    """Multiple-choice questions that the model can be asked. Raises ShortcutError for others."""
    from shortcut.checking.questions import check_choices, read_choices
    from shortcut.live.load import load_config, load_tokenizer

    found = read_choices(asked.questions)
    code = cut.folder if "auto_map" in cut.config else None
    limit = getattr(load_config(cut.config, code).get_text_config(), "max_position_embeddings", None)
    check_choices(load_tokenizer(cut.folder, trust_remote_code=asked.trust_remote_code), found, limit)
    return found


def _report(
    patient: Patient,
    steps: Sequence[Healing],
    healed: Checkpoint,
    unseen: "Material",
    questions: "Sequence[Question]",
    *,
    timed: bool,
) -> "HealReport":
    """Check the healed checkpoint against the base, and measure base, shortened and healed model."""
    from shortcut.checking.benchmark import run_benchmark
    from shortcut.checking.verify import check_checkpoint
    from shortcut.publish.heal_report import HealReport

    cut, base, how = patient.cut, patient.base, patient.how
    writes = find_task(base.config).gives == "next tokens"  # what does not is measured by how far it gives the same
    before = check_checkpoint(cut, None if writes else (base, patient.plan), unseen, how)
    check = check_checkpoint(healed, (base, patient.plan), unseen, how, samples=True)
    folders = {"base": base.folder, "cut": cut.folder, "healed": healed.folder}
    return HealReport(
        out=healed.name,
        methods=tuple(step.record["method"] for step in steps),
        changes=tuple(line for step in steps for line in step.lines),
        parameters=(base.parameters, cut.parameters),
        bytes=(base.size, cut.size),
        cut=before,
        check=check,
        benchmark=run_benchmark(folders, questions, how, timed=timed),
    )
