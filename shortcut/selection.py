"""What goes, from what `prune` is asked for: by hand, by one rule, or by the best of several that are tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shortcut import commands, runs
from shortcut.choose.rules import Select, parse_candidates, parse_ratio
from shortcut.progress import say
from shortcut.records.actions import Action, Move
from shortcut.records.plan import Plan
from shortcut.records.scores import Measured, Scores
from shortcut.scoring.documents import Source
from shortcut.surgery.checkpoint import Checkpoint

if TYPE_CHECKING:
    from shortcut.choose.trials import Trials
    from shortcut.scoring.metrics import Metric


@dataclass(frozen=True)
class Request:
    """How many moves are to be made, or which, and by what rules and metrics they may be chosen."""

    count: int | None
    ratio: str | None
    by_hand: Mapping[Action, str]
    rules: Sequence[Select]
    metrics: "Sequence[Metric]"
    allow: tuple[Action, ...]
    protect: str
    candidates: str
    preset: str | None = None
    scaled: bool = False

    @property
    def needs_model(self) -> bool:
        """Whether blocks are chosen by anything but their place."""
        return not self.by_hand and list(self.rules) != ["deepest"]

    @property
    def is_open(self) -> bool:
        """Whether there are several plans to choose from."""
        return not self.by_hand and len(self.rules) > 1

    def plans(self, scores: Scores) -> list[Plan]:
        """What every rule chooses by every metric; a single rule by the first. Raises ShortcutError as `plan` does."""
        how: dict[str, Any] = {"count": self.count, "ratio": self.ratio, "allow": ",".join(self.allow)}
        how |= {"protect": self.protect, "candidates": self.candidates, "preset": self.preset}
        how |= {action.replace("-", "_"): blocks for action, blocks in self.by_hand.items()}
        if self.is_open:
            return runs.plans_by_rules(scores, self.rules, **how)
        return [commands.plan(scores, select=self.rules[0], metric=self.metrics[0].name, **how)]

    def foresee(self, base: Checkpoint) -> list[Plan]:
        """Plans of about the size of the real ones, made of scores that say nothing; half a block counts as half."""
        sizes = base.block_parameters
        may_go = parse_candidates(self.candidates, self.protect, len(sizes))
        order = [Move(block, action) for block in sorted(may_go, key=sizes.__getitem__) for action in self.allow]
        zeros = {metric.name: (0.0,) * len(sizes) for metric in self.metrics}
        halves: dict[Action, tuple[int, ...]] = {
            action: tuple(size // 2 for size in sizes) for action in self.allow if action != "drop"
        }
        known: Measured = {action: dict(zeros) for action in halves}
        orders = {self.metrics[0].name: tuple(order)}
        return self.plans(Scores(base.base, base.parameters, sizes, zeros, {}, {}, orders, known, halves))

    @property
    def share(self) -> float:
        """The share of the parameters that is to go, where that is what was asked for; else all."""
        return 1 if self.ratio is None else parse_ratio(self.ratio)


def select_plan(
    base: Checkpoint,
    request: Request,
    source: Source,
    samples: int,
    batch_size: int,
    *,
    text: dict[str, Any],
    loading: dict[str, Any],
    quiet: bool,
) -> tuple[Plan, Scores | None, "Trials | None"]:
    """Score the base and choose; of several plans the one with the lowest perplexity on sequences set aside.

    source, samples, text: as for `take_text`; where there is a choice, a quarter more sequences are taken, and set
    aside. loading: as for `open_live`. Raises ShortcutError as scoring does.
    """
    runs.check_scaled(request.scaled, "greedy" in request.rules and not request.by_hand)
    foreseen = request.foresee(base)
    if not request.needs_model:
        return foreseen[0], None, None
    from shortcut.choose.trials import try_plans
    from shortcut.scoring.greedy import check_greedy

    may_go = parse_candidates(request.candidates, request.protect, base.base.blocks)
    greedy = 0
    if "greedy" in request.rules:
        greedy = check_greedy(request.metrics[0], request.count, len(may_go), base.base.blocks, request.allow)
    aside = max(1, samples // 4) if request.is_open else 0
    taken = runs.take_text(base, source, samples + aside, **text)
    calibration, validation = taken.split(aside) if aside else (taken, None)
    say(f"scoring {base.base.blocks} blocks of {base.name} on {calibration.tokens} tokens", quiet=quiet)
    with runs.start(base, quiet=quiet, **loading) as live:
        how: dict[str, Any] = {"greedy": greedy, "scaled": request.scaled, "share": request.share}
        how |= {"may_go": may_go, "quiet": quiet}
        scores = runs.make_scores(base, live, calibration, request.metrics, batch_size, allow=request.allow, **how)
        plans = request.plans(scores)
        if validation is None:
            return plans[0], scores, None
        trials = try_plans(live, scores, plans, validation, batch_size, quiet=quiet)
    return plans[trials.best], scores, trials
