"""Plans tried before anything is cut: what each costs is what it would cost, and the best of them is carried out."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import shortcut
from shortcut.checking.trials import Trials, try_plans
from shortcut.choose.rules import parse_candidates, parse_rules
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from shortcut.material.calibration import make_calibration
from shortcut.material.documents import Source
from shortcut.publish.plots import draw_trials
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Base, Plan
from shortcut.records.scores import Scores
from tests.conftest import DEPTH, make_tokenizer
from tests.scoring.test_greedy import plain_perplexity
from tests.verbs.test_score import sequences_of

TEXT = {"samples": 4, "length": 32, "quiet": True}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trial_is_the_perplexity_without_the_blocks(family: str, checkpoint_of: Callable[..., Path]) -> None:
    """Each plan's perplexity equals that of the model with hooks that bypass its blocks, as does the whole model's."""
    model, text = load_model(checkpoint_of(family)), sequences_of(9, 5, 7)
    scores = Scores(Base("m", None, DEPTH), 1000, tuple(range(DEPTH)), {}, {}, {})
    why = {"select": "lowest", "metric": "l2"}
    plans = [Plan.dropping(scores.base, dropped, why) for dropped in ((1,), (0, 3), (1,), (2, 4, 6))]
    trials = try_plans(model, scores, plans, text, 2)
    rows = [torch.tensor(row) for row in text.sequences]
    assert trials.perplexity == pytest.approx(plain_perplexity(model, rows, ()), rel=1e-5)
    for plan, trial in zip(plans, trials.trials, strict=True):
        assert trial.perplexity == pytest.approx(plain_perplexity(model, rows, plan.dropped), rel=1e-5)
        assert trial.parameters == 1000 - sum(plan.dropped)
    assert trials.trials[trials.best].perplexity == min(trial.perplexity for trial in trials.trials)


def test_the_best_rule_is_carried_out(llama: Path, tmp_path: Path) -> None:
    """prune --select auto tries every rule by every metric on text set aside, and cuts what costs least."""
    options = {"count": 2, "select": "auto", "metric": "block-influence,kl,angular", "seed": 3, **TEXT}
    report = shortcut.prune(llama, tmp_path / "short", **options)
    assert isinstance(report.trials, Trials)
    assert [(t.select, t.metric) for t in report.trials.trials] == [
        *(("lowest", metric) for metric in ("block-influence", "kl", "angular")),
        *(("span", metric) for metric in ("block-influence", "kl", "angular")),
        ("deepest", None),
    ]
    best = report.trials.trials[report.trials.best]
    assert report.cut.plan.described == best.dropped
    assert all(best.perplexity <= trial.perplexity for trial in report.trials.trials)
    assert report.cut.plan.why["select"] == best.select
    assert "1 sequences of 32 tokens" in report.trials.text  # a quarter more than the four that were scored
    assert report.scores is not None
    assert report.scores.calibration["samples"] == 4
    assert str(report.trials) in str(report)
    assert (tmp_path / "short" / "config.json").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "bos", "seed", "count"), [("llama", False, 0, 2), ("llama", False, 3, 3), ("gemma3_text", True, 1, 2)]
)
def test_auto_is_never_worse_than_a_rule_it_tried(
    family: str, bos: bool, seed: int, count: int, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """On the text set aside, every plan's perplexity by hooks and loops: what is carried out has the lowest of all."""
    folder = checkpoint_of(family, bos=bos)
    options = {"metric": "block-influence,kl,angular", "seed": seed, **TEXT}
    report = shortcut.prune(folder, tmp_path / "short", count=count, select="auto", **options)
    *scored, aside = make_calibration(make_tokenizer(bos=bos), Source(), samples=5, length=32, seed=seed).sequences
    assert report.scores is not None
    assert report.scores.calibration["samples"] == len(scored)
    plans = {("deepest", None): tuple(range(DEPTH - count - 1, DEPTH - 1))}
    for metric in report.scores.metrics:
        blocks, spans = report.scores.of_blocks(metric), report.scores.of_spans(metric, count)
        plans["lowest", metric] = tuple(sorted(sorted(range(DEPTH), key=blocks.__getitem__)[:count]))
        start = spans.index(min(spans))
        plans["span", metric] = tuple(range(start, start + count))
    model = load_model(folder)
    prices = {rule: plain_perplexity(model, [torch.tensor(aside)], dropped) for rule, dropped in plans.items()}
    tried = {(trial.select, trial.metric): trial for trial in report.trials.trials}
    assert {rule: trial.dropped for rule, trial in tried.items()} == {r: format_blocks(p) for r, p in plans.items()}
    for rule, price in prices.items():
        assert tried[rule].perplexity == pytest.approx(price, rel=1e-5)
    assert max(prices.values()) > 1.1 * min(prices.values())  # a wrong choice would show
    chosen = plain_perplexity(model, [torch.tensor(aside)], report.cut.plan.dropped)
    assert chosen == min(prices.values())


