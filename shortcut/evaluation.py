"""How good a model is: perplexity, multiple-choice questions and tasks of lm-evaluation-harness, beside its base."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from shortcut import __version__, runs
from shortcut.errors import ShortcutError
from shortcut.presets import SUITES, SuiteName, with_presets
from shortcut.progress import track
from shortcut.scoring.documents import Source
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.stage import write_text

if TYPE_CHECKING:
    from shortcut.checking.choices import Choice
    from shortcut.checking.figures import Evaluation, Figure
    from shortcut.checking.harness import Task
    from shortcut.scoring.pictures import Material


@partial(with_presets, presets=SUITES)
def eval(  # noqa: A001  (the word on the command line)
    model: str | Path,
    *,
    base: str | None = None,
    preset: SuiteName | None = None,
    tasks: str | None = None,
    shots: int | None = None,
    questions: str = "default",
    limit: int | None = None,
    data: str = "heldout",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    quiet: bool = False,
) -> "Evaluation":
    """Measure a model: perplexity, multiple-choice questions and tasks of lm-evaluation-harness, with 95 % intervals.

    With --base both models are measured on the same: which questions only one of them answers rightly is counted, and
    how likely so uneven a count is by chance (McNemar's exact test). --revision is that of MODEL. --out keeps all
    figures and settings as JSON; what MODEL/eval.json says goes with it when it is pushed.
    """
    from shortcut.checking.choices import hash_of
    from shortcut.checking.figures import Evaluation
    from shortcut.checking.harness import load_tasks
    from shortcut.live import pick_device, pick_dtype
    from shortcut.publish.results import hash_of_record

    pick_dtype(dtype, pick_device(device))
    runs.check_files(out, None)
    asked = _take_questions(questions, limit, seed)
    if not tasks and (shots is not None or (limit is not None and questions == "none")):
        raise ShortcutError("--shots is for --tasks, and --limit for --tasks and --questions")
    checkpoints = [open_model(model, revision, quiet=quiet), *([open_model(base, quiet=quiet)] if base else [])]
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    source, text = Source(data, split, column, chat_template), {"length": length, "seed": seed, **trust}
    unseen, *same = [runs.take_text(each, source, samples, **text) for each in checkpoints]
    if same and same[0].hash != unseen.hash:
        raise ShortcutError(f"{model} and {base} read the same text as other tokens: perplexities cannot be compared")
    loaded = load_tasks(tasks, shots, quiet=quiet) if tasks else ()
    how: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "device": device, "dtype": dtype, **trust}
    packages = ("torch", "transformers", *["lm_eval"] * bool(loaded))
    found = [_measure(each, unseen, asked, loaded, quiet=quiet, **how) for each in checkpoints]
    settings = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": preset,
        "record": hash_of_record(checkpoints[0].folder),
        "revisions": [each.revision for each in checkpoints],
        "text": unseen.record(),
        "questions": {"source": questions, "count": len(asked), "seed": seed, "hash": hash_of(asked)},
        "tasks": found[0][1],
        **how,
        "versions": {name: version(name) for name in packages} | {"shortcut": __version__},
    }
    names, figures = tuple(each.name for each in checkpoints), tuple(tuple(each) for each, _ in found)
    result = Evaluation(names, figures, unseen.described, settings)
    if out is not None:
        write_text(out, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return result


def _take_questions(source: str, limit: int | None, seed: int) -> "tuple[Choice, ...]":
    """The questions of a source, so many at most."""
    from shortcut.checking.choices import read_choices

    if limit is not None and limit < 1:
        raise ShortcutError(f"--limit {limit} is not a positive number")
    if source == "none":
        return ()
    found = read_choices(source)
    return found if limit is None or limit >= len(found) else read_choices(source, limit, seed)


def _measure(
    checkpoint: Checkpoint,
    text: "Material",
    asked: "Sequence[Choice]",
    tasks: "Sequence[Task]",
    *,
    limit: int | None,
    batch_size: int,
    quiet: bool,
    **loading: Any,
) -> tuple[list["Figure"], dict[str, Any]]:
    """Everything that is measured of one model, and the tasks that were run. One model is in memory at a time."""
    from shortcut.checking.choices import Z, answer_choices, interval_of
    from shortcut.checking.figures import Figure
    from shortcut.checking.harness import run_tasks
    from shortcut.checking.perplexity import mean_perplexity, perplexity_interval, sequence_losses
    from shortcut.live import device_of, load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=loading["trust_remote_code"])
    how: dict[str, Any] = {"batch_size": batch_size, "quiet": quiet}
    with runs.start(checkpoint, offload=False, quiet=quiet, **loading) as live:
        losses = sequence_losses(live, track(text.batches(batch_size, device_of(live)), "perplexity", quiet=quiet))
        figures = [Figure("perplexity", mean_perplexity(losses), perplexity_interval(losses, Z))]
        if asked:
            chosen = answer_choices(live, tokenizer, asked, label="questions", **how)
            for name, right in (("acc", chosen.right), ("acc_norm", chosen.right_norm)):
                figures.append(Figure(f"questions {name}", fmean(right), interval_of(right), True, right))
        found, ran = run_tasks(live, tokenizer, tasks, limit=limit, **how) if tasks else ([], {})
    return [*figures, *found], ran
