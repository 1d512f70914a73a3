"""Half-blocks on disk: which tensors go, and the config and modeling file that build what is left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortcut.anatomy import part_of
from shortcut.modeling.hollowing import MODELING_FILE, hollowing_of
from shortcut.records.actions import GONE
from shortcut.records.plan import Plan
from shortcut.surgery.checkpoint import Checkpoint


def gone_by_half(checkpoint: Checkpoint, plan: Plan) -> set[str]:
    """The names of tensors that go because half of their block does. Raises ShortcutError as `hollowing_of` does."""
    if not plan.hollow:
        return set()
    halves = hollowing_of(checkpoint.config)

    def goes(name: str) -> bool:
        block, rest = checkpoint.anatomy.split(name) or (-1, "")
        return block in plan.hollow and halves.half_of(rest, part_of(rest)) in GONE[plan.actions[block]]

    return set(filter(goes, checkpoint.tensors))


def hollow_config(config: dict[str, Any], checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The config of a shortened model whose blocks are to be hollow as well."""
    if not plan.hollow:
        return config
    config = config | hollowing_of(checkpoint.config).settings()
    text = config
    for key in checkpoint.anatomy.config_path:
        text[key] = dict(text[key])
        text = text[key]
    skipped = {str(new): sorted(GONE[plan.actions[old]]) for new, old in enumerate(plan.kept)}
    text["per_layer_config"] = {block: {"skip": halves} for block, halves in skipped.items() if halves}
    return config


def write_modeling_file(folder: Path, base: Mapping[str, Any]) -> None:
    """Put beside the weights the code that a hollow checkpoint of this base runs."""
    (folder / MODELING_FILE).write_text(hollowing_of(base).code, encoding="utf-8")