def test_several_rules_with_greedy_and_a_ratio(llama: Path, tmp_path: Path) -> None:
    """A list of rules is tried like auto; the order of greedy is as long as the ratio needs."""
    report = shortcut.prune(llama, tmp_path / "s", ratio="20%", select="lowest,greedy", metric="perplexity,l2", **TEXT)
    assert [(t.select, t.metric) for t in report.trials.trials] == [
        ("lowest", "perplexity"),
        ("lowest", "l2"),
        ("greedy", "perplexity"),
    ]
    assert {trial.count for trial in report.trials.trials} == {2}


def test_sweep_draws_quality_against_size(llama: Path, tmp_path: Path) -> None:
    """A row for every size, rule and metric; the CSV file has the table, the picture is one."""
    out, plot = tmp_path / "sweep.csv", tmp_path / "sweep.png"
    trials = shortcut.sweep(
        llama, count="1-3", metric="block-influence,kl", select="lowest,deepest", out=out, plot=plot, **TEXT
    )
    assert [(t.count, t.select, t.metric) for t in trials.trials] == [
        (count, *rule)
        for count in (1, 2, 3)
        for rule in (("lowest", "block-influence"), ("lowest", "kl"), ("deepest", None))
    ]
    rows = list(csv.reader(out.read_text().splitlines()))
    assert rows[0] == ["select", "metric", "count", "dropped", "parameters", "perplexity"]
    assert len(rows) == 2 + 9
    assert rows[1][:4] == ["none", "-", "0", "none"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert str(trials).splitlines()[1].split()[:4] == ["none", "-", "0", "none"]
    with pytest.raises(ShortcutError, match="has to be a .png file"):
        draw_trials(trials, tmp_path / "a.svg")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "best"}, "unknown rule 'best': there are lowest, span, deepest, spaced, greedy, healed and auto"),
        ({"select": "lowest,healed"}, "--select healed is for prune"),
        ({"count": "1-7"}, "cannot drop 7 of 7 blocks: 1 to 6 can go"),
        ({"select": "greedy", "metric": "magnitude"}, "magnitude cannot be scored again as blocks go"),
        ({"candidates": "2-3", "count": "3"}, "cannot drop 3 of 7 blocks: 1 to 2 can go"),
    ],
)
def test_sweep_mistakes(options: dict[str, str], message: str, llama: Path) -> None:
    """Unknown rules, more blocks than there are or may go, metrics that a rule cannot use."""
    with pytest.raises(ShortcutError, match=message):
        shortcut.sweep(llama, **{"count": "1", **options}, **TEXT)


@pytest.mark.parametrize("command", [shortcut.score, shortcut.sweep])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"out": Path("gone/a.csv")}, "cannot write gone/a.csv: No such file or directory"),
        ({"plot": Path("gone/a.png")}, "cannot draw gone/a.png: there is no folder gone"),
        ({"plot": Path("a.svg")}, "has to be a .png file"),
    ],
)
def test_files_that_cannot_be_written_are_named_before_the_work(
    command: Callable[..., object], option: dict[str, Path], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not even opened, so that no hours of scoring are lost."""
    monkeypatch.setattr("shortcut.verbs.sweep.open_model", lambda *_, **__: pytest.fail("it began to work"))
    with pytest.raises(ShortcutError, match=message):
        command("org/model", **option)


def test_too_little_text_to_set_aside() -> None:
    """A choice needs sequences that were not scored."""
    with pytest.raises(ShortcutError, match="cannot set 1 of 1 sequences aside"):
        sequences_of(9).split(1)


def test_candidates_and_rules_in_words() -> None:
    """Candidates lose what is protected; auto is every rule that needs one scoring."""
    assert parse_candidates("2-5", "plus", 9) == (4, 5)
    assert parse_candidates("all", "0,8", 9) == tuple(range(1, 8))
    assert parse_rules("auto") == ["lowest", "span", "deepest"]
    assert parse_rules("greedy, lowest,greedy") == ["greedy", "lowest"]
