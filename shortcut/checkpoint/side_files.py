"""Files of a checkpoint beside its weights: those that go along, and how JSON is written."""

import json
import re
import shutil
from pathlib import Path

# Files that stay behind: what is written anew, and what shortcut wrote about the base;
_WRITTEN_ANEW = re.compile(
    r"""(?x) model(-\d+-of-\d+)?\.safetensors | .*\.index\.json | (config|eval|scores|shortcut)\.json
    | README\.md | plan\.yaml | scores\.png | report\.html | \..* """
)
# other forms of the weights, caches, and what speaks of the base alone.
_OF_THE_BASE = re.compile(
    r"""(?x) .*\.(safetensors|bin|pth?|gguf|msgpack|h5|onnx|onnx_data|ot|tflite)
    | imatrix\..* | trainer_state\.json """
)
_FOLDERS_OF_THE_BASE = {"original", "onnx", "openvino", "optimizer", "runs", "metal", "coreml", "adapter"}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processors, templates, remote code, licences: all that is not weights or about the base."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") or part in _FOLDERS_OF_THE_BASE for part in inside.parts[:-1])
        gone = _WRITTEN_ANEW.fullmatch(path.name) or _OF_THE_BASE.fullmatch(path.name)
        if path.is_file() and not hidden and not gone:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)


def left_behind(source: Path) -> tuple[str, ...]:
    """The files and folders that speak of the base alone, and are not written anew either."""
    names = sorted(path.name + "/" * path.is_dir() for path in source.iterdir())
    return tuple(
        name
        for name in names
        if name.removesuffix("/") in _FOLDERS_OF_THE_BASE
        or (_OF_THE_BASE.fullmatch(name) and not _WRITTEN_ANEW.fullmatch(name))
    )


def write_json(path: Path, data: object) -> None:
    """Write a JSON file as transformers does: indented, in UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
