"""The model card: README.md of the shortened checkpoint."""

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

Of the blocks of {name}, counted from 0, {gone}; {rule}. Every remaining tensor is byte for byte the
base's; nothing was trained.

```
{table}
```

{measured} on {text}.

{picture}```python
from transformers import {auto}, {reader}

model = {auto}.from_pretrained("path/or/id/of/this/model"{trust})
{reads} = {reader}.from_pretrained("path/or/id/of/this/model"{reader_trust})
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
    on_hub = not Path(plan.base.model).is_absolute()
    name = plan.base.model if on_hub else Path(plan.base.model).stem
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["pruned", "layer-pruning", "shortcut"]}
    if on_hub:
        front |= {"base_model": name, "base_model_relation": "finetune"}
    rows: list[list[object]] = [
        ["blocks", plan.base.blocks, len(plan.kept)],
        ["parameters", format_count(cut.parameters_before), format_count(cut.parameters_after)],
        ["bytes", format_size(cut.bytes_before), format_size(cut.bytes_after)],
        *check.rows,
    ]
    trust, sees = ", trust_remote_code=True" if plan.needs_code else "", check.answers is not None
    why = plan.why
    rule = f"chosen as `{why['select']}`" if "select" in why else "chosen by hand"
    gone = [text.format(format_blocks(plan.blocks(action))) for action, text in _GONE.items() if plan.blocks(action)]
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=name,
        kept=len(plan.kept),
        depth=plan.base.blocks,
        gone=" and ".join(gone),
        auto="AutoModelForImageTextToText" if sees else "AutoModelForCausalLM",
        reader="AutoProcessor" if sees else "AutoTokenizer",
        reads="processor" if sees else "tokenizer",
        trust=trust,
        reader_trust=trust if sees else "",
        rule=rule + (f" by the metric `{why['metric']}`" if "metric" in why else ""),
        table=format_table(["", "base", "shortened"], rows),
        measured="Answers" if sees else "Perplexity",
        text=check.text,
        picture="![scores of the blocks](scores.png)\n\n" if picture else "",
        version=__version__,
    )
