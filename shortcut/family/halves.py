"""Which architectures can lose halves of blocks or freeze images in them, and the modeling file of such a checkpoint.

`data/halves.json` says, for every architecture of transformers whose hollow checkpoints a sweep found exact, which
modules of a block belong to which half. The modeling file is made from `hollow.py`, or from `shortv.py` where blocks
leave the tokens of images as they are, with the names of that architecture in it; for the layout of DeciLM, from
`decilm.py` as it is.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from shortcut.common.errors import ShortcutError
from shortcut.modeling.editions import OLDEST, edition_of, flat_file, read_template


@dataclass(frozen=True)
class Modeling:
    """A modeling file: its name and text, and the entries of config.json that name it and its classes."""

    file: str
    code: str
    settings: Mapping[str, Any]

    @property
    def oldest(self) -> str:
        """The oldest release of transformers that it works with."""
        return OLDEST[Path(self.file).stem.removeprefix("modeling_")]


@dataclass(frozen=True)
class Hollowing:
    """How an architecture becomes hollow. family: its model_type; config: its config class; auto: the auto class.

    blocks: the path to the list of blocks inside the model; attention, mlp: the modules of a block that only this half
    uses, and how many values each returns, 0 being a tensor alone; by its class where that differs. kept: those that
    stay with either. last_token: whether its blocks can run for the last token of a prompt alone;
    freezes: whether they can leave the tokens of images as they are.
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
    freezes: bool = False

    def half_of(self, rest: str, part: str) -> Literal["attention", "mlp"] | None:
        """To which half a tensor belongs, by its name inside a block; part: what the name alone suggests."""
        head = rest.split(".")[0]
        if head in self.kept:
            return None
        if head in self.attention or head in self.mlp:
            return "attention" if head in self.attention else "mlp"
        return "attention" if part == "attention" else "mlp" if part == "mlp" else None

    @cached_property
    def modeling(self) -> Modeling:
        """The modeling file and the entries of config.json that name it, where blocks have lost halves."""
        halves = "".join(
            f'    "{half}": {json.dumps(dict(modules))},\n'
            for half, modules in (("attention", self.attention), ("mlp", self.mlp))
        )
        text = re.sub(
            r"(?<=HALVES = \{\n).*?(?=\}\n)", lambda _: halves, read_template("hollow"), count=1, flags=re.DOTALL
        )
        names = ("llama", "Llama", "LlamaConfig", "LlamaForCausalLM", "model.layers")
        return self._modeling("hollow", self._named(text, *names))

    @cached_property
    def freezing(self) -> Modeling:
        """The modeling file and the entries of config.json that name it, where blocks leave images as they are."""
        names = ("llava", "LLaVA", "LlavaConfig", "LlavaForConditionalGeneration", "model.language_model.layers")
        return self._modeling("shortv", self._named(read_template("shortv"), *names))

    def _modeling(self, kind: str, text: str) -> Modeling:
        classes = (kind.capitalize() + name for name in (self.config, self.architecture))
        settings = _settings(f"{kind}_{self.family}", f"modeling_{kind}", self.auto, *classes)
        return Modeling(f"modeling_{kind}.py", flat_file(kind, text), settings)

    def _named(self, text: str, family: str, title: str, config: str, architecture: str, blocks: str) -> str:
        """A modeling file with the names of this architecture in the place of those."""
        text = text.replace(f'BLOCKS = "{blocks}"', f'BLOCKS = "{self.blocks}"').replace(
            f'"""{title}', f'"""{self.family}'
        )
        text = re.sub(rf'(?<=["_]){family}"', f'{self.family}"', text)
        return text.replace(architecture, self.architecture).replace(config, self.config)


def _settings(family: str, module: str, auto: str, config: str, architecture: str) -> dict[str, Any]:
    auto_map = {"AutoConfig": f"{module}.{config}", auto: f"{module}.{architecture}"}
    return {"model_type": family, "architectures": [architecture], "auto_map": auto_map}


@cache
def decilm() -> Modeling:
    """The modeling file and the entries of config.json that name it, in the layout of DeciLM."""
    names = ("nemotron-nas", "modeling_decilm", "AutoModelForCausalLM", "DeciLMConfig", "DeciLMForCausalLM")
    return Modeling("modeling_decilm.py", flat_file("decilm", read_template("decilm")), _settings(*names))


@cache
def read_hollowings() -> Mapping[tuple[str, str], Hollowing]:
    """All architectures whose hollow checkpoints were found exact, by family and name: families may share one."""
    rows = json.loads(files("shortcut").joinpath("data", "halves.json").read_text(encoding="utf-8"))
    return {(row["family"], row["architecture"]): Hollowing(**{**row, "kept": tuple(row["kept"])}) for row in rows}


def hollowing_of(config: Mapping[str, Any]) -> Hollowing:
    """How the model of a config.json becomes hollow. Raises ShortcutError where that was not found exact."""
    if modeling_of(config) is not None:
        raise ShortcutError("blocks of a hollow checkpoint cannot lose more: carry a plan of all of it out on its base")
    if not can_be_hollow(config):
        family, architecture = _names(config)
        model = f"{architecture} of {family}" if architecture else "a model without architecture"
        raise ShortcutError(f"{model} cannot lose parts of blocks: `shortcut families` lists what can")
    return read_hollowings()[_names(config)]


def can_be_hollow(config: Mapping[str, Any]) -> bool:
    """Whether `hollowing_of` knows the model of a config.json."""
    return _names(config) in read_hollowings() and "auto_map" not in config


def modeling_of(config: Mapping[str, Any]) -> Modeling | None:
    """The modeling file that a checkpoint of this config.json carries; None where it is none of shortcut's."""
    if "auto_map" not in config:
        return None
    hollowing = read_hollowings().get(_names(config, "hollow")) or read_hollowings().get(_names(config, "shortv"))
    known = (hollowing.modeling, hollowing.freezing) if hollowing else (decilm(),)
    return next((modeling for modeling in known if config.get("auto_map") == modeling.settings["auto_map"]), None)


def _names(config: Mapping[str, Any], kind: str = "") -> tuple[str, str]:
    """Family and architecture in a config.json, without what a kind of modeling file puts in front of them."""
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    return str(config.get("model_type")).removeprefix(f"{kind}_"), architecture.removeprefix(kind.capitalize())


def has_own_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the only code that a checkpoint runs is a modeling file of shortcut's, to the letter, in any edition."""
    return _carried(folder, config) is not None


def is_outdated(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the modeling file of a checkpoint is shortcut's own, and no longer the one that it would write."""
    modeling, text = modeling_of(config), _carried(folder, config)
    return modeling is not None and text is not None and text != modeling.code


def _carried(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The modeling file of a checkpoint, where it is shortcut's own."""
    modeling = modeling_of(config)
    if modeling is None or not (folder / modeling.file).is_file():
        return None
    text = (folder / modeling.file).read_text(encoding="utf-8", errors="replace")
    return text if edition_of(text) is not None else None
