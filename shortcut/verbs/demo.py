"""Demonstrations on the models that come with the package: what shortening costs and gains, in text and in images."""

import random
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from shortcut.checkpoint.open import EMBEDDED_VISION, embedded_model, open_model
from shortcut.common.progress import say, track
from shortcut.common.text import format_count, format_size, format_table
from shortcut.options.groups import Overwrite, Text
from shortcut.options.verb import verb
from shortcut.records.actions import Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Base, Plan
from shortcut.records.scores import Scores
from shortcut.verbs.freeze import freeze
from shortcut.verbs.heal import heal
from shortcut.verbs.prune import PruneReport, prune

if TYPE_CHECKING:
    from shortcut.checking.speed import Speed
    from shortcut.publish.heal_report import HealReport

DEMO_SHARE = 0.2  # of the blocks
HEALING: dict[str, Any] = {"method": "refit", "samples": 8, "own": 0}  # little, so that it does not take long
SPEED_RUNS = 5
FROZEN = 8  # of the 12 blocks of the small vision-language model
COUNTS = (0, 2, 4, 6, 8, 10, 11, 12)  # of frozen blocks, with which accuracy is measured
QUESTIONS, BATCH, RANDOM_ORDERS = 220, 44, 10


@dataclass(frozen=True)
class DemoReport:
    """What the demo shows beyond `prune`: the same healed, tokens per second, and how to load the result."""

    pruned: PruneReport
    healed: "HealReport"
    speed_base: "Speed"
    speed: "Speed"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        speeds = {"base": asdict(self.speed_base), "shortened": asdict(self.speed)}
        return {**self.pruned.to_dict(), "healed": self.healed.to_dict(), "speed": speeds}

    def __str__(self) -> str:
        cut, check, plan = self.pruned.cut, self.pruned.check, self.pruned.cut.plan
        depth, kept = plan.base.blocks, len(plan.kept)
        rows: list[list[object]] = [
            ["blocks", depth, kept, kept],
            ["parameters", *map(format_count, (cut.parameters_before, *[cut.parameters_after] * 2))],
            ["bytes", *map(format_size, (cut.bytes_before, *[cut.bytes_after] * 2))],
            ["prompt tokens/s", *(f"{speed.prefill:.0f}" for speed in (self.speed_base, *[self.speed] * 2))],
            ["new tokens/s", *(f"{speed.decode:.1f}" for speed in (self.speed_base, *[self.speed] * 2))],
            *([*row, healed[-1]] for row, healed in zip(check.rows, self.healed.check.rows, strict=True)),
        ]
        return "\n".join(
            [
                str(self.pruned.scores),
                "",
                f"dropped  {format_blocks(plan.dropped)}",
                f"kept     {format_blocks(plan.kept)}",
                "",
                format_table(["", "base", "shortened", "healed"], rows),
                "",
                f"perplexity on {check.text}",
                f"speed can gain at most the ratio of blocks, {depth / kept:.2f} ({SPEED_RUNS} runs of each in turn)",
                f"logits differ from the base's with these blocks bypassed by {check.logit_difference:.3g}",
                "",
                f"base       {cut.plan.base.model}",
                f"shortened  {Path(cut.out).resolve()}  (plan.yaml, scores.json, scores.png and a model card inside)",
                f"healed     {Path(self.healed.out).resolve()}  (by refit on little text: nothing was trained)",
                "",
                "from transformers import AutoModelForCausalLM",
                f'model = AutoModelForCausalLM.from_pretrained("{self.healed.out}")',
                "",
                f"the whole report: {Path(self.healed.out).resolve() / 'report.html'}",
            ]
        )


@dataclass(frozen=True)
class Curves:
    """Accuracy of a vision-language model with images frozen in more and more of its blocks.

    orders: the order in which blocks freeze, by the name of what chose it; right: by the same name, the share of right
    answers with each of these numbers of them frozen.
    """

    questions: int
    counts: tuple[int, ...]
    orders: dict[str, tuple[int, ...]]
    right: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        named = {name: right for name, right in self.right.items() if not name.startswith("random")}
        drawn = [right for name, right in self.right.items() if name.startswith("random")]
        rows: list[list[object]] = [
            [count, *(f"{right[place]:.1%}" for right in named.values()), _range([right[place] for right in drawn])]
            for place, count in enumerate(self.counts)
        ]
        return format_table(["frozen", *named, f"{len(drawn)} random orders"], rows)


def _range(values: list[float]) -> str:
    return f"{fmean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


