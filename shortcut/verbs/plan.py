"""`plan`: which blocks go."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import write_text
from shortcut.choose.plans import given_by_hand, make_plan, read_wanted
from shortcut.choose.rules import Select
from shortcut.options.groups import RULES, Allowed, ByHand, HowMany, OutFile, Published, Stacked
from shortcut.options.presets import PRESETS
from shortcut.options.verb import verb
from shortcut.records.plan import Plan, format_plan
from shortcut.records.scores import Scores, read_scores


@dataclass(frozen=True)
class PlanOptions(ByHand, HowMany, Allowed, Published, Stacked, OutFile):
    """How blocks are ranked"""

    scores: Annotated[
        str | Path | Scores,
        "a scores.json of `shortcut score`; or a model, for --drop, --keep and --select deepest or spaced",
    ]
    _: KW_ONLY
    select: Annotated[Select, f"{RULES}, or healed, where `prune` did"] = "lowest"
    metric: Annotated[str | None, "one of the metrics in the scores; where it is left out, the first"] = None


@verb(PlanOptions, first="count ratio out", example="scores.json --count 7 --out plan.yaml", presets=PRESETS)
def plan(asked: PlanOptions) -> Plan:
    """Choose the blocks that go, or halves of them, and print the plan as YAML.

    Say how many blocks go with --count or --ratio, or which with --drop, --attention-only and --mlp-only. Fails where
    so much cannot go, and where the scores do not say what the rule needs.
    """
    scores = asked.scores
    if isinstance(scores, str | Path) and Path(scores).suffix == ".json":
        scores = read_scores(Path(scores))
    if not isinstance(scores, Scores):
        checkpoint = open_model(scores, asked.revision, stack=asked.stack, weights=False, quiet=asked.quiet)
        scores = Scores(checkpoint.base, checkpoint.parameters, checkpoint.block_parameters, {}, {}, {})
    wanted = read_wanted(scores.base, asked, given_by_hand(asked), asked, asked.preset)
    chosen = make_plan(wanted, scores, asked.select, asked.metric)
    if asked.out is not None:
        write_text(asked.out, format_plan(chosen))
    return chosen
