"""What a fit has found so far, block by block, in the user's cache, under a key of all it depends on."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shortcut.common.cache import place_for
from shortcut.common.processes import add_up, is_writer
from shortcut.healing.saved import write_whole

Found = tuple[dict[str, Any], dict[str, Tensor]]  # plain data, and tensors by name


class SavedFit:
    """Where one fit is kept. key: plain data that names everything it depends on.

    Of several processes, which all have to make it, one writes. A damaged file counts as none.
    """

    def __init__(self, key: Any) -> None:
        self.folder = place_for("fits", key)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = {int(path.stem): found for path in self.folder.glob("*.safetensors") if (found := _read(path))}
        add_up(torch.zeros(1))  # nothing new is written until all have read

    def read(self, block: int) -> Found | None:
        """What was found of a block in an earlier run."""
        return self.found.get(block)

    def keep(self, block: int, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep what was found of a block. Raises ShortcutError for a full disk."""
        if is_writer():
            stored = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            write = partial(save_file, stored, metadata={"record": json.dumps(record)})
            write_whole(self.folder / f"{block}.safetensors", write, "what was found before is kept")

    def forget(self) -> None:
        """Remove what was kept: the fit is through, and what it gave is written."""
        if is_writer():
            shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Found | None:
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["record"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
