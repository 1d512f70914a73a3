"""Scores: they survive their file, spans add up, and a damaged file is one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut.common.errors import ShortcutError
from shortcut.records.plan import Base
from shortcut.records.scores import Scores, format_scores, read_scores

NUMBER = st.floats(-1e30, 1e30)
TRIANGLE = ((1.0, 2.0, 4.0), (0.5, 0.25), (9.0,))


def make_scores(**metrics):
    """Scores of three blocks."""
    return Scores(Base("org/model", "5f0b02c", 3), 100, (10, 20, 30), metrics, {"data": "default"}, {"device": "cpu"})


@st.composite
def random_scores(draw):
    """Scores of up to six blocks with a metric of blocks and one of spans."""
    depth = draw(st.integers(1, 6))
    row = lambda length: tuple(draw(st.lists(NUMBER, min_size=length, max_size=length)))  # noqa: E731
    metrics = {"single": row(depth), "spans": tuple(row(depth - n) for n in range(depth))}
    return Scores(Base("m", None, depth), 10**12, tuple(range(depth)), metrics, {"data": "x"}, {"seed": 0})


@given(scores=random_scores())
@settings(deadline=None)
def test_scores_survive_their_file(tmp_path_factory, scores):
    """Scores read from the file they were written to are the same, to the last bit."""
    path = tmp_path_factory.getbasetemp() / "scores.json"
    path.write_text(format_scores(scores), encoding="utf-8")
    assert read_scores(path) == scores


def test_a_metric_of_spans_gives_what_was_measured():
    """A triangle answers from its own rows, single blocks from the first."""
    scores = make_scores(angular=TRIANGLE)
    assert scores.of_blocks("angular") == (1.0, 2.0, 4.0)
    assert [scores.of_spans("angular", length) for length in (1, 2, 3)] == list(TRIANGLE)


@given(scores=random_scores(), data=st.data())
@settings(deadline=None)
def test_a_metric_of_blocks_counts_for_spans_by_its_sum(scores, data):
    """The score of a span is the sum over its blocks, one span for every first block that leaves room."""
    length = data.draw(st.integers(1, scores.base.blocks))
    values = scores.of_blocks("single")
    expected = [sum(values[i : i + length]) for i in range(scores.base.blocks - length + 1)]
    assert scores.of_spans("single", length) == pytest.approx(
        tuple(expected), rel=1e-9, abs=1e-9 * max(map(abs, values))
    )


def test_an_unknown_metric():
    """A metric that was not measured is named, with those that were."""
    scores = make_scores(one=(1.0, 2.0, 3.0), angular=TRIANGLE)
    for ask in (lambda: scores.of_blocks("two"), lambda: scores.of_spans("two", 1)):
        with pytest.raises(ShortcutError, match="no scores of metric 'two': there are one, angular"):
            ask()


def test_how_scores_print():
    """The table has one row per block and one column per metric, of spans the single blocks."""
    lines = str(make_scores(one=(1.0, 0.5, 3.0), angular=TRIANGLE)).splitlines()
    assert [line.split() for line in lines] == [
        ["block", "one", "angular"],
        ["0", "1.0000", "1.0000"],
        ["1", "0.5000", "2.0000"],
        ["2", "3.0000", "4.0000"],
    ]


def damage(**changes):
    """A case: the text of a good score file with entries changed, or left out where the change is None."""
    message = changes.pop("message", "does not hold the scores of 3 blocks")
    data = make_scores(one=(1.0, 2.0, 3.0)).to_dict() | changes
    text = json.dumps({name: value for name, value in data.items() if value is not None})
    return pytest.param(text, message, id=repr(changes)[:60])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the scores .*Expecting value"),
        ("{", "cannot read the scores"),
        ("[" * 100_000, "cannot read the scores"),
        ("9" * 5000, "cannot read the scores"),
        ("[]", "is not a file of shortcut"),
        damage(shortcut=2, message="is not a file of shortcut"),
        damage(extra=1, message="unknown entry 'extra'; it can have base, block_parameters"),
        damage(base={"model": "m"}, message='"base" needs model, revision and blocks'),
        damage(base=None, message='"base" needs model, revision and blocks'),
        *(
            damage(**{name: None}, message=f"lacks the entry '{name}'")
            for name in ("metrics", "parameters", "settings")
        ),
        *(damage(**{name: None}, message=f"lacks the entry '{name}'") for name in ("block_parameters", "calibration")),
        damage(metrics={}),
        damage(metrics=[1, 2, 3]),
        damage(metrics={"one": []}),
        damage(metrics={"one": {}}),
        damage(metrics={"one": 3}),
        damage(metrics={"one": "123"}),
        damage(metrics={"one": [1, 2]}),
        damage(metrics={"one": [1, 2, 3, 4]}),
        damage(metrics={"one": [1, "a", 3]}),
        damage(metrics={"one": [1, [2], 3]}),
        damage(metrics={"one": [1, float("nan"), 3]}),
        damage(metrics={"one": [1, float("inf"), 3]}),
        damage(metrics={"one": [10**400, 2, 3]}),
        damage(metrics={"one": [[1, 2, 3], [1, 2]]}),
        damage(metrics={"one": [[1, 2, 3], [1, 2, 3], [1]]}),
        damage(metrics={"one": [[1, 2, 3], 2, [1]]}),
        damage(parameters="many"),
        damage(parameters=float("inf")),
        damage(parameters=0),
        damage(block_parameters=[10, 20]),
        damage(block_parameters=7),
        damage(calibration=3),
        damage(settings="fast"),
    ],
)
def test_files_that_hold_no_scores(tmp_path, text, message):
    """A file that holds no scores is refused in one line, before anything is computed from it."""
    path = tmp_path / "scores.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ShortcutError, match=message) as caught:
        read_scores(path)
    assert len(str(caught.value).splitlines()) == 1


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a folder and bytes that are no text are told apart."""
    with pytest.raises(ShortcutError, match=r"no scores at .*gone\.json"):
        read_scores(tmp_path / "gone.json")
    with pytest.raises(ShortcutError, match=r"cannot read the scores .*Is a directory"):
        read_scores(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ShortcutError, match=r"cannot read the scores .*utf-8"):
        read_scores(tmp_path / "binary.json")
