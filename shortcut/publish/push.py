"""A checkpoint on its way to the Hub: may it go there, which files go, and in one line what went wrong."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, read_json
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.publish.results import EVALUATION, RESULTS
from shortcut.records.plan import Plan, format_plan, read_plan
from shortcut.records.scores import format_scores, read_scores

_STAYS = {"report.html", "adapter"}  # the page names paths of this machine; the adapter is a model of its own
_PATH = re.compile(r"(^|[*,])(\.{0,2}/[^,*]+)")  # alone, or in a list of texts with their weights
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pth?|ckpt|gguf|msgpack|h5|onnx|onnx_data|ot|tflite|index\.json)")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"
_AGAIN = "run the same command again: what has gone up is not sent twice"


@dataclass(frozen=True)
class Pushed:
    """What the Hub answered: addresses of the model, of the commit, and of the pull request where one was opened."""

    url: str
    commit: str
    pull_request: str | None


def files_to_push(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files that make up a checkpoint, by their name in it, and the names of those that are left out.

    Left out are weights that do not belong to it, which nothing has verified, and what is hidden, a cache, or for
    people on this machine.
    """
    own, going, left = {file.path.name for file in checkpoint.files}, {}, []
    own |= set() if SINGLE in own else {INDEX}
    for path in sorted(checkpoint.folder.rglob("*")):
        inside = path.relative_to(checkpoint.folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if hidden or inside.parts[0] in _STAYS or not path.is_file():
            continue
        if _WEIGHTS.fullmatch(path.name) and str(inside) not in own:
            left.append(str(inside))
        else:
            going[str(inside)] = path
    return going, tuple(left)


def records_to_push(folder: Path, base: Checkpoint) -> dict[str, bytes]:
    """Plan, scores and record of a checkpoint, naming the base as others find it: no path of this machine."""
    shown = replace(base.base, model=base.base.title)
    record = read_json(folder / RECORD)
    plan, *before = [Plan.from_dict(plan, RECORD) for plan in (record["plan"], *record.get("lineage", []))]
    earlier = [replace(plan, base=replace(plan.base, model=plan.base.title)) for plan in before]
    record |= {"plan": replace(plan, base=shown).to_dict(), "lineage": [plan.to_dict() for plan in earlier]}
    texts = {RECORD: json.dumps(_without_paths(record), indent=2, ensure_ascii=False) + "\n"}
    if (folder / "plan.yaml").exists():
        own = replace(read_plan(folder / "plan.yaml"), base=shown)
        texts["plan.yaml"] = format_plan(Plan.from_dict(_without_paths(own.to_dict()), "plan.yaml"))
    if (folder / "scores.json").exists():
        scores = replace(read_scores(folder / "scores.json"), base=shown)
        texts["scores.json"] = format_scores(replace(scores, calibration=_without_paths(scores.calibration)))
    if (folder / EVALUATION).exists():
        found = _without_paths(read_json(folder / EVALUATION))
        found["settings"]["record"] = hashlib.sha256(texts[RECORD].encode()).hexdigest()  # as it is there
        texts[EVALUATION] = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    return {name: text.encode() for name, text in texts.items()}


def _without_paths(value: Any) -> Any:
    """Plain data with the name of the file in the place of every path, such as those of texts."""
    if isinstance(value, str):
        return _PATH.sub(lambda match: match[1] + Path(match[2]).name, value)
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    return [_without_paths(each) for each in value] if isinstance(value, list | tuple) else value


def check_way(repository: str, *, private: bool, create_pr: bool) -> bool:
    """Whether a repository is there already; raises ShortcutError where nothing can or should be pushed to it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    namespace, _, _ = repository.partition("/")
    with hub_errors(repository):
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError
        if get_token() is None:
            raise ShortcutError(f"cannot push to {repository}: not logged in: {_LOGIN}")
        account = HfApi().whoami()
        try:
            there = HfApi().model_info(repository)
        except RepositoryNotFoundError:
            there = None
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    open_to = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    files = {file.rfilename for file in there.siblings or ()} if there else set()
    reason = None
    if role == "read":
        reason = f"the token of {account['name']} may only read: {_LOGIN}"
    elif there is None and create_pr:
        reason = "there is no such model to open a pull request at: leave out --create-pr"
    elif there is None and role == "write" and namespace not in open_to:
        reason = f"{account['name']} can make models as {', '.join(open_to)}, and not as {namespace}"
    elif there is not None and private and not there.private:
        reason = "it is there already, and public: leave out --private, or name another"
    elif any(map(_WEIGHTS.fullmatch, files)) and RECORD not in files and not create_pr:
        reason = "it holds a model that shortcut did not write: name another, or propose this one with --create-pr"
    if reason is not None:
        raise ShortcutError(f"cannot push to {repository}: {reason}")
    return there is not None


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    exists: bool,
    private: bool,
    revision: str | None,
    create_pr: bool,
    quiet: bool = False,
) -> Pushed:
    """Upload files in one commit, making the repository and the branch where they are missing.

    Weights that an earlier push left there and that are not among the files go, as transformers might load them, and so
    does what was measured of them.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    api = HfApi()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    with hub_errors(repository):
        if not exists:
            api.create_repo(repository, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        there = api.list_repo_files(repository, revision=revision)
        stale = [name for name in there if _WEIGHTS.fullmatch(name) or name in (EVALUATION, RESULTS)]
        old = [name for name in stale if name not in files]
        operations = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *map(CommitOperationDelete, old),
        ]
        done = api.create_commit(repository, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return _pushed(repository, done, revision)


def upload_file(
    repository: str, name: str, text: str, message: str, *, revision: str | None, create_pr: bool
) -> Pushed:
    """Put one text file into a repository that is there already, in a commit of its own, or propose it."""
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(name, text.encode())]
    with hub_errors(repository):
        done = HfApi().create_commit(
            repository, operations, commit_message=message, revision=revision, create_pr=create_pr
        )
    return _pushed(repository, done, revision)


def _pushed(repository: str, done: Any, revision: str | None) -> Pushed:
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/{repository}" + (f"/tree/{revision}" if revision is not None else "")
    return Pushed(url, done.commit_url, done.pr_url)


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Say in one line why the Hub did not take what was pushed, and what to do."""
    from huggingface_hub import errors

    try:
        yield
        return
    except errors.OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE is set, which forbids every way to the Hub"
    except errors.HfHubHTTPError as error:
        said = " ".join((error.server_message or str(error)).split())[:200]
        reason = {
            400: said,
            401: f"the Hub does not know this login: {_LOGIN}",
            403: f"the Hub refuses it ({said}): {_LOGIN} there",
            404: f"the Hub has no such model or branch, or hides it from this login ({said})",
        }.get(error.response.status_code, f"{said}; {_AGAIN}")
    except errors.HFValidationError:
        reason = "a model on the Hub is called org/name, of letters, digits, -, _ and ."
    except (errors.HTTPError, OSError, RuntimeError) as error:
        said = " ".join(f"{error} {error.__cause__ or ''}".split())[:200]
        reason = f"the Hub cannot be reached, or was lost ({said}); {_AGAIN}"
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
    raise ShortcutError(f"cannot push to {repository}: {reason}")
