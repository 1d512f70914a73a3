"""Writes a checkpoint of every kind, and beside it the inputs and answers that every release has to repeat.

The answers are those of the written checkpoint, in float32 and with the installed transformers; they count only if the
base under `shortcut.preview` gives the same.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import shortcut
from shortcut.checkpoint.open import embedded_model, open_model
from shortcut.records.plan import Plan
from tests import vision
from tests.conftest import VOCABULARY, make_model
from tests.matrix.probe import answer, load

SMALL = ("llama", "qwen3", "gemma3_text", "gpt2", "mixtral")
REAL = "SmolLM2"
TEXTS = ("The capital of France is", "Water boils at a hundred degrees, and it freezes when it gets colder than")
PREVIEWED = 1e-5  # of the largest logit


@dataclass(frozen=True)
class Kind:
    """A way of cutting. moves: options of `shortcut.cut`; code: whether the result carries a modeling file."""

    name: str
    moves: Mapping[str, str]
    families: tuple[str, ...] = (*SMALL, REAL)
    code: bool = True
    changes: Mapping[str, int] = field(default_factory=dict)  # of the config of tiny models


# No block named here is the first of its kind, sliding or full, where families have both, unless it says 0.
KINDS = (
    Kind("drop", {"drop": "1,4"}, code=False),
    Kind("zeroed", {"attention_only": "2", "mlp_only": "4", "format": "zeroed"}, code=False),
    Kind("halves", {"attention_only": "2", "mlp_only": "4"}),
    Kind("mlp-only 0", {"mlp_only": "0"}, SMALL),
    Kind("last-token", {"last_token": "2-4"}),
    Kind(
        "decilm",
        {"attention_only": "2", "mlp_only": "4", "format": "decilm"},
        ("llama", REAL),
        changes={"hidden_size": 48, "intermediate_size": 256},
    ),
    Kind("frozen images", {"freeze_visual": "0,2-3,5"}, ("tiny-llava", "qwen2_vl")),
)


def write_all(work: Path, only: str = "", *, reuse: bool = False) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write the checkpoints whose name holds this text; gives their folders, and what stands beside them as JSON.

    reuse: whether to take those that are there already.
    """
    for kind in KINDS:
        for family in kind.families:
            folder = work / "checkpoints" / f"{kind.name}-{family}".replace(" ", "-")
            told = folder.with_suffix(".json")
            if only not in folder.name:
                continue
            there = reuse and told.exists()
            yield folder, json.loads(told.read_text()) if there else write_one(kind, family, work / "bases", folder)


def write_one(kind: Kind, family: str, bases: Path, folder: Path) -> dict[str, Any]:
    """Write one checkpoint, with its inputs and answers. Raises AssertionError where these cannot be right."""
    base = base_of(family, bases, kind.changes)
    plan = shortcut.cut(base, folder, **kind.moves, overwrite=True, quiet=True).plan
    sees = "freeze_visual" in kind.moves
    auto = "AutoModelForImageTextToText" if sees else "AutoModelForCausalLM"
    how = {"kind": kind.name, "family": family.removesuffix("_text"), "code": kind.code, "auto": auto}
    whole = load(base, {**how, "code": False})
    how["silent"] = sorted(special_ids(whole.config).values()) if sees else []
    inputs = image_inputs(family, whole) if sees else text_inputs(family, base)
    answers = answer(load(folder, how), inputs, how["silent"])
    torch.testing.assert_close(answers["cached"], answers["uncached"])
    check(answers["logits"], whole, plan, inputs)
    noted = {**{f"inputs.{name}": each for name, each in inputs.items()}, **answers}
    save_file({name: each.contiguous() for name, each in noted.items()}, folder.with_suffix(".safetensors"))
    folder.with_suffix(".json").write_text(json.dumps(how))
    return how


def check(logits: Tensor, base: Any, plan: Plan, inputs: Mapping[str, Tensor]) -> None:
    """Compare the logits of a checkpoint with those of its base, as if it were cut."""
    with shortcut.preview(base, plan), torch.no_grad():
        expected = base(**inputs, use_cache=False).logits
    real = inputs["attention_mask"].bool()
    tolerance = PREVIEWED * expected[real].abs().max().item()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=tolerance)


def base_of(family: str, bases: Path, changes: Mapping[str, int]) -> Path:
    """The folder of a model that is to be cut; tiny random ones are made here."""
    if family in (REAL, "tiny-llava"):
        return open_model(embedded_model() if family == REAL else family, quiet=True).folder
    folder = bases / "-".join([family, *(str(size) for size in changes.values())])
    if family in vision.FAMILIES:
        model = vision.make_vision_model(vision.FAMILIES[family])
    else:
        model = make_model(family, **changes)
    model.save_pretrained(folder)
    return folder


def text_inputs(family: str, base: Path) -> dict[str, Tensor]:
    """Two prompts of different lengths, padded on the left."""
    if family == REAL:
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        return dict(tokenizer(list(TEXTS), return_tensors="pt", padding=True))
    ids = torch.randint(4, VOCABULARY - 3, (2, 13), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def image_inputs(family: str, model: Any) -> dict[str, Tensor]:
    """Two prompts of different lengths with one image in each, padded on the left.

    Older releases find images by the token in front of them, where a family has one.
    """
    kind = vision.FAMILIES["llava" if family == "tiny-llava" else family]
    inputs = vision.make_inputs(model, kind, [[4, vision.IMAGE, 5], [2, vision.IMAGE, 3]])
    start = special_ids(model.config).get("vision_start_token_id")
    if start is not None:
        for row in inputs["input_ids"]:
            row[(row == vision.image_id(model)).nonzero()[0] - 1] = start
    return inputs


def special_ids(config: Any) -> dict[str, int]:
    """The ids in a config that speak of images and videos, by their names."""
    named = re.compile(r"(image|video|vision)_(.*_)?token_(id|index)")
    return {name: each for name, each in config.to_dict().items() if isinstance(each, int) and named.fullmatch(name)}
