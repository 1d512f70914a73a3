"""Healing a shortened checkpoint: what was lost is won back in part, and how much of it is measured."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shortcut import runs
from shortcut.arguments import options_of, spell_out
from shortcut.commands import read_record
from shortcut.errors import ShortcutError
from shortcut.presets import HEAL_PRESETS, HealPresetName, with_presets
from shortcut.processes import are_several, is_writer, writer_first
from shortcut.progress import byte_bar, say
from shortcut.records.healing import FITTED, TRAINED, Method, Objective, Tune
from shortcut.records.plan import Plan
from shortcut.scoring.documents import Source
from shortcut.sources import open_folder
from shortcut.surgery.checkpoint import Checkpoint, read_json
from shortcut.surgery.compare import compare_tensors
from shortcut.surgery.cut import write_checkpoint
from shortcut.surgery.side_files import write_json
from shortcut.surgery.stage import RECORD, check_target, staged
from shortcut.tuning import Patient, Step, Tuning, train_checkpoint

if TYPE_CHECKING:
    from shortcut.checking.choices import Choice
    from shortcut.publish.healed import HealReport
    from shortcut.scoring.pictures import Material

SAMPLES = (64, 2048)  # sequences to fit on, and to train on at most, where --samples does not say


@partial(with_presets, presets=HEAL_PRESETS)
def heal(
    short: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    method: str = "fold",
    preset: HealPresetName | None = None,
    minutes: float | None = None,
    tokens: int | None = None,
    epochs: float = 1.0,
    learning_rate: float = 5e-4,
    rank: int = 32,
    alpha: float | None = None,
    dropout: float = 0.0,
    tune: Tune = "all",
    full: bool = False,
    temperature: float = 1.0,
    match: float = 0.0,
    top_k: int = 0,
    accumulate: int = 1,
    patience: int = 3,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    keep_adapter: bool = False,
    objective: Objective = "least-squares",
    data: str = "default",
    own: int = 0,
    heldout: str = "heldout",
    questions: str = "default",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int | None = None,
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
) -> "HealReport":
    """Win back some of what shortening cost, and write the healed checkpoint to OUT; SHORT stays as it is.

    Without training: fold merges a linear map for every deleted span into weights in front of it, scale a single number
    into those behind it. With training, until --minutes, --tokens or --epochs are over: lora learns to predict text,
    distill to predict what the base predicts. One of each may follow each other: fold,distill. Text set aside decides
    what is kept, and whether anything is: where nothing was gained, nothing is written. A training that was killed goes
    on when the command is given again. OUT is there only if it loads, and is the base with these weights in it.
    """
    given = dict(locals())
    from shortcut.publish.healed import describe_healed

    methods, target = check_methods(method, keep_adapter=keep_adapter), Path(os.path.realpath(out))
    training: dict[str, Any] = {"minutes": minutes, "tokens": tokens, "epochs": epochs, "learning_rate": learning_rate}
    training |= {"rank": rank, "alpha": alpha, "dropout": dropout, "tune": tune, "full": full, "bf16": bf16}
    training |= {"temperature": temperature, "match": match, "top_k": top_k, "accumulate": accumulate, "seed": seed}
    training |= {"batch_size": batch_size, "patience": patience, "gradient_checkpointing": gradient_checkpointing}
    tuning = Tuning(distill="distill" in methods, keep_adapter=keep_adapter, own=own, **training)
    tuning.check()
    _check_meant(given, methods)
    check_target(target, overwrite=overwrite, base=Path(short))
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    loading = {"device": device, "dtype": dtype, **trust}
    patient = _admit(Path(short), methods, base, revision, batch_size=batch_size, loading=loading, quiet=quiet)
    cut, plan = patient.cut, patient.plan
    source = Source(data, split, column, chat_template)
    text: dict[str, Any] = {"length": length, "by_document": by_document, "images": bool(plan.frozen)}
    take: Any = partial(runs.take_text, cut, **text, **trust)
    unseen = runs.take_unseen(cut, replace(source, data=heldout), length=length, images=text["images"], **trust)
    asked = () if questions == "none" or plan.frozen else _read_questions(cut, questions, **trust)
    steps: list[Step] = []
    for step in methods:
        taken = take(source, samples or SAMPLES[step in TRAINED], seed=seed, fewer=step in TRAINED)
        if step in FITTED:
            steps.append(_fit(patient, step, taken, objective, offload=offload))
        else:
            steps.append(train_checkpoint(patient, tuning, taken, steps[-1].changed if steps else {}, target))
    if not is_writer():
        raise SystemExit  # the others have done their part
    with staged(target, overwrite=overwrite, base=cut.folder, size=2 * cut.size) as stage:
        healed = replace(_write(patient, steps, stage), name=str(out))
        report = _report(patient, steps, healed, unseen, asked, timed=not offload)
        report = describe_healed(patient.base, plan, cut, healed, report, spell_out(heal, given))
    steps[-1].forget()
    return report


def check_methods(text: str, *, keep_adapter: bool = False, told: bool = False) -> tuple[Method, ...]:
    """Read "fold,distill": one that is fitted, one that is trained, or the one and then the other.

    told: whether it was said how to train.
    """
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
    if told and "train" not in kinds:
        raise ShortcutError(f"--minutes, --own and --bf16 are for {' and '.join(TRAINED)}, and {text} trains nothing")
    if keep_adapter and "fit" in kinds:
        raise ShortcutError(f"--keep-adapter is for {' and '.join(TRAINED)} alone: heal by {methods[0]} first")
    if "fit" in kinds and are_several():
        raise ShortcutError(f"{methods[0]} runs in one process: heal by it first, and train what it gave in several")
    return methods


def _check_meant(given: Mapping[str, Any], methods: Sequence[Method]) -> None:
    """Raise ShortcutError for options of methods that are not asked for, and for a device in several processes."""
    own: dict[str, tuple[Method, ...]] = dict.fromkeys((field.name for field in fields(Tuning)), TRAINED)
    own |= {"objective": ("fold",), "offload": FITTED}
    shared = {"seed", "batch_size"}
    for name, option in options_of(heal).items():
        if name in own and name not in shared and given[name] != option.default and not set(own[name]) & set(methods):
            raise ShortcutError(f"{option.flag} is for --method {' or '.join(own[name])}")
    if given["offload"] and set(methods) & set(TRAINED):
        raise ShortcutError("--offload is for what trains nothing")
    if are_several() and given["device"] != "auto":
        raise ShortcutError("several processes take a device each: leave out --device")


def _admit(
    folder: Path,
    methods: Sequence[Method],
    base: str | None,
    revision: str | None,
    *,
    batch_size: int,
    loading: dict[str, Any],
    quiet: bool,
) -> Patient:
    """The shortened checkpoint, the plan that made it, and its base. Raises ShortcutError where nothing is to heal."""
    from shortcut.checking.verify import read_healed
    from shortcut.live import pick_device, pick_dtype

    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    pick_dtype(loading["dtype"], pick_device(loading["device"]))
    cut, plan = open_folder(folder, quiet=quiet), read_record(folder)
    if plan is None or not plan.changes:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what went: there is nothing to heal")
    if methods[0] in FITTED and read_healed(folder):
        raise ShortcutError(f"{folder} was healed already: {methods[0]} takes the checkpoint that it was made from")
    with writer_first():  # it may have to fetch or convert
        original = runs.open_base(plan, base, revision, quiet=quiet)
    compare_tensors(cut, original, plan, read_healed(folder))  # of what is changed, nobody could tell afterwards
    return Patient(cut, original, plan, batch_size, loading, quiet)


def _read_questions(cut: Checkpoint, questions: str, **trust: bool) -> "tuple[Choice, ...]":
    """Multiple-choice questions that the model can be asked. Raises ShortcutError for others."""
    from shortcut.checking.choices import check_choices, read_choices
    from shortcut.live import load_config, load_tokenizer

    found = read_choices(questions)
    code = cut.folder if "auto_map" in cut.config else None
    limit = getattr(load_config(cut.config, code).get_text_config(), "max_position_embeddings", None)
    check_choices(load_tokenizer(cut.folder, **trust), found, limit)
    return found


def _fit(patient: Patient, method: Method, material: "Material", objective: Objective, *, offload: bool) -> Step:
    """Heal without training. Raises ShortcutError where that does not help."""
    from shortcut.decoder import Decoder
    from shortcut.live import device_of
    from shortcut.repair import fold, scale
    from shortcut.repair.write import names_in

    plan, quiet = patient.plan, patient.quiet
    fitting, deciding = material.split(max(1, len(material.sequences) // 4))
    say(f"{method}: fitted on {fitting.tokens} tokens, and {deciding.tokens} others decide", quiet=quiet)
    with runs.start(patient.base, offload=offload, quiet=quiet, **patient.loading) as live:
        decoder, device = Decoder.of(live), device_of(live)
        parts = [each.batches(patient.batch_size, device) for each in (fitting, deciding)]
        fits: Sequence[Any]
        if method == "scale":
            fits = scale.fit_scales(decoder, plan, *parts, quiet=quiet)
            changed = scale.new_weights(decoder, fits)
        else:
            fits = fold.fit_folds(decoder, plan, *parts, objective=objective, quiet=quiet)
            changed = fold.new_weights(decoder, fits)
    if not fits:
        raise ShortcutError(f"nothing that {method} can do lowers the perplexity: nothing is written")
    record = {"method": method, "fits": [fit.record() for fit in fits], "data": material.record()}
    return Step(names_in(patient.cut, plan, changed), record, tuple(f"{method}: {fit}" for fit in fits))


def _write(patient: Patient, steps: Sequence[Step], folder: Path) -> Checkpoint:
    """Write the shortened checkpoint with other values in some tensors, and into its record what was done."""
    from shortcut.repair.write import with_tensors

    cut = patient.cut
    changed = {name: values for step in steps for name, values in step.changed.items()}
    with TemporaryDirectory(prefix=".shortcut-", dir=folder.parent) as scratch:
        changes = with_tensors(cut, changed, Path(scratch) / "changed.safetensors")
        with byte_bar(cut.size, "writing", quiet=patient.quiet) as advance:
            written = write_checkpoint(changes, Plan.dropping(cut.base, ()), dict(cut.config), folder, advance=advance)
    record = read_json(cut.folder / RECORD)
    before = record.get("healed", {"steps": [], "tensors": []})
    tensors = sorted({*before["tensors"], *changed})
    healed = {"steps": [*before["steps"], *(step.record for step in steps)], "tensors": tensors}
    write_json(folder / RECORD, {**record, "healed": healed})
    if (adapter := steps[-1].adapter) is not None:
        adapter.save(folder / "adapter")
    return written


def _report(
    patient: Patient,
    steps: Sequence[Step],
    healed: Checkpoint,
    unseen: "Material",
    questions: "Sequence[Choice]",
    *,
    timed: bool,
) -> "HealReport":
    """Check the healed checkpoint against the base, and measure what both and the shortened one are worth."""
    from shortcut.checking.verify import check_checkpoint
    from shortcut.checking.worth import measure_worth
    from shortcut.publish.healed import HealReport

    cut, base = patient.cut, patient.base
    how: dict[str, Any] = {"batch_size": patient.batch_size, "quiet": patient.quiet, **patient.loading}
    before = check_checkpoint(cut, None, unseen, **how)
    check = check_checkpoint(healed, (base, patient.plan), unseen, samples=True, **how)
    folders = {"base": base.folder, "cut": cut.folder, "healed": healed.folder}
    return HealReport(
        out=healed.name,
        methods=tuple(step.record["method"] for step in steps),
        changes=tuple(line for step in steps for line in step.lines),
        parameters=(base.parameters, cut.parameters),
        bytes=(base.size, cut.size),
        cut=before,
        check=check,
        worth=measure_worth(folders, questions, timed=timed, **how),
    )
