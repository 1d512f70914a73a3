"""report.html: one page that says what was done to a model, why these blocks, and what it costs.

The page is three files beside this one, put together with the records as one JSON document. It loads nothing from
anywhere: what it shows was true when it was written, and opens offline.
"""

import datetime
import html
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from shortcut.checking.samples import Sample
from shortcut.checking.trials import Trials
from shortcut.checking.verify import CheckReport
from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.stage import write_text
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_count, format_size
from shortcut.common.version import __version__
from shortcut.family.anatomy import text_config
from shortcut.family.tasks import find_task
from shortcut.publish.card import loading_code, say_what_goes
from shortcut.publish.plots import TITLES, goes
from shortcut.records.actions import Action
from shortcut.records.plan import Plan, format_plan
from shortcut.records.scores import Scores
from shortcut.scoring.metrics import METRICS
from shortcut.surgery.savings import cache_per_token, prefill

Columns = Mapping[str, Mapping[str, float | str]]  # by model, what was counted and measured, by name
PROMPT = (64, 576)  # tokens of text and of one image, whose operations are counted
_FORMS: dict[str, Any] = {
    "parameters": format_count,
    "bytes": format_size,
    "KV cache per token": format_size,
    "FLOPs of a prompt": format_count,
    "perplexity": "{:.2f}".format,
    "largest difference of logits": "{:.3g}".format,
    "right answers": "{:.1%}".format,
    "answers like the base's": "{:.1%}".format,
    "questions right": "{:.1%}".format,
    "prompt tokens/s": "{:.0f}".format,
    "new tokens/s": "{:.1f}".format,
}
_NOTES = {
    "KV cache per token": "in half precision",
    "FLOPs of a prompt": f"of {PROMPT[0]} tokens of text and {PROMPT[1]} of an image, all attending to all",
    "largest difference of logits": "from those of the base with the same done to it in memory",
}
_QUALITY = {"perplexity", "right answers", "prompt tokens/s", "new tokens/s"}  # shown at a glance
_SIZES = {"blocks", "parameters", "KV cache per token", "FLOPs of a prompt"}  # so too where they differ from the base's
_RULES = {
    "lowest": "those that score lowest",
    "span": "the span that scores lowest",
    "deepest": "the deepest but the last",
    "spaced": "those between blocks that are spread evenly",
    "greedy": "one by one the lowest, with the rest scored again each time",
}


