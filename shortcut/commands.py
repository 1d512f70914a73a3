"""The verbs that work on files: each is a function here and a command of the same name and options on the command line.

Those that run a model are in `measure.py`. Every result prints as the command prints it, and `to_dict()` gives it as
plain data. Options are described once, in `option_help.py`. All raise ShortcutError for what the user can mend.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut.anatomy import text_config
from shortcut.anatomy import visual_tokens as visual_tokens_of
from shortcut.choose.rules import Select, parse_protect, parse_ratio, pick_count, pick_ratio, removals
from shortcut.errors import ShortcutError
from shortcut.presets import PresetName, with_presets
from shortcut.progress import byte_bar
from shortcut.records.actions import LISTED, Action, parse_actions
from shortcut.records.blocks import parse_blocks
from shortcut.records.plan import Format, Plan, format_plan, parse_moves, read_plan
from shortcut.records.scores import Scores, read_scores
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import read_json
from shortcut.surgery.compare import Difference, compare_checkpoints, compare_tensors
from shortcut.surgery.cut import CutReport, report_cut, shorten_config, write_checkpoint
from shortcut.surgery.families import Families, read_families
from shortcut.surgery.inspection import Inspection, inspect_checkpoint
from shortcut.surgery.savings import prefill
from shortcut.surgery.stage import RECORD, check_target, staged, write_text
from shortcut.text import parse_size

if TYPE_CHECKING:
    from shortcut.scoring.metrics import MetricList

BY_HAND = "--drop (or --attention-only, --mlp-only, --last-token and --freeze-visual)"


def inspect(
    model: str | Path,
    *,
    frozen: str | None = None,
    text_tokens: int = 64,
    visual_tokens: int = 576,
    revision: str | None = None,
    quiet: bool = False,
) -> Inspection:
    """Show the blocks of a model, their parameters and bytes, and what can be done to it.

    --frozen says what a prompt with images takes with these blocks frozen. Reads headers and config only; of a model on
    the Hub nothing else is fetched.
    """
    checkpoint = open_model(model, revision, weights=False, quiet=quiet)
    if frozen is None:
        return inspect_checkpoint(checkpoint)
    if text_tokens < 1 or visual_tokens < 1:
        raise ShortcutError("--text-tokens and --visual-tokens have to be positive")
    visual_tokens_of(checkpoint.config)
    blocks, (_, text) = parse_blocks(frozen, checkpoint.base.blocks), text_config(checkpoint.config)
    return inspect_checkpoint(checkpoint, prefill(text, blocks, text_tokens, visual_tokens))


@with_presets
def plan(
    scores: str | Path | Scores,
    *,
    count: int | None = None,
    ratio: str | None = None,
    drop: str | None = None,
    attention_only: str | None = None,
    mlp_only: str | None = None,
    last_token: str | None = None,
    freeze_visual: str | None = None,
    preset: PresetName | None = None,
    select: Select = "lowest",
    metric: str | None = None,
    allow: str = "drop",
    protect: str = "none",
    candidates: str = "all",
    revision: str | None = None,
    out: Path | None = None,
    quiet: bool = False,
) -> Plan:
    """Choose the blocks that go, or halves of them, and print the plan as YAML.

    Say how many moves with --count or --ratio, or which with --drop, --attention-only and --mlp-only. Without --metric
    the first one of the scores counts.
    """
    if isinstance(scores, str | Path) and Path(scores).suffix == ".json":
        scores = read_scores(Path(scores))
    if isinstance(scores, Scores):
        known: Scores | None = scores
        metric = metric or scores.names[0]
    else:
        checkpoint = open_model(scores, revision, weights=False, quiet=quiet)
        known = None
    base = known.base if known else checkpoint.base
    by_hand = given_moves(drop, attention_only, mlp_only, last_token, freeze_visual)
    if sum(map(bool, (count is not None, ratio is not None, by_hand))) != 1:
        raise ShortcutError(f"say what goes with one of --count, --ratio and {BY_HAND}")
    why: dict[str, Any] = {}
    shielded, actions = parse_protect(protect, base.blocks, candidates), parse_actions(allow)
    if by_hand:
        moves = parse_moves(by_hand, base.blocks)
        if early := sorted(set(moves) & set(shielded)):
            raise ShortcutError(f"block {early[0]} cannot both go and stay: see --protect and --candidates")
    else:
        choices = removals(select, base.blocks, shielded, known, metric or "", actions)
        if count is not None:
            moves = pick_count(choices, count, base.blocks)
        else:
            sizes = known or Scores(base, checkpoint.parameters, checkpoint.block_parameters, {}, {}, {})
            moves = pick_ratio(choices, parse_ratio(str(ratio)), sizes.parameters, sizes.size)
        why = {"select": select, "allow": allow, "protect": protect, "candidates": candidates}
        why |= {} if preset is None else {"preset": preset}
        if known is not None and select != "deepest":
            why |= {"metric": metric, "moves": known.describe_moves(metric or "", moves)}
            why |= {"calibration": dict(known.calibration), "settings": dict(known.settings)}
    chosen = Plan.of(base, moves, why)
    if out is not None:
        write_text(out, format_plan(chosen))
    return chosen


def cut(
    model: str | Path,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    drop: str | None = None,
    attention_only: str | None = None,
    mlp_only: str | None = None,
    last_token: str | None = None,
    freeze_visual: str | None = None,
    format: Format | None = None,  # noqa: A002  (the word on the command line)
    dry_run: bool = False,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    verify: bool = False,
    no_guard: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> CutReport:
    """Write the shortened checkpoint: byte for byte the base's tensors, without those of the dropped blocks.

    Works on the files alone: any size, any number type, a few megabytes of memory. Of a model on the Hub, only what
    stays is fetched. OUT is there whole or not at all.
    """
    by_hand = given_moves(drop, attention_only, mlp_only, last_token, freeze_visual)
    if (plan is None) == (not by_hand):
        raise ShortcutError(f"say what goes with one of --plan and {BY_HAND}")
    checkpoint = open_model(model, revision, weights=False, quiet=quiet)
    if by_hand:
        plan = Plan.of(checkpoint.base, parse_moves(by_hand, checkpoint.base.blocks))
    elif not isinstance(plan, Plan):
        plan = read_plan(Path(str(plan)))
    if format is not None:
        plan = replace(plan, format=format)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    check_target(Path(out), overwrite=overwrite, base=checkpoint.folder)
    report = report_cut(checkpoint, plan, Path(out), limit, written=not dry_run)
    config = shorten_config(checkpoint, plan, no_guard=no_guard, trust_remote_code=trust_remote_code)
    if not dry_run:
        with (
            staged(Path(out), overwrite=overwrite, base=checkpoint.folder, size=report.bytes_after) as folder,
            byte_bar(report.bytes_after, "writing", quiet=quiet) as advance,
        ):
            written = write_checkpoint(checkpoint, plan, config, folder, max_shard_size=limit, advance=advance)
            if verify:
                compare_tensors(written, checkpoint, plan)
    return report


def given_moves(*lists: str | None) -> dict[Action, str]:
    """The block lists that were given by hand, by action; lists: as `LISTED` orders the actions."""
    return {action: text for action, text in zip(LISTED, lists, strict=True) if text is not None}


def families(*, quiet: bool = False) -> Families:  # noqa: ARG001  (every command can be told to be quiet)
    """List all families of transformers, and whether their blocks can be deleted exactly.

    The table was written by a sweep that cut a tiny random model of every family, in three ways, and compared its
    logits with those of the model whose blocks are bypassed.
    """
    return read_families()


def diff(one: str | Path, other: str | Path, *, revision: str | None = None, quiet: bool = False) -> Difference:
    """Show what two checkpoints share: which block of the one every block of the other is, byte for byte.

    --revision is that of the first.
    """
    return compare_checkpoints(open_model(one, revision, quiet=quiet), open_model(other, quiet=quiet))


def read_record(folder: Path) -> Plan | None:
    """The plan that a checkpoint says it was made by; None where shortcut did not cut it."""
    if not (folder / RECORD).exists():
        return None
    record = read_json(folder / RECORD)
    return Plan.from_dict(record["plan"], str(folder / RECORD)) if "plan" in record else None


def metrics(*, quiet: bool = False) -> "MetricList":  # noqa: ARG001  (every command can be told to be quiet)
    """List the metrics: formula, what they need, what they cost, and where they come from."""
    from shortcut.scoring.metrics import METRICS, MetricList

    return MetricList(tuple(METRICS.values()))
