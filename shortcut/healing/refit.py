"""Refitting: the projections around what was deleted, solved anew, so that the stream comes out as the base has it.

The last projections in front of a deleted span get the weights that bring the shortened model's stream as close to the
base's behind the span as a linear map of their own inputs can: W + D, with D from least squares, in closed form, with a
ridge towards D = 0. Of the two projections of a block, attention's and the MLP's, the first is solved together with the
second, and the second then again on what the first gives it. A block that keeps one half is a span of its own. Then the
blocks that are kept behind it go part of the way in the same manner, each towards the base's stream behind itself. No
parameter is added, and the architecture stays what it was. How strong the ridge is, and whether a block gets its new
weights at all, is decided on other text, by the perplexity at the end of the model.

Folding is the restricted form: in front of spans alone, in the last projection alone, and with D = W (T - 1), T a map
of what that projection adds to the stream (ReplaceMe, arXiv:2505.02819).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import share
from shortcut.common.progress import gauge, say
from shortcut.healing.cosine import Rows, turn
from shortcut.healing.projections import find_normed, find_projection, is_transposed, weights_of
from shortcut.healing.saved_fit import SavedFit
from shortcut.healing.squares import gather
from shortcut.healing.streams import UNCHANGED, Changes, Streams, check_plan, inputs_of, perplexities_behind
from shortcut.healing.stretches import Stretch, runs_of
from shortcut.live.batch import Batch
from shortcut.live.decoder import PROBE, Decoder
from shortcut.live.offload import resident
from shortcut.records.actions import GONE, Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.methods import Method, Objective
from shortcut.records.plan import Plan

RIDGES = (1e-3, 1e-2, 1e-1)  # tried in front of spans, times the mean square of what goes in
START = 1e-2  # the ridge of what is solved before any was chosen
# Blocks behind a span go half of the way: all of it wins little more on text like that which was fitted on, and loses
# much on other text.
LATER, PART = (1e-1,), 0.5
# They have to lower the perplexity by such a part; after so many in a row that do not, no other is tried.
GAIN, PATIENCE = 5e-3, 2


@dataclass(frozen=True)
class Refit:
    """New weights for one block. Blocks are those of the base.

    span: what these weights stand for, the block itself where half of it is gone, or nothing, where they only bring
    the stream closer. before, after: perplexity on the text that decided, without and with them.
    """

    method: str
    span: tuple[int, ...]
    block: int
    ridge: float
    changes: Changes
    before: float
    after: float
    objective: Objective = "least-squares"

    def weights(self, block: nn.Module) -> dict[str, Tensor]:
        """The new weights of the projections, by name inside the block, in float32."""
        new = {}
        for name, change in self.changes.items():
            projection: Any = block.get_submodule(name)
            old, bias = projection.weight.detach().double(), projection.bias
            added = change[: change.shape[0] - (bias is not None)].to(old.device)
            new[f"{name}.weight"] = (old + (added if is_transposed(projection) else added.T)).float()
            if bias is not None:
                new[f"{name}.bias"] = (bias.detach().double() + change[-1].to(bias.device)).float()
        return new

    def record(self) -> dict[str, Any]:
        """Plain data, for the record of a checkpoint."""
        where = {"span": list(self.span), "block": self.block, "modules": list(self.changes)}
        how = {"ridge": self.ridge, "objective": self.objective}
        return {**where, **how, "perplexity_before": self.before, "perplexity_after": self.after}

    def __str__(self) -> str:
        whole = tuple(block for block in self.span if block != self.block)
        gone = [f"half of block {self.block}"] * (self.block in self.span)
        gone += [f"blocks {format_blocks(whole)}"] * bool(whole)
        where = f"{' and '.join(self.changes)} of block {self.block}"
        how = f"ridge {self.ridge:g}" + (", by cosine" if self.objective == "cosine" else "")
        what = f"{' and '.join(gone)} into {where}" if gone else where
        return f"{what}: {how}, perplexity {self.before:.2f} -> {self.after:.2f} on the text that decided"


def new_weights(decoder: Decoder, refits: Sequence[Refit]) -> dict[int, dict[str, Tensor]]:
    """By block of the base, and by name inside the block, the weights that were found, in float32."""
    changed = {}
    for refit in refits:
        with resident(decoder.blocks[refit.block]):
            changed[refit.block] = refit.weights(decoder.blocks[refit.block])
    return changed


@torch.inference_mode()
def fit_refits(
    decoder: Decoder,
    plan: Plan,
    batches: Sequence[Batch],
    deciding: Sequence[Batch],
    *,
    method: Method = "refit",
    objective: Objective = "least-squares",
    saved: SavedFit | None = None,
    quiet: bool = True,
) -> list[Refit]:
    """Find new weights around every span, and every half, that a plan deletes from a live base, where they help.

    batches: what they are fitted on; deciding: other text, whose perplexity decides; of several processes each has its
    own. method: refit or fold; objective: what is made small between the streams by fold, their squared distance or
    the angle between them. saved: keeps what was found of every block, and has it again after a kill. Raises
    ShortcutError for blocks that cannot be run one by one, for plans that do more than drop blocks and halves, and
    where no projection in front of a span adds straight to the stream.
    """
    check_plan(decoder, plan, batches[0], {"refit": "refitting", "fold": "folding"}[method])
    probe = Streams.start(decoder, Batch(batches[0].ids[:1, :PROBE], batches[0].mask[:1, :PROBE]))
    fitting, checking = ([Streams.start(decoder, batch) for batch in share(each)] for each in (batches, deciding))
    fitter = _Fitter(decoder, plan, probe, fitting, checking, method, objective, saved)
    work, done = runs_of(plan, looks=len(RIDGES), later=len(LATER) if method == "refit" else 0), 0.0
    with gauge(method, quiet=quiet) as show:
        for stretch, runs in work.items():
            fitter.go(stretch)
            done += runs
            show(done / sum(work.values()), "")
    if fitter.left:
        halves = " and ".join(f"{half} of {len(blocks)} blocks" for half, blocks in sorted(fitter.left.items()))
        say(f"{method} leaves the {halves} as it is: no one projection there adds to the stream", quiet=quiet)
    return [refit for refit in fitter.found if refit.changes]


@dataclass
class _Fitter:
    """A model on its way through its blocks. found: what was decided for every block, also where that is nothing.

    left: the halves of blocks in which nothing can be solved.
    """

    decoder: Decoder
    plan: Plan
    probe: Streams
    fitting: Sequence[Streams]
    checking: Sequence[Streams]
    method: Method
    objective: Objective
    saved: SavedFit | None
    found: list[Refit] = field(default_factory=list)
    left: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    @property
    def all(self) -> list[Streams]:
        return [*self.fitting, *self.checking]

    def go(self, stretch: Stretch) -> None:
        """Take both streams of all batches through a stretch, with new weights for its block where they help."""
        actions = [self.plan.actions[number] for number in range(max(stretch.covered) + 1)]
        if stretch.block is not None and set(actions) == {"keep"}:
            with resident(self.decoder.blocks[stretch.block]):
                for streams in self.all:
                    streams.step(self.decoder, stretch.block, "keep")
            return
        for number in stretch.covered:
            with resident(self.decoder.blocks[number]):
                for streams in self.all:
                    streams.base = self.decoder.run(number, streams.base, streams.calls[number])
        if stretch.block is None:
            return
        with resident(self.decoder.blocks[stretch.block]):
            changes = self._decide(stretch, stretch.block, actions[stretch.block])
            for streams in self.all:
                streams.short = streams.behind(self.decoder, stretch.block, actions[stretch.block], changes)

    def _decide(self, stretch: Stretch, block: int, action: Action) -> Changes:
        """The new weights of a block, where deciding text is the likelier for them, and a note of that."""
        span = tuple(number for number in stretch.covered if self.plan.actions[number] != "keep")
        idle = [not refit.span and not refit.changes for refit in self.found[-PATIENCE:]]
        if not span and (self.method == "fold" or idle == [True] * PATIENCE):
            return UNCHANGED
        refit = self._read(block)
        if refit is None:
            refit = self._fit(span, block, action)
            self._keep(refit)
        self.found.append(refit)
        return refit.changes

    def _read(self, block: int) -> Refit | None:
        """What a run that was killed had found of a block."""
        known = None if self.saved is None else self.saved.read(block)
        if known is None:
            return None
        record, changes = known
        return Refit(**{**record, "span": tuple(record["span"]), "changes": changes})

    def _keep(self, refit: Refit) -> None:
        if self.saved is not None:
            record = {each.name: getattr(refit, each.name) for each in fields(refit) if each.name != "changes"}
            self.saved.keep(refit.block, record, refit.changes)

    def _fit(self, span: tuple[int, ...], block: int, action: Action) -> Refit:
        """What is found of a block. Raises ShortcutError where it stands in front of a span, and nothing can be."""
        try:
            names = self._projections(block, action)
        except ShortcutError:
            if span:
                raise
            names = {}
        tried: dict[float, Changes] = self._solve(block, action, names, RIDGES if span else LATER) if names else {}
        if not span:
            tried = {ridge: {name: PART * each for name, each in found.items()} for ridge, found in tried.items()}
        known = [refit.after for refit in self.found[-1:]]
        trials = [*([] if known else [UNCHANGED]), *tried.values()]
        states = [[streams.behind(self.decoder, block, action, each) for streams in self.checking] for each in trials]
        before, *prices = [*known, *perplexities_behind(self.decoder, self.plan, block, self.checking, states)]
        best = min(range(len(prices)), key=prices.__getitem__, default=0)
        if not prices or not prices[best] < (1 if span else 1 - GAIN) * before:
            return Refit(self.method, span, block, self._ridge, UNCHANGED, before, before, self.objective)
        ridge, changes = list(tried.items())[best]
        return Refit(self.method, span, block, ridge, changes, before, prices[best], self.objective)

    @property
    def _ridge(self) -> float:
        """That of the block before, for what is solved without trying several."""
        return next((refit.ridge for refit in reversed(self.found) if refit.changes), START)

    def _projections(self, block: int, action: Action) -> dict[str, str | None]:
        """Those that are solved, in the order in which they run, and the norms that they go through.

        Raises ShortcutError where there are none.
        """
        found: dict[str, str | None] = {}
        halves: Sequence[Action] = (action,) if GONE[action] else ("attention-only", "mlp-only")
        for half in halves if self.method == "refit" else ():
            try:
                normed = find_normed(self.decoder, block, self.probe, half)
                name, norm = normed or (find_projection(self.decoder, block, self.probe, half), None)
                found[name] = norm
            except ShortcutError:  # experts, or no halves at all
                self.left["attention" if half == "attention-only" else "MLP"].add(block)
        return found or {find_projection(self.decoder, block, self.probe, action): None}

    def _solve(
        self, block: int, action: Action, names: Mapping[str, str | None], ridges: Sequence[float]
    ) -> dict[float, Changes]:
        """By ridge, changes of these projections, the last of which alone differ."""
        changes: dict[str, Tensor] = {}
        *first, last = names
        for place, name in enumerate(first):
            together = [name] if names[name] else list(names)[place:]
            sums = gather(self.decoder, block, action, together, self.fitting, changes, names[name])
            size = len(weights_of(self.decoder, block, name))
            changes[name] = sums.solve([self._ridge])[self._ridge][:size]
        sums = gather(self.decoder, block, action, [last], self.fitting, changes, names[last])
        if self.method == "refit":
            return {ridge: {**changes, last: change} for ridge, change in sums.solve(ridges).items()}
        weights = weights_of(self.decoder, block, last)
        maps = sums.through(weights).solve(ridges)
        if self.objective == "cosine":
            rows = self._rows(block, action, last, weights)
            maps = {ridge: turn(rows, change, ridge) for ridge, change in maps.items()}
        return {ridge: {last: weights @ change} for ridge, change in maps.items()}

    def _rows(self, block: int, action: Action, name: str, weights: Tensor) -> Rows:
        """Of all real tokens: what a projection adds, and both streams behind its block."""
        rows = []
        for streams in self.fitting:
            inputs: dict[str, Tensor] = {}
            with inputs_of(self.decoder.blocks[block], [name], inputs):
                short = streams.behind(self.decoder, block, action)
            mask = streams.batch.mask.to(short.device)
            added = inputs[name].reshape(*mask.shape, -1)[mask].double() @ weights
            rows.append((added, short[mask].double(), streams.base.to(short.device)[mask].double()))
        none = weights.new_zeros(0, weights.shape[1])
        return Rows(*(torch.cat([none, *parts]) for parts in zip(*rows, strict=True)))
