"""What goes, from what `prune` is asked for: by hand, by one rule, or by the best of several that are tried."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.choose.plans import Wanted, make_plan, plans_by_rules
from shortcut.choose.rules import BY_PLACE, HEALED, Select, check_count, check_rule, check_share, most_moves
from shortcut.common.progress import say
from shortcut.material.take import take_text
from shortcut.options.groups import Running, SampledText
from shortcut.records.actions import Move
from shortcut.records.plan import Plan
from shortcut.records.scores import Scores

if TYPE_CHECKING:
    from shortcut.checking.trials import Trials
    from shortcut.choose.healed import Search
    from shortcut.material.examples import Material
    from shortcut.scoring.greedy import Removal
    from shortcut.scoring.metrics import Metric


@dataclass(frozen=True)
class Request:
    """What is to go, and by what rules and metrics it may be chosen. scaled: as for `Removal`.

    healed: whether plans are tried as they are once refitted; own: as for `count_own`, of the text for that.
    """

    wanted: Wanted
    rules: Sequence[Select]
    metrics: "Sequence[Metric]"
    scaled: bool = False
    healed: bool = False
    own: int | None = None

    @property
    def needs_model(self) -> bool:
        """Whether blocks are chosen by anything but their place."""
        return self.wanted.moves is None and not (len(self.rules) == 1 and self.rules[0] in BY_PLACE)

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
    from shortcut.healing.own_text import count_own, with_own_text
    from shortcut.live.offload import open_live
    from shortcut.scoring.scores import make_scores

    wanted, depth, quiet = request.wanted, base.base.blocks, how.quiet
    removal = _plan_removal(base, request) if "greedy" in request.rules else None
    aside = max(1, text.samples // 4) if request.is_open or request.healed else 0
    taken = take_text(base, text, text.samples + aside, images=images, trust_remote_code=how.trust_remote_code)
    with open_live(base, how, quiet=quiet) as live:
        own = count_own(taken, request.own, live, quiet=quiet) if request.healed else 0
        both = with_own_text(taken, own, base, lambda: live, how, seed=text.seed, quiet=quiet)
        calibration, validation = both.split(max(1, len(both.sequences) // 5)) if aside else (both, None)
        say(f"scoring {depth} blocks of {base.name} on {calibration.tokens} tokens", quiet=quiet)
        scores = make_scores(base, live, calibration, request.metrics, how, allow=wanted.allow, removal=removal)
        if validation is None:
            return make_plan(wanted, scores, request.rules[0]), scores, None
        scores = replace(scores, settings={**scores.settings, "own": own}) if own else scores
        return _choose(live, scores, request, calibration, validation, how)


def _plan_removal(base: Checkpoint, request: Request) -> "Removal":
    """How blocks go one by one by a metric."""
    from shortcut.scoring.greedy import plan_removal

    wanted, depth = request.wanted, base.base.blocks
    may_go = [block for block in range(depth) if block not in wanted.staying]
    removal = plan_removal(request.metrics[0], wanted.count, may_go, depth, wanted.allow, scaled=request.scaled)
    return replace(removal, enough=base.parameters * (1 if wanted.share is None else wanted.share))


def _choose(
    live: Any, scores: Scores, request: Request, calibration: "Material", validation: "Material", how: Running
) -> "tuple[Plan, Scores, Trials | None]":
    """Make the plans, and try them where there are several."""
    from shortcut.checking.trials import try_plans
    from shortcut.choose.healed import Search

    with TemporaryDirectory(prefix="shortcut-") as folder:
        search = Search.of(live, scores.base, calibration, validation, how, Path(folder)) if request.healed else None
        if search is not None and "healed" in request.rules:
            scores = replace(scores, orders={**scores.orders, HEALED: _remove(search, scores, request, how)})
        plans = plans_by_rules(request.wanted, scores, request.rules)
        if len(plans) == 1:
            return plans[0], scores, None
        price = None if search is None else search.price
        trials = try_plans(live, scores, plans, validation, how.batch_size, price=price, quiet=how.quiet)
    return plans[trials.best], scores, trials


def _remove(search: "Search", scores: Scores, request: Request, how: Running) -> tuple[Move, ...]:
    """The order in which blocks go when the rest is refitted each time: as many as are wanted."""
    wanted = request.wanted
    may_go = [block for block in range(scores.base.blocks) if block not in wanted.staying]
    share = 1.0 if wanted.share is None else wanted.share

    def enough(gone: set[int]) -> bool:
        return sum(scores.size(block, "drop") for block in gone) >= share * scores.parameters

    most = len(may_go) if wanted.count is None else wanted.count
    return search.remove(may_go, most, enough, quiet=how.quiet)
