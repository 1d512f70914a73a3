"""Plans: a partition of the blocks that survives its file, and one line for every file that is none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut.common.errors import ShortcutError
from shortcut.records.plan import Base, Plan, format_plan, read_plan

HEAD = "shortcut: 1\nbase: {model: org/model, revision: 5f0b02c, blocks: 7}\n"
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=20)  # PyYAML loses these
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def plans(draw):
    """Plans of any depth up to 40, with any plain data as their reason."""
    blocks = draw(st.integers(1, 40))
    gone = draw(st.sets(st.integers(0, blocks - 1), max_size=blocks - 1))
    base = Base(draw(WORDS), draw(st.none() | WORDS), blocks)
    return Plan.dropping(base, gone, draw(st.dictionaries(WORDS, PLAIN, max_size=3)))


def written(folder, text):
    """The path of a plan file with this text or these bytes."""
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@given(plan=plans())
@settings(deadline=None)
def test_a_plan_survives_its_file(tmp_path_factory, plan):
    """A plan read from the file it was written to is the same plan, whatever its names look like."""
    path = written(tmp_path_factory.getbasetemp(), format_plan(plan))
    assert read_plan(path) == plan


@given(plan=plans())
@settings(deadline=None)
def test_kept_and_dropped_are_a_partition(plan):
    """Every block is either kept or dropped, both ascending, and at least one is kept."""
    assert sorted(plan.kept + plan.dropped) == list(range(plan.base.blocks))
    assert (list(plan.kept), list(plan.dropped)) == (sorted(plan.kept), sorted(plan.dropped))
    assert len(plan.kept) >= 1


def test_renumbering_keeps_the_order():
    """The result's block k is the k-th block that stays."""
    assert Plan.dropping(Base("m", None, 7), [5, 0, 3]).kept == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("drop", "gone"),
    [("drop: 2-4\n", (2, 3, 4)), ("drop: 3\n", (3,)), ("drop: 0,6", (0, 6)), ("drop: none\n", ()), ("", ())],
)
def test_a_plan_written_by_hand(tmp_path, drop, gone):
    """A person may write the blocks bare, in any of the ways of a block list, or leave them out."""
    plan = read_plan(written(tmp_path, HEAD + drop))
    assert (plan.base, plan.dropped, plan.why) == (Base("org/model", "5f0b02c", 7), gone, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a file of shortcut: it lacks the entry shortcut: 1"),
        ("- 1", "is not a file of shortcut"),
        ("shortcut: 2", "is not a file of shortcut"),
        ("base: {blocks: 7}", "is not a file of shortcut"),
        (
            HEAD + "keep: 1-2",
            "unknown entry 'keep'; it can have attention-only, base, drop, format, freeze-visual, keep-mtp, last-token",
        ),
        (HEAD + "drop: 0-6", "the plan drops all 7 blocks: at least one has to stay"),
        (HEAD + "drop: 5-8", "no block 7-8: the model has blocks 0-6"),
        (HEAD + "drop: [1, 2]", '"drop" is .1, 2.: write a block list'),
        (HEAD + "drop: yes", '"drop" is True: write a block list'),
        (HEAD + "drop: 1.5", '"drop" is 1.5: write a block list'),
        (HEAD + "drop: -3", "cannot read '-3' in the block list"),
        (HEAD + 'drop: ""', "cannot read '' in the block list"),
        (HEAD + "why: lowest", "\"why\" has to be a mapping, not 'lowest'"),
        ("shortcut: 1", '"base" needs model, revision and blocks'),
        ("shortcut: 1\nbase: {model: m}", '"base" needs model, revision and blocks'),
        ("shortcut: 1\nbase: {blocks: 0}", '"base" needs model, revision and blocks'),
        ("shortcut: 1\nbase: {blocks: 7.0}", '"base" needs model, revision and blocks'),
        ("shortcut: 1\nbase: {blocks: yes}", '"base" needs model, revision and blocks'),
        ("shortcut: 1\nbase: {blocks: 100001}", '"base" needs model, revision and blocks'),
        ("shortcut: [", "cannot read the plan .*while parsing"),
        ("shortcut: !!python/object:os.system 1", "cannot read the plan .*could not determine a constructor"),
        (HEAD + "why: {day: 2026-99-99}", "cannot read the plan "),
        (HEAD + "drop: " + "9" * 5000, "cannot read"),
        ("[" * 100_000, "cannot read the plan"),
        (b"\xff\xfeplan", "cannot read the plan .*'utf-8' codec can't decode"),
    ],
    ids=lambda value: str(value)[-40:],
)
def test_files_that_hold_no_plan(tmp_path, text, message):
    """A file that holds no plan is refused in one line that names the file or what is wrong in it."""
    with pytest.raises(ShortcutError, match=message) as caught:
        read_plan(written(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("why", ["{day: 2026-07-01}", "{key: !!binary aGk=}", "{names: !!set {a}}", "&a {self: *a}"])
def test_reasons_that_are_no_plain_data(tmp_path, why):
    """A reason that the JSON records of the result could not hold is refused when the plan is read."""
    with pytest.raises(ShortcutError, match=r'"why" .*plain data'):
        read_plan(written(tmp_path, f"{HEAD}drop: 3\nwhy: {why}\n"))


def test_files_that_cannot_be_read(tmp_path):
    """A missing file and a folder in its place are told apart."""
    with pytest.raises(ShortcutError, match=r"no plan at .*gone\.yaml"):
        read_plan(tmp_path / "gone.yaml")
    with pytest.raises(ShortcutError, match=r"cannot read the plan .*Is a directory"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: Plan(base, ("keep",) * 6), "a plan for 7 blocks has 6 actions"),
        (lambda base: Plan(base, ("keep",) * 6 + ("swap",)), "unknown action 'swap': there are keep, drop"),
        (lambda base: Plan(base, ("drop",) * 7), "drops all 7 blocks"),
        (lambda base: Plan.dropping(base, [-1, 3]), "no block -1: the model has blocks 0-6"),
        (lambda base: Plan.dropping(base, [7]), "no block 7: the model has blocks 0-6"),
    ],
)
def test_plans_that_cannot_be(make, message):
    """A plan that does not fit its base is refused when it is made, by whatever way."""
    with pytest.raises(ShortcutError, match=message):
        make(Base("m", None, 7))
