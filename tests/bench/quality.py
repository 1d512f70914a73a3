"""What is left of a model, cut to three sizes and healed without training: in our ways, and as others do it.

python -m tests.bench.quality --text FILE --out RESULTS.jsonl: a JSON line per row, on stdout and behind what is in the
file already; rows that are there are not made again, so that a run that was killed goes on. All rows of a size lack the
same span of blocks, the one that costs least unhealed, but for one, which chooses its blocks by what they cost once
healed. All learn from the same text, prose and as much that the base wrote: ours are fitted on three quarters and
decided on the rest, the others, which decide nothing, are fitted on all of it. What is measured is on text that nothing
saw.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from shortcut.checking.perplexity import perplexity
from shortcut.checking.questions import Question, answer_choices, read_choices
from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_model
from shortcut.choose.healed import Search
from shortcut.healing import refit, scale
from shortcut.healing.own_text import with_own_text
from shortcut.live.blocks import device_of, hidden_output
from shortcut.live.decoder import Decoder
from shortcut.live.load import Model, load_tokenizer
from shortcut.live.offload import open_live
from shortcut.material.calibration import Calibration, make_calibration
from shortcut.material.documents import Source, read_documents
from shortcut.options.groups import Running
from shortcut.records.methods import Method
from shortcut.records.plan import Plan
from shortcut.surgery.preview import preview
from tests.bench import anchors
from tests.bench.rounds import emit, say

SHARES = (0.2, 0.25, 0.1)  # of the parameters
SAMPLES, LENGTH = 32, 512  # sequences of prose, and as many that the base writes
HELDOUT, TEXT = (16, 512), (32, 256)  # sequences to measure on
CLOZE, BEFORE, BEHIND = 100, 32, 8  # questions, and words in front of a gap and behind it
HOW = Running(quiet=True)

Weights = Mapping[int, Mapping[str, Tensor]]  # by block of the base, and by name inside the block


@dataclass(frozen=True)
class Healed:
    """What stands for a row: the plan, weights that differ from the base's, and maps behind blocks, (width, width)."""

    plan: Plan
    weights: Weights
    maps: Mapping[int, Tensor]

    @property
    def extra(self) -> int:
        """Parameters that the maps add."""
        return sum(each.numel() for each in self.maps.values())


