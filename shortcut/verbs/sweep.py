"""`sweep`: what plans of several sizes would cost."""

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Annotated

from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import write_text
from shortcut.choose.plans import plans_by_rules, read_wanted
from shortcut.choose.rules import parse_candidates, parse_rules
from shortcut.common.errors import ShortcutError
from shortcut.family.tasks import check_writes
from shortcut.material.take import take_text
from shortcut.options.groups import (
    Allowed,
    Heldout,
    HowMany,
    Model,
    Offload,
    Plot,
    Ranking,
    Revision,
    Rules,
    Running,
    SampledText,
)
from shortcut.options.presets import PRESETS
from shortcut.options.verb import verb
from shortcut.publish.plots import check_files
from shortcut.records.actions import FREEZING, parse_actions
from shortcut.records.block_lists import parse_blocks

if TYPE_CHECKING:
    from shortcut.checking.trials import Trials


@dataclass(frozen=True)
class SweepOptions(Rules, Ranking, Allowed, Heldout, SampledText, Offload, Running, Revision, Plot):
    """What is tried"""

    model: Model
    _: KW_ONLY
    count: Annotated[str, 'numbers of blocks that go, or of halves of blocks where --allow says so: "1-8"'] = "1-8"
    select: str = "lowest,span,deepest"


@verb(SweepOptions, first="count select metric", example="org/model --count 1-8 --plot sweep.png", presets=PRESETS)
def sweep(asked: SweepOptions) -> "Trials":
    """Show quality against size: the perplexity that plans of several sizes and rules cost, before any is cut.

    The model is scored once. Every rule then chooses by every metric, and each plan is tried on other text; greedy
    leaves blocks out one by one by the first metric. Fails where one of the rules cannot leave out so many blocks.
    """
    from shortcut.checking.trials import try_plans
    from shortcut.live.load import pick_device, pick_dtype
    from shortcut.live.offload import open_live
    from shortcut.scoring.greedy import check_scaled, plan_removal
    from shortcut.scoring.metrics import pick_metrics
    from shortcut.scoring.scores import make_scores

    metrics, actions = pick_metrics(asked.metric, asked.average), parse_actions(asked.allow)
    if set(actions) & set(FREEZING):
        raise ShortcutError(f"perplexities say nothing of {asked.allow}: see score, freeze and demo")
    if "healed" in parse_rules(asked.select):
        raise ShortcutError("sweep tries plans as they are cut: --select healed is for prune")
    pick_dtype(asked.dtype, pick_device(asked.device))
    check_files(asked.out, asked.plot)
    checkpoint = open_model(asked.model, asked.revision, quiet=asked.quiet)
    check_writes(checkpoint.config, "choosing by perplexity", alone=False)
    depth = checkpoint.base.blocks
    counts, rules = parse_blocks(asked.count, depth + 1), parse_rules(asked.select)
    wanted = read_wanted(checkpoint.base, HowMany(count=max(counts)), {}, asked, asked.preset)
    check_scaled(asked.scaled, "greedy" in rules)
    removal = None
    if "greedy" in rules:
        may_go = parse_candidates(asked.candidates, asked.protect, depth)
        removal = plan_removal(metrics[0], max(counts), may_go, depth, actions, scaled=asked.scaled)
    trust = asked.trust_remote_code
    calibration = take_text(checkpoint, asked, asked.samples, trust_remote_code=trust)
    unseen = take_text(checkpoint, replace(asked, data=asked.heldout), asked.samples, trust_remote_code=trust)
    with open_live(checkpoint, asked, offload=asked.offload, quiet=asked.quiet) as live:
        scores = make_scores(checkpoint, live, calibration, metrics, asked, allow=actions, removal=removal)
        plans = [chosen for n in counts for chosen in plans_by_rules(replace(wanted, count=n), scores, rules)]
        trials = try_plans(live, scores, plans, unseen, asked.batch_size, quiet=asked.quiet)
    if asked.out is not None:
        write_text(asked.out, trials.as_csv())
    if asked.plot is not None:
        from shortcut.publish.plots import draw_trials

        draw_trials(trials, asked.plot)
    return trials
