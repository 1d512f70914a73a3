"""Which architectures can lose halves of blocks, and the modeling file that such a checkpoint carries.

`data/halves.json` says, for every architecture of transformers whose hollow checkpoints a sweep found exact, which
modules of a block belong to which half. The modeling file is `hollow.py` with the names of that architecture in it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from shortcut.errors import ShortcutError

MODELING_FILE = "modeling_hollow.py"
PREFIX = "hollow_"


@dataclass(frozen=True)
class Hollowing:
    """How an architecture becomes hollow. family: its model_type; config: its config class; auto: the auto class.

    blocks: the path to the list of blocks inside the model; attention, mlp: the modules of a block that only this half
    uses, and how many values each returns, 0 being a tensor alone; by its class where that differs. kept: those that
    stay with either. last_token: whether its blocks can run for the last token of a prompt alone.
    """

    architecture: str
    family: str
    config: str
    auto: str
    blocks: str
    attention: Mapping[str, int | Mapping[str, int]]
    mlp: Mapping[str, int | Mapping[str, int]]
    kept: tuple[str, ...]
    last_token: bool

    def half_of(self, rest: str, part: str) -> Literal["attention", "mlp"] | None:
        """To which half a tensor belongs, by its name inside a block; part: what the name alone suggests."""
        head = rest.split(".")[0]
        if head in self.kept:
            return None
        if head in self.attention or head in self.mlp:
            return "attention" if head in self.attention else "mlp"
        return "attention" if part == "attention" else "mlp" if part == "mlp" else None

    @property
    def code(self) -> str:
        """The text of the modeling file."""
        template = files("shortcut").joinpath("modeling", "hollow.py").read_text(encoding="utf-8")
        halves = "".join(
            f'    "{half}": {json.dumps(dict(modules))},\n'
            for half, modules in (("attention", self.attention), ("mlp", self.mlp))
        )
        text = re.sub(r"(?<=HALVES = \{\n).*?(?=\}\n)", lambda _: halves, template, flags=re.DOTALL)
        text = text.replace('BLOCKS = "model.layers"', f'BLOCKS = "{self.blocks}"')
        text = text.replace('"""Llama whose', f'"""{self.family} whose').replace('"llama"', f'"{self.family}"')
        text = text.replace("hollow_llama", PREFIX + self.family)
        return text.replace("LlamaForCausalLM", self.architecture).replace("LlamaConfig", self.config)

    def settings(self) -> dict[str, Any]:
        """The entries of config.json that name the modeling file and its classes."""
        module = MODELING_FILE.removesuffix(".py")
        return {
            "model_type": PREFIX + self.family,
            "architectures": [f"Hollow{self.architecture}"],
            "auto_map": {
                "AutoConfig": f"{module}.Hollow{self.config}",
                self.auto: f"{module}.Hollow{self.architecture}",
            },
        }


@cache
def read_hollowings() -> Mapping[str, Hollowing]:
    """All architectures whose hollow checkpoints were found exact, by name."""
    rows = json.loads(files("shortcut").joinpath("data", "halves.json").read_text(encoding="utf-8"))
    return {name: Hollowing(name, **{**row, "kept": tuple(row["kept"])}) for name, row in rows.items()}


def hollowing_of(config: Mapping[str, Any]) -> Hollowing:
    """How the model of a config.json becomes hollow. Raises ShortcutError where that was not found exact."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "a model without architecture"
    if architecture.startswith("Hollow"):
        raise ShortcutError("blocks of a hollow checkpoint cannot lose more: carry a plan of all of it out on its base")
    if not can_be_hollow(config):
        raise ShortcutError(f"{architecture} cannot lose halves of blocks: `shortcut families` lists what can")
    return read_hollowings()[architecture]


def can_be_hollow(config: Mapping[str, Any]) -> bool:
    """Whether `hollowing_of` knows the model of a config.json."""
    named = config.get("architectures")
    return isinstance(named, list) and bool(named) and named[0] in read_hollowings() and "auto_map" not in config


def has_own_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the only code that a checkpoint runs is the modeling file that shortcut writes, to the letter."""
    named = config.get("architectures")
    known = read_hollowings().get(str(named[0]).removeprefix("Hollow")) if isinstance(named, list) and named else None
    if known is None or config.get("auto_map") != known.settings()["auto_map"]:
        return False
    path = folder / MODELING_FILE
    return path.is_file() and path.read_text(encoding="utf-8") == known.code
