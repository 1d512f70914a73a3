"""The state of a training on the disk, beside what it will write: what it goes on from, and the best weights so far."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from shortcut.checkpoint.stage import write_text
from shortcut.common.errors import ShortcutError
from shortcut.common.processes import is_writer, writer_first

RUN, STATE, BEST = "run.json", "state.pt", "best.safetensors"


@dataclass(frozen=True)
class SavedTraining:
    """A folder that holds the state of one training. Of several processes one writes, and all read.

    All have to call its methods, in the same order.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, run: Mapping[str, Any]) -> "SavedTraining":
        """Take a folder for a run, given plain data that tells it from others.

        Raises ShortcutError where it holds something else, or another run.
        """
        with writer_first():
            _take(folder, json.loads(json.dumps(run)))
        return cls(folder)

    @property
    def holds(self) -> str:
        """What is there, for people."""
        if not (self.folder / STATE).exists():
            return "nothing is kept yet"
        return f"{self.folder} keeps what was good before, and the same command goes on from there"

    def restore(self, trained: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, Any]:
        """Put weights and optimiser back as they were kept; gives how far that was, nothing where there is nothing."""
        if not (self.folder / STATE).exists():
            return {}
        try:
            content = torch.load(self.folder / STATE, weights_only=True, map_location="cpu")
            _put(content["weights"], trained)
            optimizer.load_state_dict(content["optimizer"])
            return dict(content["progress"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UnpicklingError) as error:
            raise ShortcutError(f"{self.folder / STATE} is damaged ({error}): remove {self.folder}") from None

    def save(self, trained: Mapping[str, nn.Parameter], optimizer: Any, progress: Mapping[str, Any]) -> None:
        """Keep all that is needed to go on."""
        content = {"weights": _copies(trained), "optimizer": optimizer.state_dict(), "progress": dict(progress)}
        self._write(STATE, lambda path: torch.save(content, path))

    def keep_best(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Keep the weights as the best so far."""
        self._write(BEST, lambda path: save_file(_copies(trained), path))

    def put_best(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Put the best weights into the model."""
        _put(load_file(self.folder / BEST), trained)

    def forget(self) -> None:
        """Remove it all: the training is through, and what it gave is written."""
        if is_writer():
            shutil.rmtree(self.folder)

    def forget_unless_used(self) -> None:
        """Remove it if nothing is kept in it: whoever tries again may do it otherwise."""
        if is_writer() and [path.name for path in self.folder.iterdir()] == [RUN]:
            shutil.rmtree(self.folder)

    def _write(self, name: str, write: Any) -> None:
        """A file, whole or not at all."""
        with writer_first():
            if is_writer():
                write_whole(self.folder / name, write, self.holds)


def write_whole(path: Path, write: Callable[[Path], object], otherwise: str) -> None:
    """Write a file whole or not at all. otherwise: what is said, beside the reason, where that fails."""
    fresh = path.with_name(f"{path.name}.partial")
    try:
        write(fresh)
        os.replace(fresh, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # what torch and safetensors say of a full disk
        fresh.unlink(missing_ok=True)
        raise ShortcutError(f"cannot write {path} ({' '.join(str(error).split())[:120]}): {otherwise}") from None


def _take(folder: Path, run: dict[str, Any]) -> None:
    """As `SavedTraining.open`, one process after the other, the writer first."""
    file = folder / RUN
    if file.exists():
        try:
            other = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            other = {}
        if differing := sorted(key for key in run if not isinstance(other, dict) or other.get(key) != run[key]):
            raise ShortcutError(
                f"{folder} holds the state of another training (of another {', '.join(differing)}):"
                " remove it, or name another OUT"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ShortcutError(f"{folder}, where the state of the training goes, holds something else")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(run, indent=1))


def _copies(trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in trained.items()}


@torch.no_grad()
def _put(values: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter]) -> None:
    for name, weight in trained.items():
        weight.copy_(values[name])
