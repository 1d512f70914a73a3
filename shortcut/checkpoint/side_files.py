"""Files of a checkpoint beside its weights: those that go along, and how JSON is written."""

import json
import re
import shutil
from pathlib import Path

# Files beside the weights that stay behind: other forms of the weights, caches, and what speaks of the base alone.
_LEFT_BEHIND = re.compile(
    r"""(?x) .*\.(safetensors|bin|pth?|gguf|msgpack|h5|onnx|onnx_data|ot|tflite|index\.json)
    | (config|eval|scores|shortcut)\.json | README\.md | plan\.yaml | scores\.png | report\.html | \..* """
)
_SKIPPED_FOLDERS = {"original", "onnx", "openvino", "optimizer", "runs", "metal", "coreml", "adapter"}


def copy_side_files(source: Path, target: Path) -> None:
    """Copy tokenizer, processors, templates, remote code, licences: all that is not weights or about the base."""
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        hidden = any(part.startswith(".") or part in _SKIPPED_FOLDERS for part in inside.parts[:-1])
        if path.is_file() and not hidden and not _LEFT_BEHIND.fullmatch(path.name):
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)


def write_json(path: Path, data: object) -> None:
    """Write a JSON file as transformers does: indented, in UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
