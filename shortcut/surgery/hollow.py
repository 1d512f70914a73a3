"""Blocks of another kind on disk: which tensors go, and the config and modeling file that build what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.tensors import FLOATS, Tensor
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import part_of, visual_tokens
from shortcut.family.halves import hollowing_of, modeling_of
from shortcut.records.actions import GONE
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.decilm import decilm_config, llama_settings

WITHOUT_KEYS = {"linear_attention", "conv", "moe", "mlp"}  # kinds of blocks


def gone_by_half(checkpoint: Checkpoint, plan: Plan) -> set[str]:
    """The names of tensors that go because half of their block does. Raises ShortcutError where the format cannot."""
    if not plan.hollow:
        return set()
    halves = hollowing_of(checkpoint.config)
    if plan.format == "decilm":
        llama_settings(checkpoint)

    def goes(name: str) -> bool:
        block, rest = checkpoint.anatomy.split(name) or (-1, "")
        return block in plan.hollow and halves.half_of(rest, part_of(rest)) in GONE[plan.actions[block]]

    return set(filter(goes, checkpoint.tensors))


def blanked(tensor: Tensor) -> Tensor:
    """The tensor with zeros in the place of its bytes. Raises ShortcutError where that is not the number zero."""
    if tensor.dtype not in FLOATS:
        raise ShortcutError(f"cannot zero {tensor.name}, which is quantised ({tensor.dtype}): use --format custom")
    return replace(tensor, blank=True)


def hollow_config(config: dict[str, Any], checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The config of a shortened model whose blocks are to be hollow or frozen as well."""
    if not plan.needs_code:
        return config
    if plan.format == "decilm":
        return decilm_config(config, checkpoint, plan)
    hollowing = hollowing_of(checkpoint.config)
    if plan.frozen:
        from shortcut.live.load import load_config

        check_frozen(checkpoint.config, load_config(checkpoint.config), plan)
        blocks = [new for new, old in enumerate(plan.kept) if old in plan.frozen]
        shortv = {"blocks": blocks, "token_ids": list(visual_tokens(checkpoint.config))}
        return {**config, **hollowing.freezing.settings, "shortv": shortv}
    if plan.blocks("last-token") and not hollowing.last_token:
        raise ShortcutError(f"{hollowing.architecture} cannot run blocks for the last token of a prompt alone")
    config = {**config, **hollowing.modeling.settings}
    text = config
    for key in checkpoint.anatomy.config_path:
        text[key] = dict(text[key])
        text = text[key]
    layers: dict[str, Any] = {}
    for new, old in enumerate(plan.kept):
        if plan.actions[old] == "last-token":
            layers[str(new)] = {"prefill": "last"}
        elif halves := sorted(GONE[plan.actions[old]]):
            layers[str(new)] = {"skip": halves}
    if plan.blocks("last-token"):
        text["prefill"] = "all"  # what layers without an entry of their own do
    text["per_layer_config"] = layers
    return config


def renumber_frozen(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config with the frozen blocks of a plan before, where there are any, by their numbers among the kept ones."""
    shortv = config.get("shortv")
    if not isinstance(shortv, dict) or not isinstance(frozen := shortv.get("blocks"), list):
        return config
    return {**config, "shortv": {**shortv, "blocks": [new for new, old in enumerate(kept) if old in frozen]}}


def check_frozen(content: Mapping[str, Any], config: Any, plan: Plan) -> None:
    """Raise ShortcutError where a block that is to be frozen cannot leave the tokens of images as they are.

    content: of config.json; config: what transformers makes of it.
    """
    architecture = check_freezes(content)
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ()
    for block, kind in enumerate(kinds):
        if block in plan.frozen and kind in WITHOUT_KEYS:
            able = format_blocks([block for block, kind in enumerate(kinds) if kind not in WITHOUT_KEYS])
            fault = f"it is {kind} and stores no keys and values of images; blocks {able} do"
            raise ShortcutError(f"cannot freeze block {block} of {architecture}: {fault}")


def check_freezes(content: Mapping[str, Any]) -> str:
    """The architecture of a config.json. Raises ShortcutError where no block of it can leave images as they are."""
    visual_tokens(content)
    hollowing = hollowing_of(content)
    if not hollowing.freezes:
        raise ShortcutError(f"{hollowing.architecture} cannot leave the tokens of images as they are in blocks")
    return hollowing.architecture


def write_modeling_file(folder: Path, config: Mapping[str, Any]) -> None:
    """Put beside the weights the code that a checkpoint of this config, from `hollow_config`, runs."""
    if modeling := modeling_of(config):
        (folder / modeling.file).write_text(modeling.code, encoding="utf-8")