@dataclass(frozen=True)
class VisionReport:
    """What the demo of freezing shows: the checkpoint, and what other choices of blocks would have cost."""

    frozen: PruneReport
    curves: Curves

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**self.frozen.to_dict(), "curves": asdict(self.curves)}

    def __str__(self) -> str:
        out = Path(self.frozen.cut.out)
        return "\n".join(
            [
                f"{self.frozen}",
                "",
                f"right answers to {self.curves.questions} questions that chose nothing, by frozen blocks:",
                str(self.curves),
                "",
                f"{out.resolve()}  (curves.png, plan.yaml, scores.json, scores.png and a model card inside)",
                "",
                "from transformers import AutoModelForImageTextToText, AutoProcessor",
                f'model = AutoModelForImageTextToText.from_pretrained("{out}", trust_remote_code=True)',
                "",
                f"the whole report: {out.resolve() / 'report.html'}",
            ]
        )


def _demo_vision(out: str, *, overwrite: bool, quiet: bool) -> VisionReport:
    from shortcut.publish.plots import draw_curves

    frozen = freeze(
        EMBEDDED_VISION,
        out,
        count=FROZEN,
        metric="kl,block-influence",
        batch_size=11,
        samples=110,
        overwrite=overwrite,
        quiet=quiet,
    )
    assert frozen.scores is not None
    curves = measure_curves(frozen.scores, quiet=quiet)
    if find_spec("matplotlib") is not None:
        draw_curves(curves.counts, curves.right, Path(out) / "curves.png")
    return VisionReport(frozen, curves)


def measure_curves(scores: Scores, *, quiet: bool) -> Curves:
    """Freeze the blocks of the embedded model by kl, by the turn of visual tokens, and at random, and count answers."""
    from shortcut.checking.answers import answer, compare_answers
    from shortcut.live.load import load_model
    from shortcut.material.take import take_text
    from shortcut.surgery.preview import preview

    base = open_model(EMBEDDED_VISION, quiet=True)
    depth = base.base.blocks
    text = Text(data="heldout", seed=1)
    questions: Any = take_text(base, text, QUESTIONS, images=True, trust_remote_code=False)
    model, known = load_model(base.folder), dict[frozenset[int], float]()
    orders = {name: _lowest_first(scores.of_blocks(name, "freeze-visual")) for name in scores.names}
    for seed in range(RANDOM_ORDERS):
        orders[f"random {seed}"] = tuple(random.Random(seed).sample(range(depth), depth))
    sets = {frozenset(order[:count]) for order in orders.values() for count in COUNTS}
    with preview(model, Plan.dropping(base.base, ())) as shown:
        for blocks in track(sorted(sets, key=sorted), "answering with blocks frozen", quiet=quiet):
            shown.set(_freezing(base.base, blocks))
            given = answer(model, questions, BATCH, "", tokens=1)  # all answers are one word, and one token
            known[blocks] = compare_answers(questions, given, None).right or 0.0
    right = {name: tuple(known[frozenset(order[:n])] for n in COUNTS) for name, order in orders.items()}
    return Curves(QUESTIONS, COUNTS, orders, right)


def _lowest_first(values: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(values)), key=lambda block: (values[block], -block)))


def _freezing(base: Base, blocks: frozenset[int]) -> Plan:
    actions: dict[int, Action] = dict.fromkeys(blocks, "freeze-visual")
    return Plan.of(base, actions)


@dataclass(frozen=True)
class DemoOptions(Overwrite):
    """The demonstration"""

    out: Annotated[str | None, "the folder to write"] = None
    _: KW_ONLY
    vision: Annotated[bool, "the demonstration with images"] = False


@verb(DemoOptions, first="vision", example="--overwrite")
def demo(asked: DemoOptions) -> DemoReport | VisionReport:
    """Shorten the embedded model, SmolLM2-135M-Instruct, by a fifth, heal it, and show what that costs and gains.

    --vision freezes images in blocks of a small vision-language model instead, and shows what that costs, chosen well
    and chosen at random. OUT is smollm2-short, with smollm2-short-healed beside it, or tiny-llava-frozen.
    """
    if asked.vision:
        return _demo_vision(asked.out or "tiny-llava-frozen", overwrite=asked.overwrite, quiet=asked.quiet)
    return _demo_text(asked.out or "smollm2-short", overwrite=asked.overwrite, quiet=asked.quiet)


def _demo_text(out: str, *, overwrite: bool, quiet: bool) -> DemoReport:
    from shortcut.checking.speed import measure_speed
    from shortcut.live.load import load_model
    from shortcut.publish.report import write_report

    base = open_model(embedded_model(), quiet=quiet)
    count = round(base.base.blocks * DEMO_SHARE)
    pruned = prune(base.name, out, count=count, metric="block-influence,angular", overwrite=overwrite, quiet=quiet)
    healed = heal(out, f"{out}-healed", overwrite=overwrite, quiet=quiet, **HEALING)
    say("measuring speed", quiet=quiet)
    before, after = measure_speed([load_model(base.folder), load_model(Path(out))], runs=SPEED_RUNS)
    speeds = {"base": before, "shortened": after}
    found = {name: {"prompt tokens/s": each.prefill, "new tokens/s": each.decode} for name, each in speeds.items()}
    write_report(Path(out) / "report.html", pruned.page.measured(found))
    return DemoReport(pruned, healed, before, after)
