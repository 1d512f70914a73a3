"""Blocks that go one by one, each priced as it will be once it is healed.

What a block costs when it is gone says little of what it costs when the block in front stands in for it. So every
candidate is left out, the last projection in front of the gap is refitted to carry the stream across, and the rest
predicts deciding text: the block goes that the text misses least. Gaps that are there already are refitted on the way.
Only the most promising candidates are tried, by another score at first, and then by their own last price: what was
dear stays dear.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shortcut.common.processes import share
from shortcut.common.progress import track
from shortcut.healing.projections import find_projection
from shortcut.healing.squares import gather
from shortcut.healing.streams import UNCHANGED, Changes, Streams, perplexities_behind
from shortcut.live.blocks import device_of, hidden_input
from shortcut.live.decoder import PROBE, Batch, Decoder
from shortcut.live.load import Model
from shortcut.live.offload import free_memory, resident
from shortcut.material.pictures import Material
from shortcut.options.groups import Running
from shortcut.records.actions import Move
from shortcut.records.plan import Base, Plan
from shortcut.scoring.spill import Budget, SpillDict

PROMISING = 8  # candidates that are tried in every round, and twice as many in the first
RIDGE = 1e-2


@dataclass
class Search:
    """A model without what has gone. states: of the base, behind every block, by batch of the fitting text.

    changes: what stands for the gaps, by the block in front of each.
    """

    decoder: Decoder
    base: Base
    probe: Streams
    fitting: Sequence[Streams]
    checking: Sequence[Streams]
    states: SpillDict[tuple[int, int]]
    gone: set[int] = field(default_factory=set)
    changes: dict[int, Changes] = field(default_factory=dict)

    @classmethod
    @torch.inference_mode()
    def of(cls, live: Model, base: Base, fitting: Material, deciding: Material, how: Running, folder: Path) -> "Search":
        """Walk through the base once. Of several processes each has its own part of both texts.

        folder: for states that memory has no room for. Raises ShortcutError where blocks do not run one by one.
        """
        decoder, device = Decoder.of(live), device_of(live)
        decoder.check_alone("choosing blocks by what they cost once healed")
        batches, others = (each.batches(how.batch_size, device) for each in (fitting, deciding))
        probe = Streams.start(decoder, Batch(batches[0].ids[:1, :PROBE], batches[0].mask[:1, :PROBE]))
        walking, checking = ([Streams.start(decoder, batch) for batch in share(each)] for each in (batches, others))
        states: SpillDict[tuple[int, int]] = SpillDict(Budget(free_memory(device) // 4, folder))
        for number, block in enumerate(decoder.blocks):
            with resident(block):
                for place, streams in enumerate(walking):
                    streams.base = states[place, number] = decoder.run(number, streams.base, streams.calls[number])
        return cls(decoder, base, probe, walking, checking, states)

    @torch.inference_mode()
    def price(self, plan: Plan) -> float:
        """The perplexity of deciding text under a plan that drops blocks, with its gaps refitted."""
        self.gone, self.changes = set(plan.dropped), {}
        self._round(())
        found = [[streams.short for streams in self.checking]]
        (price,) = perplexities_behind(self.decoder, plan, max(plan.kept), self.checking, found)
        return price

    @torch.inference_mode()
    def remove(
        self, candidates: Sequence[int], most: int, enough: Callable[[set[int]], bool], *, quiet: bool
    ) -> tuple[Move, ...]:
        """The blocks that go one by one, the cheapest first, until that is enough, and so many at most.

        candidates: the most promising first; nothing can stand for the first block of the model. Raises ShortcutError
        where no projection in front of a gap adds straight to the stream.
        """
        self.gone, self.changes = set(), {}
        left, known, moves = [block for block in candidates if block], dict[int, float](), list[Move]()
        for number in track(range(most), "removing", quiet=quiet):
            tried = left[: PROMISING if number else 2 * PROMISING]
            if not tried or enough(self.gone):
                break
            prices, (best, front, changes) = self._round(tried)
            known |= prices
            left = sorted((block for block in left if block != best), key=lambda block: known.get(block, math.inf))
            self.gone.add(best)
            self.changes.pop(best, None)  # what it stood for is now part of a longer gap
            self.changes[front] = changes
            moves.append(Move(best, "drop"))
        return tuple(moves)

    def _round(self, candidates: Collection[int]) -> tuple[dict[int, float], tuple[int, int, Changes]]:
        """The price of every candidate, and of the cheapest, or the deepest of equal ones, what takes its place where.

        Gaps that are there are refitted on the way.
        """
        prices: dict[int, float] = {}
        cheapest: tuple[int, int, Changes] = (-1, -1, UNCHANGED)
        for streams in (*self.fitting, *self.checking):
            streams.short = hidden_input(*streams.calls[0])
        kept = [number for number in range(self.base.blocks) if number not in self.gone]
        ends = {block: following - 1 for block, following in zip(kept, [*kept[1:], self.base.blocks], strict=True)}
        for front, victim in zip(kept, [*kept[1:], None], strict=True):
            with resident(self.decoder.blocks[front]):
                if ends[front] > front:
                    self.changes[front] = self._refit(front, ends[front])
                if victim is not None and victim in candidates:
                    changes = self._refit(front, ends[victim])
                    prices[victim] = self._price(front, victim, changes)
                    if prices[victim] <= min(prices.values()):
                        cheapest = victim, front, changes
                for streams in (*self.fitting, *self.checking):
                    streams.short = streams.behind(self.decoder, front, "keep", self.changes.get(front, UNCHANGED))
        return prices, cheapest

    def _refit(self, front: int, behind: int) -> Changes:
        """What brings the stream behind a block to where the base's is behind a later one."""
        for place, streams in enumerate(self.fitting):
            streams.base = self.states[place, behind]
        name = find_projection(self.decoder, front, self.probe)
        return {name: gather(self.decoder, front, "keep", [name], self.fitting).solve([RIDGE])[RIDGE]}

    def _price(self, front: int, victim: int, changes: Changes) -> float:
        """The perplexity of deciding text without one block more, the one in front of it changed so."""
        tried = [[streams.behind(self.decoder, front, "keep", changes) for streams in self.checking]]
        plan = Plan.dropping(self.base, {*self.gone, victim})
        (price,) = perplexities_behind(self.decoder, plan, front, self.checking, tried, self.changes)
        return price
