"""How good a model is: perplexity, multiple-choice questions and tasks of lm-evaluation-harness, beside its base."""

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import write_text
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import track
from shortcut.common.version import __version__
from shortcut.family.tasks import check_writes
from shortcut.material.take import take_text
from shortcut.options.groups import Loading, Model, OutFile, Questions, Revision, Running, SampledText
from shortcut.options.presets import SUITES, SuiteName
from shortcut.options.verb import handed_on, verb
from shortcut.publish.plots import check_files

if TYPE_CHECKING:
    from shortcut.checking.evaluation import Evaluation, Figure
    from shortcut.checking.harness import Task
    from shortcut.checking.questions import Question
    from shortcut.material.examples import Material


@dataclass(frozen=True)
class EvalOptions(SampledText, Running, Revision, OutFile):
    """What is measured"""

    model: Model
    _: KW_ONLY
    base: Annotated[str | None, "a model to be measured on the same, such as the one that was cut"] = None
    preset: Annotated[SuiteName | None, "the tasks that published figures are of; what is given beside it wins"] = None
    tasks: Annotated[
        str | None,
        "tasks of lm-evaluation-harness, by name or as YAML files, with commas, each with the metric that counts: "
        '"boolq,hellaswag:acc_norm,mine.yaml"',
    ] = None
    shots: Annotated[
        int | None, "solved examples in front of every question of a task; where this is left out, as the task has it"
    ] = None
    questions: Questions = "default"
    limit: Annotated[int | None, "how many questions at most, of --questions and of every task"] = None
    data: str = "heldout"


@verb(EvalOptions, first="base tasks out", example="shorter --base org/model", presets=SUITES)
def eval(asked: EvalOptions) -> "Evaluation":  # noqa: A001  (the word on the command line)
    """Measure a model: perplexity, multiple-choice questions and tasks of lm-evaluation-harness, with 95 % intervals.

    With --base both models are measured on the same text and questions. The questions that only one of them answers
    rightly are counted, with the probability of so uneven a count by chance (McNemar's exact test). --out keeps all
    figures and settings as JSON; written to MODEL/eval.json, they go along when MODEL is pushed. Fails where the two
    models read the text as different tokens.
    """
    from shortcut.checking.evaluation import Evaluation
    from shortcut.checking.harness import load_tasks
    from shortcut.live.load import pick_device, pick_dtype

    pick_dtype(asked.dtype, pick_device(asked.device))
    check_files(asked.out, None)
    questions = _take_questions(asked.questions, asked.limit, asked.seed)
    if not asked.tasks and (asked.shots is not None or (asked.limit is not None and asked.questions == "none")):
        raise ShortcutError("--shots is for --tasks, and --limit for --tasks and --questions")
    checkpoints = [open_model(asked.model, asked.revision, quiet=asked.quiet)]
    checkpoints += [open_model(asked.base, quiet=asked.quiet)] if asked.base else []
    for each in checkpoints:
        check_writes(each.config, "eval")
    unseen, *same = [
        take_text(each, asked, asked.samples, trust_remote_code=asked.trust_remote_code) for each in checkpoints
    ]
    if same and same[0].hash != unseen.hash:
        both = f"{asked.model} and {asked.base}"
        raise ShortcutError(f"{both} read the same text as other tokens: perplexities cannot be compared")
    tasks = load_tasks(asked.tasks, asked.shots, quiet=asked.quiet) if asked.tasks else ()
    found = [_measure(each, unseen, questions, tasks, asked.limit, asked) for each in checkpoints]
    names, figures = tuple(each.name for each in checkpoints), tuple(tuple(each) for each, _ in found)
    settings = {**_settings(asked, checkpoints, unseen, questions), "tasks": found[0][1]}
    result = Evaluation(names, figures, unseen.described, settings)
    if asked.out is not None:
        write_text(asked.out, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return result


def _settings(
    asked: EvalOptions, checkpoints: Sequence[Checkpoint], text: "Material", questions: "Sequence[Question]"
) -> dict[str, Any]:
    """All that is needed to repeat it, but for the tasks."""
    from shortcut.checking.questions import hash_of
    from shortcut.publish.results import hash_of_record

    packages = ("torch", "transformers", *["lm_eval"] * bool(asked.tasks))
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "preset": asked.preset,
        "record": hash_of_record(checkpoints[0].folder),
        "revisions": [each.revision for each in checkpoints],
        "text": text.record(),
        "questions": {
            "source": asked.questions,
            "count": len(questions),
            "seed": asked.seed,
            "hash": hash_of(questions),
        },
        "limit": asked.limit,
        "batch_size": asked.batch_size,
        **asdict(handed_on(Loading, asked)),
        "versions": {name: version(name) for name in packages} | {"shortcut": __version__},
    }


def _take_questions(source: str, limit: int | None, seed: int) -> "tuple[Question, ...]":
    """The questions of a source, so many at most."""
    from shortcut.checking.questions import read_choices

    if limit is not None and limit < 1:
        raise ShortcutError(f"--limit {limit} is not a positive number")
    if source == "none":
        return ()
    found = read_choices(source)
    return found if limit is None or limit >= len(found) else read_choices(source, limit, seed)


def _measure(
    checkpoint: Checkpoint,
    text: "Material",
    questions: "Sequence[Question]",
    tasks: "Sequence[Task]",
    limit: int | None,
    how: Running,
) -> tuple[list["Figure"], dict[str, Any]]:
    """Everything that is measured of one model, and the tasks that were run. One model is in memory at a time."""
    from shortcut.checking.evaluation import Figure
    from shortcut.checking.harness import run_tasks
    from shortcut.checking.perplexity import mean_perplexity, perplexity_interval, sequence_losses
    from shortcut.checking.questions import Z, answer_choices, interval_of
    from shortcut.live.blocks import device_of
    from shortcut.live.load import load_tokenizer
    from shortcut.live.offload import open_live

    tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=how.trust_remote_code)
    with open_live(checkpoint, how, quiet=how.quiet) as live:
        batches = text.batches(how.batch_size, device_of(live))
        losses = sequence_losses(live, track(batches, "perplexity", quiet=how.quiet))
        figures = [Figure("perplexity", mean_perplexity(losses), perplexity_interval(losses, Z))]
        if questions:
            chosen = answer_choices(live, tokenizer, questions, batch_size=how.batch_size, quiet=how.quiet)
            for name, right in (("acc", chosen.right), ("acc_norm", chosen.right_norm)):
                figures.append(Figure(f"questions {name}", fmean(right), interval_of(right), True, right))
        if not tasks:
            return figures, {}
        found, ran = run_tasks(live, tokenizer, tasks, batch_size=how.batch_size, limit=limit, quiet=how.quiet)
    return [*figures, *found], ran
