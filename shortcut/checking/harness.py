"""Tasks of lm-evaluation-harness: by name or as a YAML file, run on a live model."""

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from shortcut.checking.evaluation import Figure
from shortcut.checking.questions import Z
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.live.load import LOADING_ERRORS, Model

SEED = 1234  # of the examples shown in front, as the harness has it


@dataclass(frozen=True)
class Task:
    """A task or group of them, loaded with its data. metric: the one that counts, None being the first it reports."""

    name: str
    metric: str | None
    loaded: Mapping[str, Any]

    @property
    def heads(self) -> list[str]:
        """What has results of its own: a group as a whole, or else the single tasks."""
        return [self.name] if self.name in self.loaded["groups"] else list(self.loaded["tasks"])


def load_tasks(text: str, shots: int | None, *, quiet: bool) -> tuple[Task, ...]:
    """Load tasks, "boolq,hellaswag:acc_norm,mine.yaml", with their data; `:` names the metric that counts.

    shots: how many solved examples come first; None leaves it to the task. Raises ShortcutError where the package is
    not installed, for a task that is not known, and where its data cannot be had.
    """
    if find_spec("lm_eval") is None:
        raise ShortcutError('tasks need the package lm_eval: pip install "shortcut[eval]"')
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    pairs = [part.strip().partition(":") for part in text.split(",")]
    with _aside(quiet=quiet):
        manager = TaskManager(include_defaults=not all(map(_is_file, (name for name, _, _ in pairs))))
    return tuple(_load(manager, name, metric or None, shots, quiet=quiet) for name, _, metric in pairs)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".yaml", ".yml")


def _load(manager: Any, name: str, metric: str | None, shots: int | None, *, quiet: bool) -> Task:
    if _is_file(name) and not Path(name).is_file():
        raise ShortcutError(f"no file {name}")
    if not _is_file(name) and name not in manager.all_tasks:
        close = get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
        raise ShortcutError(f"lm-evaluation-harness has no task {name!r}: {hint}")
    from datasets.exceptions import DatasetsError

    say(f"loading the task {name}", quiet=quiet)
    try:
        with _aside(quiet=quiet):
            loaded = manager.load([name])
    except (*LOADING_ERRORS, yaml.YAMLError, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ShortcutError(f"the task {name} cannot be loaded: {reason or type(error).__name__}") from None
    reported = {each["metric"] for task in loaded["tasks"].values() for each in task.config.metric_list or ()}
    if metric is not None and metric.partition(",")[0] not in reported:
        raise ShortcutError(f"the task {name} reports no {metric}: it reports {', '.join(sorted(map(str, reported)))}")
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):  # as the harness: a task that says 0 means it
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    return Task(name, metric, loaded)


@contextmanager
def _aside(*, quiet: bool) -> Iterator[None]:
    """What other programs print goes to stderr where somebody watches, and nowhere else."""
    out = io.StringIO() if quiet or not sys.stderr.isatty() else sys.stderr
    with redirect_stdout(out), redirect_stderr(out):
        yield


def run_tasks(
    model: Model, tokenizer: Any, tasks: Sequence[Task], *, batch_size: int, limit: int | None, quiet: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """One figure for every task, and of several their plain mean; and what was run: data, versions, shots.

    limit: how many questions of every task at most. Intervals are those of the harness's standard errors. Raises
    ShortcutError for a metric that a task does not report, and a task that the harness refuses to run.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    with _aside(quiet=quiet):
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    figures, ran = [], {}
    for task in tasks:
        say(f"running the task {task.name}", quiet=quiet)
        try:
            with _aside(quiet=quiet):
                found = evaluate(wrapped, task.loaded, limit=limit, bootstrap_iters=100)
        except ValueError as error:
            raise ShortcutError(f"the task {task.name} cannot be run: {' '.join(str(error).split())[:200]}") from None
        figures += [_figure(head, task, found) for head in task.heads]
        for name, own in task.loaded["tasks"].items():
            ran[name] = {
                "dataset": own.DATASET_PATH,
                "config": own.DATASET_NAME,
                "version": found["versions"].get(name),
                "shots": found["n-shot"].get(name),
                "questions": found["n-samples"][name]["effective"],
            }
    if len(figures) > 1 and all(figure.share for figure in figures):
        mean = fmean(figure.value for figure in figures)
        figures.append(Figure("mean of tasks", mean, share=True))
    return figures, ran


def _figure(head: str, task: Task, found: Mapping[str, Any]) -> Figure:
    """The figure of a task or group, in what the harness found; its metrics are called "acc,none" after a filter."""
    values = {
        key: value
        for key, value in found["results"][head].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    named = [key for key in values if task.metric in (None, key, key.partition(",")[0])]
    if not named:
        raise ShortcutError(
            f"{head} sums up {', '.join(values) or 'nothing'} of its tasks, not {task.metric or 'more'}"
        )
    metric, _, chosen = named[0].partition(",")
    error = found["results"][head].get(f"{metric}_stderr,{chosen}")
    value, half = values[named[0]], Z * error if isinstance(error, int | float) else None
    rows = [row for name in task.loaded["tasks"] for row in found["samples"][name] if head in (name, task.name)]
    single = [row.get(metric) for row in rows if row["filter"] == chosen]
    right = tuple(bool(each) for each in single) if all(each in (0, 1) for each in single) else ()
    interval = None if half is None else (value - half, value + half)
    return Figure(f"{head} {metric}", value, interval, bool(right), right)
