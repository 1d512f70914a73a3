"""The model card: README.md of the shortened checkpoint, from its own record and what the check measured."""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from shortcut.checking.verify import CheckReport
from shortcut.checkpoint.checkpoint import Checkpoint, read_json
from shortcut.checkpoint.modules import MODULES
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_count, format_size, format_table
from shortcut.common.version import __version__
from shortcut.family.halves import modeling_of
from shortcut.family.tasks import find_task
from shortcut.publish.results import evaluation_table
from shortcut.records.actions import LISTED, Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan

CARD = "README.md"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
PLACEHOLDER = "path/or/id/of/this/model"
_BODY = """\

# {name}, {kept} of {depth} {stack}blocks

Of the {stack}blocks of {link}, counted from 0, {gone}.
{rest}

```
{table}
```

{measured} on {text}.
It loads without a missing or unexpected key.
Its logits differ from those of the base, with the same done to its blocks in memory{healed}, by {difference} at most.

{evaluated}{picture}```python
{code}
```

The same cut again:

```sh
{command}
```

Made by shortcut {version}; {records} what was done and why.
"""
_EVALUATED = """\
Evaluated by `shortcut eval`, with 95 % intervals; [eval.json](eval.json) says on what:

```
{}
```

"""
_MARK = "<!-- shortcut wrote the text above: {} -->\n"
_FRONT = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")

_GONE: dict[Action, str] = {
    "drop": "{} are deleted",
    "attention-only": "{} have lost their MLP (`attention-only`)",
    "mlp-only": "{} have lost their attention (`mlp-only`)",
    "last-token": "{} are passed by all tokens of a prompt but the last (`last-token`; new tokens do not pass by, so "
    "`generate` keeps its cache there, whatever `use_cache` says)",
    "freeze-visual": "{} leave the tokens of images as they are (`freeze-visual`)",
}


def format_card(
    short: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    check: CheckReport,
    place: str = PLACEHOLDER,
    evaluated: Mapping[str, Any] | None = None,
) -> str:
    """The card's text: YAML front matter for the Hub, then Markdown, then a mark by which changes by hand are known.

    place: where the checkpoint will be loaded from, such as its id on the Hub; evaluated: what `eval` found of it.
    """
    front = yaml.safe_dump(_front(short, base), sort_keys=False, allow_unicode=True)
    body = _body(short, base, plan, check, place, evaluated)
    return f"---\n{front}---\n{body}{_MARK.format(_digest(body))}"


def read_own_card(folder: Path) -> str:
    """The card that a checkpoint has, or nothing. Raises ShortcutError for one that is no text."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise ShortcutError(f"cannot read {folder / CARD}: {error}") from None


def complete_card(own: str, written: str, place: str) -> str:
    """A card that somebody may have changed, brought up to date with one that `format_card` just wrote.

    Entries of the front matter that are there stay as they are, and missing ones are added. The text below is replaced
    where it is what shortcut wrote; what a person wrote stays. Raises ShortcutError for front matter that is no YAML.
    """
    front, body = _split(own)
    new_front, new_body = _split(written)
    there, offered = _entries(front), _entries(new_front)
    other = there.get("license", offered.get("license")) != offered.get("license")  # its name and link go with it
    missing = {k: v for k, v in offered.items() if k not in there and not (other and k.startswith("license"))}
    if missing:
        front = f"{front.rstrip()}\n".lstrip("\n") + yaml.safe_dump(missing, sort_keys=False, allow_unicode=True)
    text, _, mark = body.rpartition("<!-- ")
    untouched = not body.strip() or f"<!-- {mark}" == _MARK.format(_digest(text))
    return f"---\n{front}---\n{new_body if untouched else body.replace(PLACEHOLDER, place)}"


def hub_base(short: Checkpoint, base: Checkpoint) -> str | None:
    """The id of the model on the Hub that a checkpoint comes from, by way of others where it was cut twice."""
    record = read_json(short.folder / RECORD)
    before = [Plan.from_dict(plan, RECORD).base for plan in record.get("lineage", [])]
    return next((origin.model for origin in (base.base, *reversed(before)) if origin.on_hub), None)


def _front(short: Checkpoint, base: Checkpoint) -> dict[str, Any]:
    """What the Hub reads: where the model comes from, and what holds for it as it held for the base."""
    known, origin = _entries_of_base(base.folder), hub_base(short, base)
    front = {key: known[key] for key in _CARRIED if known.get(key)}
    link = front.get("license_link")
    if isinstance(link, str) and "://" not in link and origin is not None and not (short.folder / link).exists():
        front["license_link"] = f"{_address(origin)}/blob/{base.revision or 'main'}/{link}"
    front.setdefault("pipeline_tag", find_task(short.config).pipeline)
    library = "sentence-transformers" if (short.folder / MODULES).exists() else "transformers"
    front |= {"library_name": library, "tags": ["pruned", "layer-pruning", "shortcut"]}
    if origin is not None:
        front |= {"base_model": origin, "base_model_relation": "finetune"}  # of the four that the Hub knows
    return front


def _body(
    short: Checkpoint,
    base: Checkpoint,
    plan: Plan,
    check: CheckReport,
    place: str,
    evaluated: Mapping[str, Any] | None,
) -> str:
    name = base.base.title
    rows: list[list[object]] = [
        ["blocks", plan.base.blocks, len(plan.kept)],
        ["parameters", format_count(base.parameters), format_count(short.parameters)],
        ["bytes", format_size(base.size), format_size(short.size)],
        *check.rows,
    ]
    records = [file for file in ("plan.yaml", "scores.json", RECORD) if (short.folder / file).exists()]
    return _BODY.format(
        name=name,
        stack="" if plan.base.stack == "decoder" else f"{plan.base.stack} ",
        link=f"[{name}]({_address(name)})" if base.base.on_hub else name,
        kept=len(plan.kept),
        depth=plan.base.blocks,
        gone=say_what_goes(plan),
        rest=_rest(short, check),
        table=format_table(["", "base", "healed" if check.healed else "shortened"], rows),
        measured="Perplexity" if check.perplexity is not None else "Answers" if check.answers else "Compared",
        text=check.text,
        healed=" and the healed weights in it" if check.healed else "",
        difference=format(check.logit_difference or 0, ".3g"),
        evaluated="" if evaluated is None else _EVALUATED.format(evaluation_table(evaluated)),
        picture="![scores of the blocks](scores.png)\n\n" if (short.folder / "scores.png").exists() else "",
        code=loading_code(short, place),
        command=_command(base, plan),
        version=__version__,
        records=", ".join(f"[{file}]({file})" for file in records) + (" say" if len(records) > 1 else " says"),
    )


def say_what_goes(plan: Plan) -> str:
    """What happens to which blocks, and how they were chosen; Markdown."""
    why = plan.why
    gone = [text.format(format_blocks(plan.blocks(action))) for action, text in _GONE.items() if plan.blocks(action)]
    rule = f"chosen as `{why['select']}`" if "select" in why else "chosen by hand"
    return f"{' and '.join(gone)}; {rule}" + (f" by the metric `{why['metric']}`" if "metric" in why else "")


def loading_code(short: Checkpoint, place: str) -> str:
    """The Python that loads a shortened checkpoint with transformers. place: where from, a folder or an id."""
    auto, quoted = find_task(short.config).auto, json.dumps(place, ensure_ascii=False)
    if (short.folder / MODULES).exists():
        return f"from sentence_transformers import SentenceTransformer\n\nmodel = SentenceTransformer({quoted})"
    reader, trust = _reader_of(short), "auto_map" in short.config
    trusts = [
        ", trust_remote_code=True" if each else ""
        for each in (trust, trust and (reader != "AutoTokenizer" or _has_own_tokenizer(short.folder)))
    ]
    modeling = modeling_of(short.config)
    needs = f"  # {modeling.oldest} or newer" if modeling else ""
    return f"""\
