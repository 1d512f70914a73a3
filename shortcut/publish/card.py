"""The model card: README.md of the shortened checkpoint."""

from pathlib import Path
from typing import Any

import yaml

from shortcut import __version__
from shortcut.checking.verify import CheckReport
from shortcut.records.blocks import format_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.cut import CutReport
from shortcut.text import format_count, format_size, format_table


def format_card(plan: Plan, cut: CutReport, check: CheckReport, *, picture: bool) -> str:
    """The card's text: YAML front matter for the Hub, then Markdown."""
    on_hub = not Path(plan.base.model).is_absolute()
    name = plan.base.model if on_hub else Path(plan.base.model).stem
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["pruned", "layer-pruning", "shortcut"]}
    if on_hub:
        front |= {"base_model": name, "base_model_relation": "finetune"}
    table = format_table(
        ["", "base", "shortened"],
        [
            ["blocks", plan.base.blocks, len(plan.kept)],
            ["parameters", format_count(cut.parameters_before), format_count(cut.parameters_after)],
            ["bytes", format_size(cut.bytes_before), format_size(cut.bytes_after)],
            ["perplexity", *(f"{value:.2f}" for value in (check.perplexity_base or 0, check.perplexity))],
        ],
    )
    why = plan.why
    rule = f"chosen as `{why['select']}`" if "select" in why else "chosen by hand"
    rule += f" by the metric `{why['metric']}`" if "metric" in why else ""
    drawn = ["![scores of the blocks](scores.png)", ""] if picture else []
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {name}, {len(plan.kept)} of {plan.base.blocks} blocks",
            "",
            f"Blocks {format_blocks(plan.dropped)} of {name} (counted from 0) are deleted, {rule}. Every remaining",
            "tensor is byte for byte the base's; nothing was trained.",
            "",
            "```",
            table,
            "```",
            "",
            f"Perplexity: {check.text}.",
            "",
            *drawn,
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/or/id/of/this/model")',
            'tokenizer = AutoTokenizer.from_pretrained("path/or/id/of/this/model")',
            "```",
            "",
            f"Made by shortcut {__version__}; `plan.yaml`, `scores.json` and `shortcut.json` say how.",
            "",
        ]
    )
