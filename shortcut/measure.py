"""The verbs that run a model, as functions and commands like those of `commands.py`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import runs
from shortcut.choose.rules import parse_candidates, parse_rules
from shortcut.commands import read_record
from shortcut.errors import ShortcutError
from shortcut.presets import PresetName, with_presets
from shortcut.processes import is_writer, writer_first
from shortcut.progress import say
from shortcut.records.actions import FREEZING, parse_actions
from shortcut.records.blocks import parse_blocks
from shortcut.records.scores import Average, Scores, format_scores
from shortcut.scoring.documents import Source
from shortcut.sources import open_folder, open_model
from shortcut.surgery.stage import RECORD, write_text

if TYPE_CHECKING:
    from shortcut.checking.verify import CheckReport
    from shortcut.choose.trials import Trials


@with_presets
def score(
    model: str | Path,
    *,
    preset: PresetName | None = None,
    metric: str = "block-influence,angular",
    average: Average = "tokens",
    greedy: int = 0,
    scaled: bool = False,
    stability: int = 0,
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
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> Scores:
    """Score every block of a model on some text: higher is more important.

    Metrics of what goes into blocks and comes out share one walk through them, at the cost of about one forward pass;
    `shortcut metrics` says what others cost. Metrics of spans (angular, angular-all) score every span of every length;
    the table shows single blocks, --out and --plot all. --greedy N goes on: by the first metric, the block that scores
    lowest is left out, the rest is scored again, and so on, N times. --stability K scores K parts of the text as well,
    and says how far they agree.
    """
    from shortcut.live import pick_device, pick_dtype
    from shortcut.scoring.greedy import check_greedy
    from shortcut.scoring.metrics import pick_metrics
    from shortcut.scoring.stability import agreements, split_evenly

    metrics, actions = pick_metrics(metric, average), parse_actions(allow)
    pick_dtype(dtype, pick_device(device))
    runs.check_files(out, plot)
    with writer_first():  # it may have to fetch or convert
        checkpoint = open_model(model, revision, quiet=quiet)
    may_go = parse_candidates(candidates, protect, checkpoint.base.blocks)
    runs.check_scaled(scaled, greedy)
    if greedy:
        check_greedy(metrics[0], greedy, len(may_go), checkpoint.base.blocks, actions)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    text: dict[str, Any] = {"length": length, "seed": seed, "by_document": by_document, **trust}
    text["images"] = bool(set(actions) & set(FREEZING))
    calibration = runs.take_text(checkpoint, Source(data, split, column, chat_template), samples, **text)
    parts = split_evenly(calibration, stability) if stability else []
    noted: dict[str, Any] = {} if preset is None else {"preset": preset}
    say(f"scoring {checkpoint.base.blocks} blocks of {checkpoint.name} on {calibration.tokens} tokens", quiet=quiet)
    with runs.start(checkpoint, offload=offload, quiet=quiet, device=device, dtype=dtype, **trust) as live:
        how: dict[str, Any] = {"allow": actions, "quiet": quiet}
        removing: dict[str, Any] = {"greedy": greedy, "scaled": scaled, "may_go": may_go}
        scores = runs.make_scores(checkpoint, live, calibration, metrics, batch_size, **how, **removing)
        if parts:
            alone = [runs.make_scores(checkpoint, live, part, metrics, batch_size, **how) for part in parts]
            noted["stability"] = {"parts": stability, **agreements(alone)}
        scores = replace(scores, settings={**scores.settings, **noted})
    if out is not None and is_writer():
        write_text(out, format_scores(scores))
    if plot is not None and is_writer():
        from shortcut.publish.plots import draw_scores

        draw_scores(scores, plot)
    return scores


@with_presets
def sweep(
    model: str | Path,
    *,
    count: str = "1-8",
    preset: PresetName | None = None,
    metric: str = "block-influence,angular",
    average: Average = "tokens",
    select: str = "lowest,span,deepest",
    scaled: bool = False,
    allow: str = "drop",
    protect: str = "none",
    candidates: str = "all",
    data: str = "default",
    heldout: str = "heldout",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 16,
    length: int = 512,
    by_document: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    offload: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    out: Path | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> "Trials":
    """Show quality against size: the perplexity that plans of several sizes and rules cost, before any is cut.

    The model is scored once; every rule then chooses by every metric, and each plan is tried on other text. For the
    rule greedy, blocks are left out one by one by the first metric.
    """
    from shortcut.choose.trials import try_plans
    from shortcut.live import pick_device, pick_dtype
    from shortcut.scoring.greedy import check_greedy
    from shortcut.scoring.metrics import pick_metrics

    metrics, rules, actions = pick_metrics(metric, average), parse_rules(select), parse_actions(allow)
    if set(actions) & set(FREEZING):
        raise ShortcutError(f"sweep compares perplexities, of which {allow} says nothing: see score, freeze and demo")
    pick_dtype(dtype, pick_device(device))
    runs.check_files(out, plot)
    checkpoint = open_model(model, revision, quiet=quiet)
    depth = checkpoint.base.blocks
    counts, may_go = parse_blocks(count, depth + 1), parse_candidates(candidates, protect, depth)
    greedy = max(counts) if "greedy" in rules else 0
    runs.check_scaled(scaled, greedy)
    if greedy:
        check_greedy(metrics[0], greedy, len(may_go), depth, actions)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    text: dict[str, Any] = {"length": length, "seed": seed, "by_document": by_document, **trust}
    source = Source(data, split, column, chat_template)
    calibration = runs.take_text(checkpoint, source, samples, **text)
    unseen = runs.take_text(checkpoint, replace(source, data=heldout), samples, **text)
    how: dict[str, Any] = {"preset": preset, "allow": allow, "protect": protect, "candidates": candidates}
    removing: dict[str, Any] = {"greedy": greedy, "scaled": scaled, "may_go": may_go}
    with runs.start(checkpoint, offload=offload, quiet=quiet, device=device, dtype=dtype, **trust) as live:
        scores = runs.make_scores(
            checkpoint, live, calibration, metrics, batch_size, allow=actions, **removing, quiet=quiet
        )
        plans = [chosen for n in counts for chosen in runs.plans_by_rules(scores, rules, count=n, **how)]
        trials = try_plans(live, scores, plans, unseen, batch_size, quiet=quiet)
    if out is not None:
        write_text(out, trials.as_csv())
    if plot is not None:
        from shortcut.publish.plots import draw_trials

        draw_trials(trials, plot)
    return trials


def check(
    checkpoint: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    data: str = "heldout",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 16,
    length: int = 512,
    by_document: bool = False,
    seed: int = 0,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> "CheckReport":
    """Verify a shortened checkpoint against its base, and measure the perplexity of both.

    It has to load with plain from_pretrained without a missing or unexpected key, its tensors have to be the base's
    byte for byte, and its logits those of the base with the dropped blocks bypassed. Fails at the first thing that is
    not so. A checkpoint that shortcut did not write is only loaded and measured.
    """
    from shortcut.checking.verify import check_checkpoint

    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    short = open_folder(folder, quiet=quiet)
    carried_out = read_record(folder)
    if carried_out is None and base is not None:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what was dropped from {base}")
    original = None
    if carried_out is not None:
        original = runs.open_base(carried_out, base, revision, quiet=quiet)
    text: dict[str, Any] = {"length": length, "seed": seed, "by_document": by_document}
    text["images"] = carried_out is not None and bool(carried_out.frozen)
    source = Source(data, split, column, chat_template)
    heldout = runs.take_text(short, source, samples, trust_remote_code=trust_remote_code, **text)
    return check_checkpoint(
        short,
        (original, carried_out) if original is not None and carried_out is not None else None,
        heldout,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        quiet=quiet,
    )
