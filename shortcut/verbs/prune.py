"""`prune`: score, plan, cut and check in one call, and heal where that is asked for."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import check_target, staged, write_text
from shortcut.choose.plans import given_by_hand, read_wanted
from shortcut.choose.rules import parse_rules
from shortcut.choose.selection import Request, select_plan
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import byte_bar, say
from shortcut.common.text import parse_size
from shortcut.family.fields import check_family
from shortcut.family.tasks import check_writes
from shortcut.material.take import take_unseen
from shortcut.options.groups import (
    FORMAT,
    Allowed,
    ByHand,
    Heldout,
    HowMany,
    Model,
    Out,
    Overwrite,
    Ranking,
    Rules,
    Running,
    SampledText,
    Stacked,
    Writing,
)
from shortcut.options.healing import Own, Training
from shortcut.options.presets import PRESETS
from shortcut.options.verb import handed_on, spell_out, verb
from shortcut.records.methods import TRAINED, Method
from shortcut.records.plan import Format, format_plan
from shortcut.records.scores import Scores, format_scores
from shortcut.surgery.cut import shorten_config, write_checkpoint
from shortcut.surgery.hollow import check_freezes
from shortcut.surgery.report import CutReport, report_cut
from shortcut.verbs.heal import HealOptions, check_heals, heal_checkpoint, parse_methods, read_methods

if TYPE_CHECKING:
    from shortcut.checking.trials import Trials
    from shortcut.checking.verify import CheckReport
    from shortcut.publish.heal_report import HealReport
    from shortcut.publish.report import Report

_OF_TRAINING = ", ".join(f"--{field.name.replace('_', '-')}" for field in fields(Training))


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


@dataclass(frozen=True)
class PruneOptions(
    ByHand, HowMany, Rules, Ranking, Allowed, Heldout, SampledText, Running, Stacked, Writing, Training, Own, Overwrite
):
    """Writing"""

    model: Model
    out: Out
    _: KW_ONLY
    metric: str = "block-influence"
    format: Annotated[Format, FORMAT] = "custom"
    heal: Annotated[
        str | None, "heal what was cut, by one or two methods of `shortcut heal`, such as refit or refit,distill"
    ] = None


@verb(PruneOptions, first="count ratio heal", example="org/model shorter --ratio 25% --heal refit", presets=PRESETS)
def prune(asked: PruneOptions) -> PruneReport:
    """Score, plan, cut and check in one go, and leave plan, scores, record, model card and report in OUT.

    Say how many blocks go with --count or --ratio, or which with --drop. With several rules (--select lowest,span or
    auto), each chooses by every metric, and the plan with the lowest perplexity is carried out. The text for that is a
    quarter beyond --samples, taken from --data and set aside. OUT is there only if the check passed. --heal goes on
    with `shortcut heal`; where that fails, the checkpoint that was to be healed stays in OUT.cut.
    """
    if asked.heal is not None:
        return _prune_and_heal(asked)
    if handed_on(Training, asked) != Training() or (asked.own is not None and "healed" not in asked.select):
        raise ShortcutError(f"{_OF_TRAINING} and --own say how to heal: name a way with --heal")
    return prune_checkpoint(asked, own=asked.own)


def prune_checkpoint(asked: PruneOptions, *, methods: Sequence[Method] = (), own: int | None = None) -> PruneReport:
    """What `prune` does in front of healing.

    methods: by which it will be healed; plans are tried as they are once refitted then. own: on how much text of the
    base that is.
    """
    from shortcut.checking.verify import check_checkpoint
    from shortcut.live.load import pick_device, pick_dtype
    from shortcut.scoring.metrics import check_metrics

    base = open_model(asked.model, asked.revision, stack=asked.stack, quiet=asked.quiet)
    target = Path(asked.out)
    request = _read_request(asked, base, refitted="refit" in methods, own=own)
    check_metrics(request.metrics if request.needs_model else (), base)
    if methods:
        check_heals(base, methods)
    if request.is_open or request.healed:
        check_writes(base.config, "choosing by perplexity", alone=False)
    images = "freeze-visual" in (*(request.wanted.moves or {}).values(), *request.wanted.allow)
    limit = None if asked.max_shard_size is None else parse_size(asked.max_shard_size)
    # What is wrong with the request is said before the long work, not after it.
    check_target(target, overwrite=asked.overwrite, base=base.folder)
    check_freezes(base.config) if images else check_family(base.config)
    pick_dtype(asked.dtype, pick_device(asked.device))
    plan, *others = request.foresee(base)
    for each in (plan, *others):
        report_cut(base, replace(each, format=asked.format, keeps_heads=asked.keep_mtp), target, limit, written=False)
    unseen = take_unseen(base, asked, asked.heldout, images=images, trust_remote_code=asked.trust_remote_code)
    scores, trials = None, None
    if request.needs_model:
        plan, scores, trials = select_plan(base, request, asked, asked, images=images)
    plan = replace(plan, format=asked.format, keeps_heads=asked.keep_mtp)
    cut = report_cut(base, plan, target, limit, written=True)
    config = shorten_config(base, plan, trust_remote_code=asked.trust_remote_code)
    with staged(target, overwrite=asked.overwrite, base=base.folder, size=cut.bytes_after) as folder:
        with byte_bar(cut.bytes_after, "writing", quiet=asked.quiet) as advance:
            short = write_checkpoint(base, plan, config, folder, max_shard_size=limit, advance=advance)
        say("checking: keys, tensors, logits, and what it is worth, before and after", quiet=asked.quiet)
        short = replace(short, name=str(asked.out))
        checked = check_checkpoint(short, (base, plan), unseen, asked, samples=True)
        return _describe(base, short, cut, checked, scores, trials, spell_out(prune, asked))


def _read_request(asked: PruneOptions, base: Checkpoint, *, refitted: bool, own: int | None) -> Request:
    """What is to go, and how it is chosen. Raises ShortcutError for what cannot be meant."""
    from shortcut.scoring.greedy import check_scaled
    from shortcut.scoring.metrics import pick_metrics

    wanted = read_wanted(base.base, asked, given_by_hand(asked), asked, asked.preset)
    rules = parse_rules(asked.select)
    check_scaled(asked.scaled, "greedy" in rules and wanted.moves is None)
    healed = "healed" in rules or (refitted and len(rules) > 1 and wanted.allow == ("drop",))
    metrics = pick_metrics(asked.metric, asked.average)
    return Request(wanted, rules, metrics, asked.scaled, healed=healed and wanted.moves is None, own=own)


def _prune_and_heal(asked: PruneOptions) -> PruneReport:
    """Prune into a folder beside OUT, heal from there into OUT, and remove it."""
    assert asked.heal is not None
    out = Path(os.path.realpath(asked.out))
    between = out.with_name(f"{out.name}.cut")
    healing = handed_on(HealOptions, asked, between, asked.out, method=asked.heal)
    methods = parse_methods(asked.heal)
    if handed_on(Training, asked) != Training() and not set(methods) & set(TRAINED):
        raise ShortcutError(f"{_OF_TRAINING} are for {' and '.join(TRAINED)}, and {asked.heal} trains nothing")
    read_methods(healing)
    for folder in (out, between):
        check_target(folder, overwrite=asked.overwrite)
    alone = replace(asked, out=between, heal=None, **asdict(Training()), own=None)
    pruned = prune_checkpoint(alone, methods=methods, own=asked.own)
    try:
        healed = heal_checkpoint(healing)
    except ShortcutError as error:
        raise ShortcutError(f"{error}; {between} holds the shortened checkpoint, not healed") from None
    shutil.rmtree(between)
    assert healed.page is not None
    called = f"{asked.out}, before it was healed,"
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
    page = make_report(base, plan, {"shortened": short}, check, scores=scores, trials=trials, command=command)
    write_report(folder / "report.html", page)
    return PruneReport(scores, trials, cut, check, page)