from transformers import {auto}, {reader}{needs}

model = {auto}.from_pretrained({quoted}{trusts[0]})
{"tokenizer" if reader == "AutoTokenizer" else "processor"} = {reader}.from_pretrained({quoted}{trusts[1]})"""


def _rest(short: Checkpoint, check: CheckReport) -> str:
    """What became of the tensors that are left."""
    if not check.healed:
        return "Every remaining tensor is byte for byte the base's; nothing was trained."
    steps = read_json(short.folder / RECORD)["healed"].get("steps", [])
    how = ", then ".join(f"`{step['method']}`" for step in steps if isinstance(step, dict) and "method" in step)
    many = len(check.healed)
    return f"Then it was healed by {how}: {many} tensors have new values, and every other one is the base's."


def _command(base: Checkpoint, plan: Plan) -> str:
    """The command line that cuts the same blocks from the same base."""
    words = [f"shortcut cut {shlex.quote(base.base.title)} OUT"]
    words += [f"--{action} {format_blocks(plan.blocks(action))}" for action in LISTED if plan.blocks(action)]
    words += [f"--stack {plan.base.stack}"] if plan.base.stack != "decoder" else []
    words += [f"--format {plan.format}"] if plan.format != "custom" else []
    words += ["--keep-mtp"] if plan.keeps_heads else []
    words += [f"--revision {base.revision}"] if base.revision is not None else []
    words += ["--trust-remote-code"] if "auto_map" in base.config else []
    return " ".join(words)


def _reader_of(short: Checkpoint) -> str:
    """The auto class of transformers that makes inputs for a checkpoint, by the files that came along."""
    made = [read_json(path) for path in map(short.folder.joinpath, PROCESSORS) if path.exists()]
    if not made or find_task(short.config).reads == "text":
        return "AutoTokenizer"
    if any((short.folder / name).exists() for name in TOKENIZERS):
        return "AutoProcessor"
    return "AutoImageProcessor" if "image_processor_type" in made[0] else "AutoFeatureExtractor"


def _has_own_tokenizer(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.exists() and "auto_map" in read_json(path)


def _address(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _split(card: str) -> tuple[str, str]:
    """The YAML of a card's front matter, and the text below it."""
    match = _FRONT.match(card)
    return (match[1], card[match.end() :]) if match else ("", card)


def _entries_of_base(folder: Path) -> Mapping[str, Any]:
    """The front matter of the base's card, where there is one that can be read."""
    try:
        return _entries(_split(read_own_card(folder))[0])
    except ShortcutError:
        return {}


def _entries(front: str) -> Mapping[str, Any]:
    """The entries of front matter, all as text: to YAML 1.1, the language `no` is a way to say false.

    Raises ShortcutError for what is no YAML.
    """
    try:
        entries = yaml.load(front, Loader=yaml.BaseLoader) or {}  # makes text, lists and mappings alone
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, dict):
        raise ShortcutError(f"the front matter of {CARD} is not YAML that the Hub reads: mend it, or remove {CARD}")
    return entries
