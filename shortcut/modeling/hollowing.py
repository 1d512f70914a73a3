"""Which architectures can lose halves of blocks, and the modeling file that such a checkpoint carries.

`data/halves.json` says, for every architecture of transformers whose hollow checkpoints a sweep found exact, which
modules of a block belong to which half. The modeling file is `hollow.py` with the names of that architecture in it, or
for the layout of DeciLM, `decilm.py` as it is.
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

PREFIX = "hollow_"


@dataclass(frozen=True)
class Modeling:
    """A modeling file: its name and text, and the entries of config.json that name it and its classes."""

    file: str
    code: str
    settings: Mapping[str, Any]


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
        template = _read("hollow.py")
        halves = "".join(
            f'    "{half}": {json.dumps(dict(modules))},\n'
            for half, modules in (("attention", self.attention), ("mlp", self.mlp))
        )
        text = re.sub(r"(?<=HALVES = \{\n).*?(?=\}\n)", lambda _: halves, template, flags=re.DOTALL)
        text = text.replace('BLOCKS = "model.layers"', f'BLOCKS = "{self.blocks}"')
        text = text.replace('"""Llama whose', f'"""{self.family} whose').replace('"llama"', f'"{self.family}"')
        text = text.replace("hollow_llama", PREFIX + self.family)
        return text.replace("LlamaForCausalLM", self.architecture).replace("LlamaConfig", self.config)

    @property
    def modeling(self) -> Modeling:
        """The modeling file and the entries of config.json that name it."""
        classes = f"Hollow{self.config}", f"Hollow{self.architecture}"
        settings = _settings(PREFIX + self.family, "modeling_hollow", self.auto, *classes)
        return Modeling("modeling_hollow.py", self.code, settings)


def _settings(family: str, module: str, auto: str, config: str, architecture: str) -> dict[str, Any]:
    auto_map = {"AutoConfig": f"{module}.{config}", auto: f"{module}.{architecture}"}
    return {"model_type": family, "architectures": [architecture], "auto_map": auto_map}


def _read(name: str) -> str:
    return files("shortcut").joinpath("modeling", name).read_text(encoding="utf-8")


DECILM = Modeling(
    "modeling_decilm.py",
    _read("decilm.py"),
    _settings("nemotron-nas", "modeling_decilm", "AutoModelForCausalLM", "DeciLMConfig", "DeciLMForCausalLM"),
)


@cache
def read_hollowings() -> Mapping[str, Hollowing]:
    """All architectures whose hollow checkpoints were found exact, by name."""
    rows = json.loads(files("shortcut").joinpath("data", "halves.json").read_text(encoding="utf-8"))
    return {name: Hollowing(name, **{**row, "kept": tuple(row["kept"])}) for name, row in rows.items()}


def hollowing_of(config: Mapping[str, Any]) -> Hollowing:
    """How the model of a config.json becomes hollow. Raises ShortcutError where that was not found exact."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "a model without architecture"
    if modeling_of(config) is not None:
        raise ShortcutError("blocks of a hollow checkpoint cannot lose more: carry a plan of all of it out on its base")
    if not can_be_hollow(config):
        raise ShortcutError(f"{architecture} cannot lose halves of blocks: `shortcut families` lists what can")
    return read_hollowings()[architecture]


def can_be_hollow(config: Mapping[str, Any]) -> bool:
    """Whether `hollowing_of` knows the model of a config.json."""
    named = config.get("architectures")
    return isinstance(named, list) and bool(named) and named[0] in read_hollowings() and "auto_map" not in config


def modeling_of(config: Mapping[str, Any]) -> Modeling | None:
    """The modeling file that a checkpoint of this config.json carries; None where it is none of shortcut's."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    hollowing = read_hollowings().get(architecture.removeprefix("Hollow"))
    modeling = hollowing.modeling if hollowing else DECILM
    return modeling if config.get("auto_map") == modeling.settings["auto_map"] else None


def has_own_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the only code that a checkpoint runs is the modeling file that shortcut writes, to the letter."""
    modeling = modeling_of(config)
    if modeling is None or not (folder / modeling.file).is_file():
        return False
    return (folder / modeling.file).read_text(encoding="utf-8") == modeling.code
