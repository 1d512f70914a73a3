"""What goes, from what `prune` is asked for: by hand, by one rule, or by the best of several that are tried."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.choose.plans import Wanted, make_plan, plans_by_rules
from shortcut.choose.rules import Select, check_count, check_rule, check_share, most_moves
from shortcut.common.progress import say
from shortcut.material.take import take_text
from shortcut.options.groups import Running, SampledText
from shortcut.records.plan import Plan
from shortcut.records.scores import Scores

if TYPE_CHECKING:
    from shortcut.checking.trials import Trials
    from shortcut.scoring.metrics import Metric


@dataclass(frozen=True)
class Request:
    """What is to go, and by what rules and metrics it may be chosen. scaled: as for `Removal`."""

    wanted: Wanted
    rules: Sequence[Select]
    metrics: "Sequence[Metric]"
    scaled: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether blocks are chosen by anything but their place."""
        return self.wanted.moves is None and list(self.rules) != ["deepest"]

    @property
    def is_open(self) -> bool:
        """Whether there are several plans to choose from."""
        return self.wanted.moves is None and len(self.rules) > 1

    def foresee(self, base: Checkpoint) -> list[Plan]:
        """The plan, where no model is needed to choose it; else for every action one that does it to one block.

        So it is seen, before the long work, what cannot be written at all. Raises ShortcutError for more than can go,
        whatever scores will say.
        """
        wanted, sizes = self.wanted, base.block_parameters
        if not self.needs_model:
            return [make_plan(wanted, Scores(base.base, base.parameters, sizes, {}, {}, {}), self.rules[0])]
        for rule in self.rules:
            check_rule(rule, wanted.allow)
        free = [block for block in range(len(sizes)) if block not in wanted.staying]
        if wanted.count is not None:
            most = [most_moves(rule, free, len(sizes), wanted.allow) for rule in self.rules]
            check_count(wanted.count, min(most), len(sizes))
        if wanted.share is not None and (wanted.allow == ("drop",) or not free):  # of halves only a live model tells
            going = sum(sizes[block] for block in free) - (min(sizes) if len(free) == len(sizes) else 0)
            check_share(wanted.share, going / base.parameters)
        return [Plan.of(base.base, {free[0]: action}) for action in wanted.allow]


def select_plan(
    base: Checkpoint, request: Request, text: SampledText, how: Running, *, images: bool
) -> "tuple[Plan, Scores, Trials | None]":
    """Score the base and choose; of several plans the one with the lowest perplexity on sequences set aside.

    text: of which a quarter more is taken, and set aside, where there is a choice. Raises ShortcutError as scoring
    does.
    """
    from shortcut.checking.trials import try_plans
    from shortcut.live.offload import open_live
    from shortcut.scoring.greedy import plan_removal
    from shortcut.scoring.scores import make_scores

    wanted, depth = request.wanted, base.base.blocks
    removal = None
    if "greedy" in request.rules:
        may_go = [block for block in range(depth) if block not in wanted.staying]
        scaled = request.scaled
        removal = plan_removal(request.metrics[0], wanted.count, may_go, depth, wanted.allow, scaled=scaled)
        removal = replace(removal, enough=base.parameters * (1 if wanted.share is None else wanted.share))
    aside = max(1, text.samples // 4) if request.is_open else 0
    taken = take_text(base, text, text.samples + aside, images=images, trust_remote_code=how.trust_remote_code)
    calibration, validation = taken.split(aside) if aside else (taken, None)
    say(f"scoring {depth} blocks of {base.name} on {calibration.tokens} tokens", quiet=how.quiet)
    with open_live(base, how, quiet=how.quiet) as live:
        scores = make_scores(base, live, calibration, request.metrics, how, allow=wanted.allow, removal=removal)
        if validation is None:
            return make_plan(wanted, scores, request.rules[0]), scores, None
        plans = plans_by_rules(wanted, scores, request.rules)
        trials = try_plans(live, scores, plans, validation, how.batch_size, quiet=how.quiet)
    return plans[trials.best], scores, trials
