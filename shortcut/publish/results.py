"""What `eval` found of a checkpoint, for those who find it on the Hub: a table of its card, and `.eval_results`.

The Hub lists results of benchmarks: data sets that say in a file eval.yaml what their tasks are. What was measured on
others, and on a part of a task, is in eval.json and on the card alone.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shortcut.checkpoint.checkpoint import read_json
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_table

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
    from shortcut.checking.evaluation import Figure

    models = ["base", "model"] if found["base"] else ["model"]
    rows = [
        [row["name"], *(cell for model in models for cell in Figure(row["name"], **row[model]).cells)]
        for row in found["figures"]
    ]
    return format_table(["", *(head for model in models for head in (model, "95 %"))], rows)


def results_to_push(found: Mapping[str, Any], repository: str, revision: str | None) -> bytes | None:
    """`.eval_results` of the tasks whose data are a benchmark on the Hub, for a model there; None where there are none.

    Only shares of right answers count, of whole tasks. Raises what huggingface_hub does.
    """
    from huggingface_hub import EvalResultEntry, constants, eval_result_entries_to_yaml

    source = f"{constants.ENDPOINT}/{repository}/blob/{revision or 'main'}/{EVALUATION}"
    settings = found["settings"]
    shares = {row["name"]: row["model"]["value"] for row in found["figures"] if row["model"]["share"]}
    entries = []
    for task, ran in settings["tasks"].items() if settings["limit"] is None else ():
        name = next((name for name in shares if name.partition(" ")[0] == task), None)
        benchmark = None if name is None else _find_benchmark(ran["dataset"], ran["config"])
        if benchmark is not None:
            how = f"{name} of lm-evaluation-harness {settings['versions']['lm_eval']}, {ran['shots']} shots"
            where: dict[str, Any] = {"date": settings["date"], "source_url": source, "source_name": EVALUATION}
            entries.append(EvalResultEntry(ran["dataset"], benchmark, round(100 * shares[name], 2), notes=how, **where))
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False).encode() if entries else None


def _find_benchmark(dataset: str | None, config: str | None) -> str | None:
    """The task of a benchmark that is about this configuration of its data; None where the data are no benchmark."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset or ""):
        return None
    try:
        path = hf_hub_download(str(dataset), "eval.yaml", repo_type="dataset")
        tasks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["tasks"]
        fitting = [str(task["id"]) for task in tasks if config in (None, task.get("config"))]
    except (RemoteEntryNotFoundError, RepositoryNotFoundError):
        return None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):  # of another format than this
        return None
    return fitting[0] if len(fitting) == 1 else None