@dataclass(frozen=True)
class Report:
    """What the page shows. how: plain data: how it was made, what it was measured on, and how it is loaded."""

    plan: Plan
    scores: Scores | None
    trials: Trials | None
    columns: Columns
    samples: tuple[Sample, ...]
    how: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as the page holds it."""
        return {
            "plan": self.plan.to_dict(),
            "scores": None if self.scores is None else self.scores.to_dict(),
            "trials": None if self.trials is None else self.trials.to_dict(),
            "columns": {name: dict(column) for name, column in self.columns.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "how": dict(self.how),
        }

    def measured(self, found: Columns) -> "Report":
        """The same with more rows in the table of models."""
        columns = {name: {**column, **found.get(name, {})} for name, column in self.columns.items()}
        return replace(self, columns=columns)


def make_report(
    base: Checkpoint,
    plan: Plan,
    made: Mapping[str, Checkpoint],
    check: CheckReport,
    *,
    scores: Scores | None = None,
    trials: Trials | None = None,
    command: str = "",
    changes: Sequence[str] = (),
) -> Report:
    """Gather what the page shows. made: by name, what was made of the base; the last is the one that was checked.

    command: the line that makes it again. changes: what was done to it beyond the plan, for people.
    """
    whole = Plan.dropping(plan.base, ())
    columns: dict[str, dict[str, float | str]] = {"base": _count(base, base, whole)}
    columns |= {name: _count(checkpoint, base, plan) for name, checkpoint in made.items()}
    own = list(made)[-1]
    for column, row, value in _operations(base, plan, own):
        columns[column][row] = value
    for name, before, after in check.rows:  # as text, whatever is measured; what is known as numbers comes next
        columns["base"] |= {str(name): str(before)} if before else {}
        columns[own][str(name)] = str(after)
    for column, row, value in _exact(check, own):
        columns[column][row] = value
    how = {
        "command": command,
        "code": loading_code(made[own], check.checkpoint),
        "text": check.text,
        "changes": list(changes),
        "made": _surroundings(),
    }
    return Report(plan, scores, trials, columns, check.samples, how)


def write_report(path: Path, report: Report) -> None:
    """Write the page: one HTML file that needs no other. Raises ShortcutError where it cannot be written."""
    here, data = files("shortcut.publish"), json.dumps({**report.to_dict(), "view": _view(report)})
    parts = {
        "title": html.escape(_title(report)),
        "style": here.joinpath("report.css").read_text(encoding="utf-8"),
        "script": here.joinpath("report.js").read_text(encoding="utf-8"),
        # No text of a model, a prompt or a path can end the script element: it holds no angle bracket.
        "data": data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    }
    page = here.joinpath("report.html").read_text(encoding="utf-8")
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page))


def _count(checkpoint: Checkpoint, base: Checkpoint, plan: Plan) -> dict[str, float | str]:
    """What a checkpoint holds, by its headers, and what the plan that made it of the base saves when it runs."""
    found: dict[str, float | str] = {"blocks": len(plan.kept)}
    found |= {"parameters": checkpoint.parameters, "bytes": checkpoint.size}
    cache = cache_per_token(base, plan) if find_task(base.config).gives == "next tokens" else None
    return found if cache is None else found | {"KV cache per token": cache}


def _exact(check: CheckReport, own: str) -> list[tuple[str, str, float]]:
    """What was measured, as numbers: the column, the row and the value."""
    found = [("base", "perplexity", check.perplexity_base), (own, "perplexity", check.perplexity)]
    if check.answers is not None:
        found += [("base", "right answers", check.answers.right_base), (own, "right answers", check.answers.right)]
        found += [(own, "answers like the base's", check.answers.same)]
    if check.agreement is not None:
        found += [(own, *check.agreement)]
    found += [(own, "largest difference of logits", check.logit_difference)]
    return [(column, row, value) for column, row, value in found if value is not None]


def _operations(base: Checkpoint, plan: Plan, own: str) -> list[tuple[str, str, float]]:
    """What freezing images saves of a prompt with one, as `_exact`; nothing where the config does not tell."""
    if not plan.frozen or plan.dropped:
        return []
    try:
        found = prefill(text_config(base.config)[1], plan.frozen, *PROMPT)
    except ShortcutError:
        return []
    return [("base", "FLOPs of a prompt", found.dense), (own, "FLOPs of a prompt", found.frozen)]


def _surroundings() -> dict[str, str]:
    """Where and when, without the name of the machine."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, no GPU"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "shortcut": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "Python": platform.python_version(),
        "machine": f"{platform.system()}, {device}, {torch.get_num_threads()} threads",
    }


def _view(report: Report) -> dict[str, Any]:
    """What the page needs beside the records: texts, and numbers as people read them."""
    plan, table = report.plan, _table(report)
    return {
        "title": _title(report),
        "lead": _lead(report),
        "actions": plan.actions,
        "panels": [] if report.scores is None else _panels(report.scores, plan),
        "glance": [row for row in table if row["name"] in _QUALITY or (row["name"] in _SIZES and row["change"])],
        "table": table,
        "trials": None if report.trials is None else _trials(report.trials),
        "yaml": format_plan(plan),
        "links": ["plan.yaml", *(["scores.json"] if report.scores is not None else [])],
    }