@dataclass(frozen=True)
class Bench:
    """A live base, the text that all learn from, and the part of it that decides."""

    base: Checkpoint
    live: Model
    tokenizer: Any
    text: Calibration

    @cached_property
    def decoder(self) -> Decoder:
        return Decoder.of(self.live)

    @cached_property
    def parts(self) -> tuple[Calibration, Calibration]:
        """What is fitted on, and what decides."""
        return self.text.split(len(self.text.sequences) // 4)

    def choose(self) -> dict[str, Any]:
        """The order in which blocks go when each is priced healed, until the largest share is gone; and the seconds."""
        start, sizes, (fitting, deciding) = time.perf_counter(), self.base.block_parameters, self.parts
        half = deciding.take(range(0, len(deciding.sequences), 2))
        with TemporaryDirectory(prefix="shortcut-bench-") as folder:
            search = Search.of(self.live, self.base.base, fitting, half, HOW, Path(folder))
            most = max(SHARES) * self.base.parameters
            moves = search.remove(
                range(len(sizes)), len(sizes), lambda gone: sum(sizes[block] for block in gone) >= most, quiet=False
            )
        return {"order": [move.block for move in moves], "seconds": round(time.perf_counter() - start)}

    def span(self, share: float) -> Plan:
        """The span of this share that costs the least perplexity, on a quarter of the text that decides."""
        sizes, depth = self.base.block_parameters, self.base.base.blocks
        few, prices = self.parts[1].take(range(0, len(self.parts[1].sequences), 4)), list[tuple[float, int, Plan]]()
        for first in range(1, depth):
            ends = (end for end in range(first, depth) if sum(sizes[first : end + 1]) >= share * self.base.parameters)
            if (last := next(ends, None)) is not None:
                plan = Plan.dropping(self.base.base, range(first, last + 1))
                with preview(self.live, plan):
                    prices.append((perplexity(self.live, self._batches(few)), first, plan))
        return min(prices)[-1]

    def healed(self, share: float, order: Sequence[int]) -> Plan:
        """The first blocks of an order that hold this share."""
        sizes = [self.base.block_parameters[block] for block in order]
        held = [total >= share * self.base.parameters for total in accumulate(sizes)]
        return Plan.dropping(self.base.base, order[: held.index(True) + 1])

    def rows(self, share: float, order: Sequence[int]) -> dict[str, Callable[[], Healed]]:
        """By name, what makes a row; order: that in which blocks go when each is priced healed."""
        span = self.span(share)
        say(f"span: {span.described}")
        return {
            "cut": lambda: Healed(span, {}, {}),
            "scale (Prune&Comp)": lambda: self._scaled(span),
            "fold": lambda: self._fitted(span, "fold"),
            "refit": lambda: self._fitted(span, "refit"),
            "healed, refit": lambda: self._fitted(self.healed(share, order), "refit"),
            "ReplaceMe, least squares": lambda: self._merged(span, anchors.least_squares),
            "ReplaceMe, cosine": lambda: self._merged(span, anchors.cosine),
            "LinearPatch": lambda: self._mapped(span, anchors.linear_patch),
            "Ghosted Layers": lambda: self._mapped(span, anchors.ghosted),
        }

    def _batches(self, text: Calibration) -> list[Any]:
        return text.batches(HOW.batch_size, device_of(self.live))

    def _fitted(self, plan: Plan, method: Method) -> Healed:
        fits = refit.fit_refits(self.decoder, plan, *map(self._batches, self.parts), method=method)
        return Healed(plan, refit.new_weights(self.decoder, fits), {})

    def _scaled(self, plan: Plan) -> Healed:
        fits = scale.fit_scales(self.decoder, plan, *map(self._batches, self.parts))
        return Healed(plan, scale.new_weights(self.decoder, fits), {})

    def _gap(self, plan: Plan) -> anchors.Gap:
        return anchors.Gap.of(self.decoder, range(min(plan.dropped), max(plan.dropped) + 1), self._batches(self.text))

    def _merged(self, plan: Plan, fit: Callable[[anchors.Gap], Tensor]) -> Healed:
        gap = self._gap(plan)
        return Healed(plan, gap.merged(self.decoder, fit(gap)), {})

    def _mapped(self, plan: Plan, fit: Callable[[anchors.Gap], Tensor]) -> Healed:
        gap = self._gap(plan)
        return Healed(plan, {}, {gap.front: fit(gap)})

    def measure(self, healed: Healed, text: str) -> dict[str, float]:
        """Perplexities and percentages, on what nothing was fitted on or chosen by."""
        unseen = [
            make_calibration(self.tokenizer, Source(name, split="validation"), samples=samples, length=length)
            for name, (samples, length) in (("heldout", HELDOUT), (text, TEXT))
        ]
        asked = [read_choices("default"), cloze(next(iter(map(str, read_documents(Source("heldout"), 0)))))]
        with preview(self.live, healed.plan), changed(self.decoder, healed.weights), mapped(self.decoder, healed.maps):
            prices = [round(perplexity(self.live, self._batches(each)), 2) for each in unseen]
            found = [answer_choices(self.live, self.tokenizer, each, batch_size=16).accuracy for each in asked]
        names = ("prose", "text", "questions", "cloze")
        return dict(zip(names, [*prices, *(round(100 * each, 1) for each in found)], strict=True))


def cloze(text: str) -> tuple[Question, ...]:
    """Which of four places of a text goes on where some words end: always the same questions."""
    words, rng = text.split(), random.Random(0)
    places = rng.sample(range(BEFORE, len(words) - BEHIND), 4 * CLOZE)
    questions = []
    for number in range(CLOZE):
        four = places[4 * number : 4 * number + 4]
        answer = rng.randrange(4)
        choices = tuple(" ".join(words[place : place + BEHIND]) for place in four)
        questions.append(Question(" ".join(words[four[answer] - BEFORE : four[answer]]), choices, answer))
    return tuple(questions)


@contextmanager
def changed(decoder: Decoder, weights: Weights) -> Iterator[None]:
    """Have blocks of a live model these weights."""
    places = [
        (decoder.blocks[number].get_parameter(name), values)
        for number, by_name in weights.items()
        for name, values in by_name.items()
    ]
    before = [parameter.detach().clone() for parameter, _ in places]
    with torch.no_grad():
        for parameter, values in places:
            parameter.copy_(values)
        yield
        for (parameter, _), values in zip(places, before, strict=True):
            parameter.copy_(values)


@contextmanager
def mapped(decoder: Decoder, maps: Mapping[int, Tensor]) -> Iterator[None]:
    """Have the stream behind blocks of a live model go through these maps."""
    handles = [
        decoder.blocks[number].register_forward_hook(
            lambda *given, number=number, turn=turn: decoder.forms[number](
                hidden_output(given[-1]) @ turn.to(hidden_output(given[-1]))
            )
        )
        for number, turn in maps.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("--model", default="smollm2-135m")
    asked.add_argument("--text", default="Salesforce/wikitext:wikitext-2-raw-v1", help="a file or a set of the Hub")
    asked.add_argument("--out", type=Path, required=True)
    given = asked.parse_args()
    known = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    base = open_model(given.model, quiet=True)
    tokenizer = load_tokenizer(base.folder)
    prose = make_calibration(tokenizer, Source(), samples=SAMPLES, length=LENGTH)
    with open_live(base, HOW, quiet=True) as live:
        text = with_own_text(prose, SAMPLES, base, lambda: live, HOW, seed=0, quiet=False)
        assert isinstance(text, Calibration)
        bench = Bench(base, live, tokenizer, text)

        def note(share: float, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            """What is in the file of a row, or is made and written there."""
            for line in known:
                if (line["model"], line["share"], line["row"]) == (given.model, share, name):
                    return line
            say(f"{share:.0%} {name}")
            line = {"model": given.model, "share": share, "row": name, **make()}
            with given.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            emit("quality", f"{given.model}, {SAMPLES} + {SAMPLES} x {LENGTH} tokens", **line)
            return line

        whole = Healed(Plan.dropping(base.base, ()), {}, {})
        note(0.0, "base", lambda: one_row(bench, lambda: whole, given.text))
        order = note(0.0, "order", bench.choose)["order"]
        for share in SHARES:
            for name, make in bench.rows(share, order).items():
                note(share, name, lambda make=make: one_row(bench, make, given.text))


def one_row(bench: Bench, make: Callable[[], Healed], text: str) -> dict[str, Any]:
    """Heal and measure."""
    start = time.perf_counter()
    healed = make()
    seconds = time.perf_counter() - start
    size = bench.base.parameters - sum(bench.base.block_parameters[block] for block in healed.plan.dropped)
    numbers = {"dropped": healed.plan.described, "parameters": size + healed.extra, "extra": healed.extra}
    return {**numbers, "seconds": round(seconds, 1), **bench.measure(healed, text)}


if __name__ == "__main__":
    main()
