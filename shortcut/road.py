"""The whole road in one call: score, plan, cut, check; by `prune`."""

import importlib.util
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import commands, healing, runs
from shortcut.arguments import spell_out
from shortcut.choose.rules import parse_rules
from shortcut.errors import ShortcutError
from shortcut.presets import PresetName, with_presets
from shortcut.progress import byte_bar, say
from shortcut.records.actions import parse_actions
from shortcut.records.plan import Format, format_plan
from shortcut.records.scores import Average, Scores, format_scores
from shortcut.scoring.documents import Source
from shortcut.selection import Request, select_plan
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.config import check_family
from shortcut.surgery.cut import CutReport, report_cut, shorten_config, write_checkpoint
from shortcut.surgery.hollow import check_freezes
from shortcut.surgery.stage import check_target, staged, write_text
from shortcut.text import parse_size

if TYPE_CHECKING:
    from shortcut.checking.verify import CheckReport
    from shortcut.choose.trials import Trials
    from shortcut.publish.healed import HealReport
    from shortcut.publish.report import Report


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did: scores (None where none were needed), plans tried where there were several, cut and check.

    page: what report.html shows of it; healed: what `heal` made of it, where that was asked for.
    """

    scores: Scores | None
    trials: "Trials | None"
    cut: CutReport
    check: "CheckReport"
    page: "Report"
    healed: "HealReport | None" = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        scores = None if self.scores is None else self.scores.to_dict()
        trials = None if self.trials is None else self.trials.to_dict()
        healed = None if self.healed is None else self.healed.to_dict()
        found = {"scores": scores, "trials": trials, "cut": self.cut.to_dict(), "check": self.check.to_dict()}
        return {**found, "healed": healed}

    def made_by(self, command: str, out: Path) -> "PruneReport":
        """The same, with the page in OUT saying that this command makes it again."""
        from shortcut.publish.report import write_report

        page = replace(self.page, how={**self.page.how, "command": command})
        write_report(out / "report.html", page)
        return replace(self, page=page)

    def __str__(self) -> str:
        parts = [text for part in (self.scores, self.trials) if part is not None for text in (str(part), "")]
        parts += [str(self.cut), "", str(self.check)]
        return "\n".join([*parts, *(["", str(self.healed)] if self.healed is not None else [])])


@with_presets
def prune(
    model: str | Path,
    out: str | Path,
    *,
    count: int | None = None,
    ratio: str | None = None,
    drop: str | None = None,
    attention_only: str | None = None,
    mlp_only: str | None = None,
    last_token: str | None = None,
    freeze_visual: str | None = None,
    preset: PresetName | None = None,
    select: str = "lowest",
    metric: str = "block-influence",
    average: Average = "tokens",
    scaled: bool = False,
    allow: str = "drop",
    protect: str = "none",
    candidates: str = "all",
    data: str = "default",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 16,
    length: int = 512,
    by_document: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    heldout: str = "heldout",
    device: str = "auto",
    dtype: str = "auto",
    format: Format = "custom",  # noqa: A002  (the word on the command line)
    heal: str | None = None,
    minutes: float | None = None,
    own: int = 0,
    bf16: bool = False,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PruneReport:
    """Score, plan, cut and check in one go, and leave plan, scores, record, model card and report in OUT.

    Say how many blocks go with --count or --ratio, or which with --drop. With several rules (--select lowest,span or
    auto), each chooses by every metric, every plan is tried on text set aside from --data, a quarter beyond --samples,
    and the one with the lowest perplexity is carried out. OUT is there only if the check passed. --heal goes on with
    `shortcut heal`; where that fails, the checkpoint that was to be healed stays in OUT.cut.
    """
    asked = dict(locals())
    if (heal, minutes, own, bf16) != (None, None, 0, False):
        return _prune_and_heal(asked)
    from shortcut.checking.verify import check_checkpoint
    from shortcut.live import pick_device, pick_dtype
    from shortcut.scoring.metrics import pick_metrics

    base, target = open_model(model, revision, quiet=quiet), Path(out)
    source = Source(data, split, column, chat_template)
    by_hand = commands.given_moves(drop, attention_only, mlp_only, last_token, freeze_visual)
    rules, metrics, actions = parse_rules(select), pick_metrics(metric, average), parse_actions(allow)
    request = Request(count, ratio, by_hand, rules, metrics, actions, protect, candidates, preset, scaled)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    images, trust = "freeze-visual" in (*by_hand, *actions), {"trust_remote_code": trust_remote_code}
    text: dict[str, Any] = {"length": length, "seed": seed, "images": images, **trust}
    loading = {"device": device, "dtype": dtype, **trust}
    # What is wrong with the request is said before the long work, not after it.
    check_target(target, overwrite=overwrite, base=base.folder)
    check_freezes(base.config) if images else check_family(base.config)
    pick_dtype(dtype, pick_device(device))
    for plan in request.foresee(base):
        report_cut(base, replace(plan, format=format), target, limit, written=False)
    unseen = runs.take_unseen(base, replace(source, data=heldout), length=length, images=images, **trust)

    text["by_document"] = by_document
    how: dict[str, Any] = {"text": text, "loading": {**loading, "offload": False}, "quiet": quiet}
    plan, scores, trials = select_plan(base, request, source, samples, batch_size, **how)
    plan = replace(plan, format=format)
    cut = report_cut(base, plan, target, limit, written=True)
    config = shorten_config(base, plan, trust_remote_code=trust_remote_code)
    with staged(target, overwrite=overwrite, base=base.folder, size=cut.bytes_after) as folder:
        with byte_bar(cut.bytes_after, "writing", quiet=quiet) as advance:
            short = write_checkpoint(base, plan, config, folder, max_shard_size=limit, advance=advance)
        say("checking: keys, tensors, logits, and what it is worth, before and after", quiet=quiet)
        short, how = replace(short, name=str(out)), {"batch_size": batch_size, "quiet": quiet, **loading}
        checked = check_checkpoint(short, (base, plan), unseen, samples=True, **how)
        return _describe(base, short, cut, checked, scores, trials, spell_out(prune, asked))


def _prune_and_heal(asked: dict[str, Any]) -> PruneReport:
    """Prune into a folder beside OUT, heal from there into OUT, and remove it. asked: what `prune` was called with."""
    if asked["heal"] is None:
        raise ShortcutError("--minutes, --own and --bf16 say how --heal trains: name a way to heal")
    out, quiet = Path(os.path.realpath(asked["out"])), asked["quiet"]
    between = out.with_name(f"{out.name}.cut")
    healing.check_methods(asked["heal"], told=(asked["minutes"], asked["own"], asked["bf16"]) != (None, 0, False))
    if asked["own"] < 0 or (asked["minutes"] is not None and asked["minutes"] <= 0):
        raise ShortcutError("--minutes has to be a positive number, and --own cannot be negative")
    for folder in (out, between):
        check_target(folder, overwrite=asked["overwrite"])
    pruned = prune(**{**asked, "out": between, "heal": None, "minutes": None, "own": 0, "bf16": False})
    shared = ["data", "heldout", "split", "column", "chat_template", "length", "by_document", "seed", "batch_size"]
    shared += ["device", "dtype", "overwrite", "trust_remote_code", "minutes", "own", "bf16"]
    how = {name: asked[name] for name in shared}
    try:
        base = pruned.cut.plan.base
        healed = healing.heal(between, asked["out"], base=base.model, method=asked["heal"], quiet=quiet, **how)
    except ShortcutError as error:
        raise ShortcutError(f"{error}; {between} holds the shortened checkpoint, not healed") from None
    shutil.rmtree(between)
    assert healed.page is not None
    called = f"{asked['out']}, before it was healed,"
    cut, check = replace(pruned.cut, out=called), replace(pruned.check, checkpoint=called)
    page = replace(healed.page, trials=pruned.trials)
    report = replace(pruned, cut=cut, check=check, page=page, healed=healed)
    return report.made_by(spell_out(prune, asked), out)


def _describe(
    base: Checkpoint,
    short: Checkpoint,
    cut: CutReport,
    check: "CheckReport",
    scores: Scores | None,
    trials: "Trials | None",
    command: str,
) -> PruneReport:
    """Write beside the weights how they came about: plan, scores, picture where matplotlib is there, card, report."""
    from shortcut.publish.card import CARD, format_card
    from shortcut.publish.plots import draw_scores
    from shortcut.publish.report import make_report, write_report

    plan, folder = cut.plan, short.folder
    write_text(folder / "plan.yaml", format_plan(plan))
    if scores is not None:
        write_text(folder / "scores.json", format_scores(scores))
        if importlib.util.find_spec("matplotlib") is not None:
            draw_scores(scores, folder / "scores.png", plan.actions)
    write_text(folder / CARD, format_card(short, base, plan, check))
    found: dict[str, Any] = {"scores": scores, "trials": trials, "command": command}
    page = make_report(base, plan, {"shortened": short}, check, **found)
    write_report(folder / "report.html", page)
    return PruneReport(scores, trials, cut, check, page)
