"""The model card: README.md of the shortened checkpoint."""

import json
from pathlib import Path
from typing import Any

import yaml

from shortcut import __version__
from shortcut.checking.verify import CheckReport
from shortcut.records.actions import Action
from shortcut.records.blocks import format_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.cut import CutReport
from shortcut.text import format_count, format_size, format_table

_CARD = """\
---
{front}
---

# {name}, {kept} of {depth} blocks

Of the blocks of {name}, counted from 0, {gone}. Every remaining tensor is byte for byte the
base's; nothing was trained.

```
{table}
```

{measured} on {text}.

{picture}```python
{code}
```

Made by shortcut {version}; `plan.yaml` and `shortcut.json` say how.
"""


_GONE: dict[Action, str] = {
    "drop": "{} are deleted",
    "attention-only": "{} have lost their MLP (`attention-only`)",
    "mlp-only": "{} have lost their attention (`mlp-only`)",
    "last-token": "{} are passed by all tokens of a prompt but the last (`last-token`)",
    "freeze-visual": "{} leave the tokens of images as they are (`freeze-visual`)",
}


def format_card(plan: Plan, cut: CutReport, check: CheckReport, *, picture: bool) -> str:
    """The card's text: YAML front matter for the Hub, then Markdown."""
    name, on_hub = name_base(plan), not Path(plan.base.model).is_absolute()
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["pruned", "layer-pruning", "shortcut"]}
    if on_hub:
        front |= {"base_model": name, "base_model_relation": "finetune"}
    rows: list[list[object]] = [
        ["blocks", plan.base.blocks, len(plan.kept)],
        ["parameters", format_count(cut.parameters_before), format_count(cut.parameters_after)],
        ["bytes", format_size(cut.bytes_before), format_size(cut.bytes_after)],
        *check.rows,
    ]
    sees = check.answers is not None
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=name,
        kept=len(plan.kept),
        depth=plan.base.blocks,
        gone=say_what_goes(plan),
        code=loading_code(plan, "path/or/id/of/this/model", sees=sees),
        table=format_table(["", "base", "shortened"], rows),
        measured="Answers" if sees else "Perplexity",
        text=check.text,
        picture="![scores of the blocks](scores.png)\n\n" if picture else "",
        version=__version__,
    )


def name_base(plan: Plan) -> str:
    """What people call the base: its id on the Hub, or the name of its folder or file."""
    return Path(plan.base.model).stem if Path(plan.base.model).is_absolute() else plan.base.model


def say_what_goes(plan: Plan) -> str:
    """What happens to which blocks, and how they were chosen; Markdown."""
    why = plan.why
    gone = [text.format(format_blocks(plan.blocks(action))) for action, text in _GONE.items() if plan.blocks(action)]
    rule = f"chosen as `{why['select']}`" if "select" in why else "chosen by hand"
    return f"{' and '.join(gone)}; {rule}" + (f" by the metric `{why['metric']}`" if "metric" in why else "")


def loading_code(plan: Plan, place: str, *, sees: bool) -> str:
    """The Python that loads the result with transformers; sees: whether it is asked about images."""
    auto, reader = ("ImageTextToText", "AutoProcessor") if sees else ("CausalLM", "AutoTokenizer")
    trust = ", trust_remote_code=True" if plan.needs_code else ""
    quoted = json.dumps(place, ensure_ascii=False)
    return f"""\
from transformers import AutoModelFor{auto}, {reader}

model = AutoModelFor{auto}.from_pretrained({quoted}{trust})
{reader.removeprefix("Auto").lower()} = {reader}.from_pretrained({quoted}{trust if sees else ""})"""
