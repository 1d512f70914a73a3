"""Blocks that go one by one, each priced as it will be once it is healed.

What a block costs when it is gone says little of what it costs when the block in front stands in for it. So every
candidate is left out, the last projection in front of the gap is refitted to carry the stream across, and the rest
predicts deciding text: the block goes that the text misses least. Gaps that are there already are refitted then.

What was dear stays dear: from the second round on, candidates are tried from the one that last cost least, until the
next one last cost more than the cheapest of this round does now (the lazy greedy rule of Minoux, 1978).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from shortcut.common.processes import share
from shortcut.common.progress import gauge
from shortcut.healing.projections import find_projection
from shortcut.healing.squares import gather
from shortcut.healing.streams import UNCHANGED, Changes, Streams, perplexities_behind
from shortcut.live.batch import Batch
from shortcut.live.blocks import device_of
from shortcut.live.decoder import PROBE, Decoder
from shortcut.live.load import Model
from shortcut.live.offload import free_memory, resident
from shortcut.material.examples import Material
from shortcut.options.groups import Running
from shortcut.records.actions import Move
from shortcut.records.plan import Base, Plan
from shortcut.scoring.spill import Budget, SpillDict

RIDGE = 1e-2


@dataclass
class Search:
    """A model without what has gone, and its gaps refitted.

    ahead: the base's stream behind every block, of the fitting text; fronts: the shorter stream in front of every block
    that is kept, of both texts; by place of the batch and number of the block. changes: what stands for the gaps, by
    the block in front of each.
    """

    decoder: Decoder
    base: Base
    probe: Streams
    fitting: Sequence[Streams]
    checking: Sequence[Streams]
    ahead: SpillDict[tuple[int, int]]
    fronts: SpillDict[tuple[int, int]]
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
        budget = Budget(free_memory(device) // 4, folder)
        ahead, fronts = SpillDict[tuple[int, int]](budget), SpillDict[tuple[int, int]](budget)
        for number, block in enumerate(decoder.blocks):
            with resident(block):
                for place, streams in enumerate(walking):
                    streams.base = ahead[place, number] = decoder.run(number, streams.base, streams.calls[number])
        for place, streams in enumerate((*walking, *checking)):
            fronts[place, 0] = streams.short
        return cls(decoder, base, probe, walking, checking, ahead, fronts)

    @property
    def kept(self) -> list[int]:
        """The blocks that are left."""
        return [number for number in range(self.base.blocks) if number not in self.gone]

    @torch.inference_mode()
    def price(self, plan: Plan) -> float:
        """The perplexity of deciding text under a plan that drops blocks, with its gaps refitted."""
        self.gone, self.changes = set(plan.dropped), {}
        return self._walk(0)

    @torch.inference_mode()
    def remove(
        self, candidates: Sequence[int], most: int, enough: Callable[[set[int]], bool], *, quiet: bool
    ) -> tuple[Move, ...]:
        """The blocks that go one by one, the cheapest first, until that is enough, and so many at most.

        Of equal ones the deepest goes; nothing can stand for the first block of the model, which stays. Raises
        ShortcutError where no projection in front of a gap adds straight to the stream.
        """
        self.gone, self.changes = set(), {}
        before, moves = math.log(self._walk(0)), list[Move]()
        added = {block: -math.inf for block in candidates if block}  # to the log perplexity, when it was last tried
        with gauge("choosing", quiet=quiet) as show:
            while added and len(moves) < most and not enough(self.gone):
                best, front, changes = -1, -1, UNCHANGED
                for tries, block in enumerate(sorted(added, key=lambda block: (added[block], -block))):
                    if best >= 0 and added[block] >= added[best]:
                        break
                    price, where, what = self._try(block)
                    added[block] = math.log(price) - before
                    if best < 0 or added[block] < added[best]:
                        best, front, changes = block, where, what
                    show((len(moves) + (tries + 1) / len(added)) / most, f"block {block}: perplexity {price:.2f}")
                self.gone.add(best)
                self.changes.pop(best, None)  # what it stood for is now part of a longer gap
                self.changes[front] = changes
                moves.append(Move(best, "drop"))
                before = math.log(self._walk(front))
                del added[best]
        return tuple(moves)

    def _walk(self, first: int) -> float:
        """Go from in front of a block to the end, with the gaps on the way refitted; gives the perplexity there.

        The gap behind that block itself is left as it is where something stands for it.
        """
        both, kept = (*self.fitting, *self.checking), self.kept
        for place, streams in enumerate(both):
            streams.short = self.fronts[place, first]
        for block in (block for block in kept if block >= first):
            with resident(self.decoder.blocks[block]):
                for place, streams in enumerate(both):
                    self.fronts[place, block] = streams.short
                behind = self._end(block)
                if behind > block and (block > first or block not in self.changes):
                    self.changes[block] = self._refit(block, behind)
                for streams in both:
                    streams.short = streams.behind(self.decoder, block, "keep", self.changes.get(block, UNCHANGED))
        plan, found = Plan.dropping(self.base, self.gone), [[streams.short for streams in self.checking]]
        (price,) = perplexities_behind(self.decoder, plan, kept[-1], self.checking, found)
        return price

    def _end(self, block: int) -> int:
        """The last block of the gap that starts behind a block, or that block."""
        return next(end for end in range(block, self.base.blocks) if end + 1 not in self.gone)

    def _try(self, victim: int) -> tuple[float, int, Changes]:
        """What the perplexity is without one block more, the block in front of the gap, and its changes for that."""
        front = max(block for block in self.kept if block < victim)
        with resident(self.decoder.blocks[front]):
            for place, streams in enumerate((*self.fitting, *self.checking)):
                streams.short = self.fronts[place, front]
            changes = self._refit(front, self._end(victim))
            tried = [[streams.behind(self.decoder, front, "keep", changes) for streams in self.checking]]
        plan = Plan.dropping(self.base, {*self.gone, victim})
        (price,) = perplexities_behind(self.decoder, plan, front, self.checking, tried, self.changes)
        return price, front, changes

    def _refit(self, front: int, behind: int) -> Changes:
        """What brings the stream behind a block to where the base's is behind a later one."""
        for place, streams in enumerate(self.fitting):
            streams.base = self.ahead[place, behind]
        name = find_projection(self.decoder, front, self.probe)
        return {name: gather(self.decoder, front, "keep", [name], self.fitting).solve([RIDGE])[RIDGE]}
