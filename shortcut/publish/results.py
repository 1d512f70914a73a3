"""What `eval` found of a checkpoint, for those who find it on the Hub: a table of its card, and `.eval_results`.

The Hub lists results of benchmarks: data sets that say in a file eval.yaml what their tasks are. What was measured on
others, and on a part of a task, is in eval.json and on the card alone.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from shortcut.errors import ShortcutError
from shortcut.surgery.checkpoint import read_json
from shortcut.surgery.stage import RECORD
from shortcut.text import format_table

EVALUATION = "eval.json"  # where `eval --out` puts it for `push` to find
RESULTS = ".eval_results/shortcut.yaml"


def hash_of_record(folder: Path) -> str | None:
    """What tells a checkpoint that shortcut wrote from others, wherever it is moved; None for one that it did not."""
    path = folder / RECORD
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def read_evaluation(folder: Path) -> Mapping[str, Any] | None:
    """What `eval` wrote into the folder of a checkpoint, if it did. Raises ShortcutError where it is of another one."""
    path = folder / EVALUATION
    if not path.exists():
        return None
    found = read_json(path)
    settings = found.get("settings")
    if not isinstance(settings, dict) or settings.get("record") != hash_of_record(folder):
        raise ShortcutError(f"{path} was not measured of this checkpoint: run `shortcut eval` again, or remove it")
    return found


def evaluation_table(found: Mapping[str, Any]) -> str:
    """Its figures with their intervals, for people; those of the base first, where it was measured beside it."""
    from shortcut.checking.figures import Figure

    models = ["base", "model"] if found["base"] else ["model"]
    rows = [
        [row["name"], *(cell for model in models for cell in Figure(row["name"], **row[model]).cells)]
        for row in found["figures"]
    ]
    return format_table(["", *(head for model in models for head in (model, "95 %"))], rows)


def results_to_push(found: Mapping[str, Any], repository: str, revision: str | None) -> bytes | None:
    """`.eval_results` of the tasks whose data are a benchmark on the Hub, for a model there; None where there are none.

    Raises what huggingface_hub does.
    """
    from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

    source = f"{constants.ENDPOINT}/{repository}/blob/{revision or 'main'}/{EVALUATION}"
    settings, values = found["settings"], {row["name"]: row["model"] for row in found["figures"]}
    entries = []
    for task, ran in settings["tasks"].items() if settings["limit"] is None else ():
        named = [name for name in values if name.partition(" ")[0] == task]
        for benchmark in _tasks_of(ran["dataset"], ran["config"]) if named else ():
            value = values[named[0]]["value"] * (100 if values[named[0]]["share"] else 1)
            how = f"{named[0]} of lm-evaluation-harness {settings['versions']['lm_eval']}, {ran['shots']} shots"
            where: dict[str, Any] = {"date": settings["date"], "source_url": source, "source_name": EVALUATION}
            entries.append(EvalResultEntry(ran["dataset"], benchmark, round(value, 2), notes=how, **where))
    if not entries:
        return None
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode()


def _tasks_of(dataset: str, config: str | None) -> Iterator[str]:
    """The task of a benchmark that is about this configuration of its data; nothing where the data are no benchmark."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", dataset):
        return
    try:
        path = hf_hub_download(dataset, "eval.yaml", repo_type="dataset")
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["tasks"]
        fitting = [task["id"] for task in tasks if config in (None, task.get("config"))]
    except (EntryNotFoundError, RepositoryNotFoundError, yaml.YAMLError, KeyError, TypeError):
        return
    if len(fitting) == 1:
        yield fitting[0]