def _title(report: Report) -> str:
    plan = report.plan
    stack = "" if plan.base.stack == "decoder" else f"{plan.base.stack} "
    what = [f"{len(plan.kept)} of {plan.base.blocks} {stack}blocks"]
    what += [f"{len(plan.hollow)} of them halved"] if plan.hollow else []
    what += [f"images frozen in {len(plan.frozen)}"] if plan.frozen else []
    return f"{plan.base.title}: {', '.join(what)}"


def _lead(report: Report) -> str:
    """One or two sentences: what was done, and why these blocks."""
    why, plan = report.plan.why, report.plan
    gone = re.sub(r" \(`.*?`\)", "", say_what_goes(plan).partition(";")[0])
    gone = re.sub(r"(\d),(\d)", r"\1, \2", gone)
    rule = _RULES.get(str(why.get("select")), "chosen by hand")
    by = " per parameter" if "," in str(why.get("allow")) and why.get("select") in ("lowest", "greedy") else ""
    by += f" by {why['metric']}" if "metric" in why else ""
    on = f", on {_say_text(why['calibration'])}" if why.get("calibration") else ""
    exact = "" if report.how["changes"] else " What remains is the base's, byte for byte: nothing was trained."
    return f"Blocks {gone}: {rule}{by}{on}.{exact}"


def _say_text(record: Mapping[str, Any]) -> str:
    """What blocks were scored on, by the record of a calibration set, which anybody may have written."""
    reads = record.get("reads") or []
    what = "sequences" if "length" in record else "questions"
    length = f" of {record['length']} tokens" if "length" in record else ""
    if reads:
        what, length = "examples", f" of {' and '.join(map(str, reads))}"
    prose = "made-up sounds" if "audio" in reads else "drawings that come" if "image" in reads else "prose that comes"
    source = {"default": f"{prose} with shortcut", "drawings": "drawings that come with shortcut"}
    data = str(record.get("data", "unknown text"))
    return f"{record.get('samples', 'some')} {what}{length} ({source.get(data, data)})"


def _panels(scores: Scores, plan: Plan) -> list[dict[str, Any]]:
    """What single blocks score by every metric, with the blocks marked that lose what was scored."""
    whole: list[Action] = ["drop"] if scores.metrics else []
    return [
        {
            "name": ", ".join([name, *([TITLES[part]] if part in TITLES else [])]),
            "formula": METRICS[name].formula if name in METRICS else "",
            "values": scores.of_blocks(name, part),
            "marked": [block for block, own in enumerate(plan.actions) if goes(part, own)],
            "spans": scores.metrics[name] if part == "drop" and isinstance(scores.metrics[name][0], tuple) else None,
        }
        for part in [*whole, *scores.halves]
        for name in scores.names
    ]


def _trials(trials: Trials) -> dict[str, Any]:
    """The plans that were tried, a row of texts each, the whole model first; best: the one that was carried out."""
    whole, *rows = trials.table()[1:]
    rows = [
        [select, metric, dropped, format_count(int(size)), price] for select, metric, _, dropped, size, price in rows
    ]
    return {"best": trials.best, "rows": [["whole model", "", "nothing", format_count(int(whole[4])), whole[5]], *rows]}


def _table(report: Report) -> list[dict[str, Any]]:
    """Rows of the table of models: name, note, a text for every model, and how the last differs from the base."""
    names = dict.fromkeys(name for column in report.columns.values() for name in column)
    rows = []
    for name in names:
        values = [column.get(name) for column in report.columns.values()]
        form = _FORMS.get(name, "{:.4g}".format)
        texts = ["" if value is None else value if isinstance(value, str) else form(value) for value in values]
        change, (first, last) = "", (values[0], values[-1])
        if isinstance(first, int | float) and isinstance(last, int | float) and first != last and first:
            points = name in ("right answers", "questions right")
            change = f"{100 * (last - first):+.1f} points" if points else f"{last / first - 1:+.1%}"
        rows.append({"name": name, "note": _NOTES.get(name, ""), "texts": texts, "change": change.replace("-", "−")})
    return rows
