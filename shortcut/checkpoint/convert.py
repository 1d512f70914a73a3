"""Checkpoints in other forms, made into safetensors once: GGUF files, and weights that PyTorch pickled.

The results stay in the user's cache, under a name that follows the file, its size and its time. Nothing that a pickle
says is carried out: PyTorch reads it as tensors or not at all.
"""

import contextlib
import hashlib
import io
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import INDEX, SINGLE, read_json, read_weight_map
from shortcut.checkpoint.side_files import copy_side_files, write_json
from shortcut.checkpoint.stage import RECORD, staged
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.family.fields import rope_apart

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert_gguf(path: Path, *, quiet: bool = False) -> Path:
    """Dequantise a GGUF file into a bfloat16 checkpoint; gives its folder."""
    folder = _cached(path, [path], "with rope_theta ")
    if (folder / RECORD).exists():
        return folder
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
        import torch
        import transformers
    except ImportError:
        raise ShortcutError('reading GGUF needs the gguf package: pip install "shortcut[gguf]"') from None
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise ShortcutError("reading GGUF needs transformers 5.17 or newer: pip install -U transformers") from None
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
    try:
        with staged(folder) as partial:
            model.to(torch.bfloat16).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _write_for_older_readers(partial)
            write_json(partial / RECORD, {"shortcut": 1, "converted_from": path.name})
    except ShortcutError:
        if not (folder / RECORD).exists():  # else another process was faster
            raise
    return folder


def _write_for_older_readers(folder: Path) -> None:
    """Put the rope base where transformers 4 and servers look for it as well, unless transformers reads it otherwise.

    Without that they take the default base, and write nonsense without a word.
    """
    from transformers import AutoConfig

    content = read_json(folder / "config.json")
    rope = content.get("rope_parameters")
    if not isinstance(rope, dict) or not {"rope_theta", "rope_type"} <= rope.keys():
        return
    expected = AutoConfig.from_pretrained(folder)
    write_json(folder / "config.json", {**content, **rope_apart(rope)})
    if AutoConfig.from_pretrained(folder).rope_parameters != expected.rope_parameters:
        write_json(folder / "config.json", content)


def pickles_in(folder: Path) -> list[Path]:
    """The pickled weight files of a checkpoint that has no others; empty where it has safetensors, or none at all."""
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        return []
    if (folder / PICKLE).exists():
        return [folder / PICKLE]
    if not (folder / PICKLE_INDEX).exists():
        return []
    names = sorted(set(read_weight_map(folder / PICKLE_INDEX).values()))
    if astray := [name for name in names if Path(name).name != name]:
        raise ShortcutError(f"{folder / PICKLE_INDEX} names {astray[0]!r}, which is no file of its own folder")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ShortcutError(f"{folder / missing[0]} is missing")
    return [folder / name for name in names]


def convert_pickles(source: Path, paths: list[Path], *, quiet: bool = False) -> Path:
    """Write the tensors of pickled weight files as safetensors, one file for each, and the rest of the checkpoint.

    One file is in memory at a time. Raises ShortcutError for a file that holds anything but tensors.
    """
    from safetensors.torch import save_file

    folder = _cached(source, paths)
    if (folder / RECORD).exists():
        return folder
    say(f"converting {', '.join(path.name for path in paths)} to safetensors in {folder}", quiet=quiet)
    weight_map: dict[str, str] = {}
    total = 0
    with staged(folder, size=sum(path.stat().st_size for path in paths)) as partial:
        for number, path in enumerate(paths, 1):
            name = SINGLE if len(paths) == 1 else f"model-{number:05d}-of-{len(paths):05d}.safetensors"
            tensors = _read_pickle(path)
            save_file(tensors, partial / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(paths) > 1:
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        copy_side_files(source, partial)
        write_json(partial / RECORD, {"shortcut": 1, "converted_from": source.name})
        write_json(partial / "config.json", read_json(source / "config.json"))
    return folder


def _read_pickle(path: Path) -> dict[str, Any]:
    """The tensors of one file, each with memory of its own."""
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ShortcutError(f"{path} is no plain map of names to tensors, and code in it is not run") from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise ShortcutError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ShortcutError(f"{path} is no plain map of names to tensors")
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}


def _cached(source: Path, paths: Iterable[Path], way: str = "") -> Path:
    """Where in the user's cache the conversion of these files, as they are now, belongs.

    way: what tells it from the same file's conversions by earlier versions.
    """
    from huggingface_hub.constants import HF_HOME

    states = [(path, path.stat()) for path in paths]
    key = way + " ".join(f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in states)
    return Path(HF_HOME) / "shortcut" / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
