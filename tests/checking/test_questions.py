"""Multiple-choice questions: what is read, how likely every choice is, and how sure the count of right answers is."""

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from shortcut.checking.questions import Chosen, Question, answer_choices, find_flips, hash_of, interval_of, read_choices
from shortcut.common.errors import ShortcutError
from shortcut.live.load import Model, load_model, load_tokenizer

LONG = Question("Which of these follows? " * 9, ("nothing ", "a b", "à la carte"), 2)


def plain_sum(model: Model, tokenizer: object, question: str, choice: str, *, bos: bool) -> float:
    """Token by token; of this tokenizer every byte is one, so that where a choice starts is counted in bytes."""
    ids = ([1] if bos else []) + tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    scored = len(f" {choice}".encode()) + len(question) - len(question.rstrip())
    return sum(chances[i - 1, ids[i]].item() for i in range(len(ids) - scored, len(ids)))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("bos", [False, True])
def test_likelihoods_equal_a_plain_loop(family: str, bos: bool, checkpoint_of: Callable[..., Path]) -> None:
    """In batches of any size, padded or not, every choice has the likelihood that a loop over its tokens finds."""
    size = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    folder = checkpoint_of(family, bos=bos, **size)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    questions = [LONG, *read_choices("default", 4)]
    expected = [[plain_sum(model, tokenizer, q.question, c, bos=bos) for c in q.choices] for q in questions]
    for batch_size in (1, 3, 11):
        found = answer_choices(model, tokenizer, questions, batch_size=batch_size)
        assert [list(sums) for sums in found.likelihoods] == [pytest.approx(row, rel=1e-4) for row in expected]


def test_what_is_too_long_loses_its_beginning(checkpoint_of: Callable[..., Path]) -> None:
    """A question longer than the model takes is cut from the left; a choice longer than that alone is refused."""
    folder = checkpoint_of("gpt2")  # 128 positions
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    choices = ("yes", "no")
    asked = "".join(chr(ord("a") + n % 26) for n in range(300))
    seen = [plain_sum(model, tokenizer, asked[len(f"{asked} {c}") - 128 :], c, bos=False) for c in choices]
    (found,) = answer_choices(model, tokenizer, [Question(asked, choices, 0)]).likelihoods
    assert found == pytest.approx(seen, rel=1e-4)
    with pytest.raises(ShortcutError, match=r"the choice 'z+' is longer than the 128 tokens that the model takes"):
        answer_choices(model, tokenizer, [Question("a", ("z" * 128, "b"), 0)])


def test_right_answers_are_counted_both_ways() -> None:
    """By the sum the short choice wins, per character the long one; of equal choices the first is the answer."""
    questions = (Question("q", ("long", "à"), 1), Question("q", ("long", "à"), 0), Question("q", ("a", "b"), 1))
    found = Chosen(questions, ((-4.0, -2.0), (-4.0, -2.0), (-1.0, -1.0)))
    assert found.right == (True, False, False)
    assert found.right_norm == (False, True, False)
    assert found.accuracy == 1 / 3
    assert found.interval == interval_of([True, False, False])


def test_the_interval_is_wilsons() -> None:
    """Its ends are the shares from which the share seen is 1.96 standard errors away, and within 0 and 1."""
    for right, of in ((0, 5), (3, 7), (130, 200), (5, 5)):
        for end in interval_of([True] * right + [False] * (of - right)):
            assert 0 <= end <= 1
            distance = (right / of - end) ** 2
            assert distance == pytest.approx(1.959963984540054**2 * end * (1 - end) / of, rel=1e-9, abs=1e-12)


def test_flips_are_those_of_mcnemar() -> None:
    """What flipped is named, and p is the share of all ways for as many flips to fall that are as uneven or more."""
    flips = find_flips([True, False, False, True, False], [True, True, True, False, True])
    assert (flips.gained, flips.lost) == ((1, 2, 4), (3,))
    ways = [abs(sum(way) - 2) >= abs(3 - 2) for way in product((0, 1), repeat=4)]
    assert flips.p == sum(ways) / len(ways)
    assert find_flips([True] * 5 + [False], [False] * 5 + [False]).p == 2 / 2**5
    assert find_flips([True], [True]).p == 1


def test_every_form_is_read(tmp_path: Path) -> None:
    """Fields may have the names they have in well-known data sets, and PIQA's form is asked as the harness asks it."""
    rows = [
        {"question": "Q?", "choices": ["a", "b\u2028c"], "answer": 1},
        {"query": "Q?", "choices": ["a", "b", "c"], "label": "2"},
        {"ctx": "Q", "choices": ["a", "b"], "label": 0, "more": None},
        {"goal": "do", "sol1": "so", "sol2": "thus", "label": 1},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "q.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    found = read_choices(str(tmp_path / "q.jsonl"))
    assert found == (
        Question("Q?", ("a", "b\u2028c"), 1),
        Question("Q?", ("a", "b", "c"), 2),
        Question("Q", ("a", "b"), 0),
        Question("Question: do\nAnswer:", ("so", "thus"), 1),
    )
    assert len({hash_of(found), hash_of(found[:3]), hash_of(found[::-1])}) == 3


def test_a_seed_picks_questions() -> None:
    """The questions of the package are 200; a seed takes some in their order, another seed others."""
    whole, some = read_choices("default"), read_choices("default", 20)
    assert len(set(whole)) == 200
    assert some == read_choices("default", 20, 0) != read_choices("default", 20, 1)
    assert [question for question in whole if question in some] == list(some)


WRONG = {
    "nonsense": "line 2 is not JSON: nonsense",
    "[1]": "line 2 is no object",
    '{"text": "Q", "choices": ["a", "b"], "answer": 0}': "line 2 lacks question or goal or query or ctx; it has: text",
    '{"question": " ", "choices": ["a", "b"], "answer": 0}': "line 2 asks nothing: its question is ' '",
    '{"question": "Q", "answer": 0}': "line 2 lacks choices; it has: question, answer",
    '{"question": "Q", "choices": ["a"], "answer": 0}': "line 2 needs two choices or more",
    '{"question": "Q", "choices": ["a", ""], "answer": 0}': "line 2 needs two choices or more, all of them text",
    '{"goal": "Q", "sol1": "a", "sol2": 3, "label": 0}': "line 2 needs two choices or more, all of them text",
    '{"question": "Q", "choices": ["a", "b"]}': "line 2 lacks answer or label",
    '{"question": "Q", "choices": ["a", "b"], "answer": 2}': "line 2 has the answer 2: it is the number of a choice",
    '{"question": "Q", "choices": ["a", "b"], "answer": true}': "line 2 has the answer True",
    '{"question": "Q", "choices": ["a", "b"], "answer": "B"}': "line 2 has the answer 'B'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_named(line: str, tmp_path: Path) -> None:
    """A line that is no question is refused by its number, with what is wrong and what it has."""
    good = json.dumps({"question": "Q", "choices": ["a", "b"], "answer": 0})
    (tmp_path / "q.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ShortcutError) as caught:
        read_choices(str(tmp_path / "q.jsonl"))
    assert str(caught.value).startswith(f"{tmp_path / 'q.jsonl'}, {WRONG[line]}")
    assert "\n" not in str(caught.value)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    """So are files that are not there, not text or empty, and more questions than there are."""
    with pytest.raises(ShortcutError, match=r'no file gone\.jsonl: questions are a \.jsonl file, or "default"'):
        read_choices("gone.jsonl")
    with pytest.raises(ShortcutError, match=r"cannot read .*: Is a directory"):
        read_choices(str(tmp_path))
    (tmp_path / "q.jsonl").write_bytes(b"\xff")
    with pytest.raises(ShortcutError, match=r"q\.jsonl is not UTF-8 text: invalid start byte at byte 0"):
        read_choices(str(tmp_path / "q.jsonl"))
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(ShortcutError, match=r"q\.jsonl holds 0 questions and is asked for none"):
        read_choices(str(tmp_path / "q.jsonl"))
    for samples, called in ((0, "none"), (201, "201")):
        with pytest.raises(ShortcutError, match=f"holds 200 questions and is asked for {called}"):
            read_choices("default", samples)


def test_likelihoods_that_are_no_numbers_fail(checkpoint_of: Callable[..., Path]) -> None:
    """NaN is one line that says so, and so is a batch of no size."""
    folder = checkpoint_of("llama")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with pytest.raises(ShortcutError, match="--batch-size 0 is not a positive number"):
        answer_choices(model, tokenizer, [LONG], batch_size=0)
    with torch.no_grad():
        model.lm_head.weight[9] = math.nan
    with pytest.raises(ShortcutError, match=r"the model gives NaN or infinity in torch\.float32"):
        answer_choices(model, tokenizer, [Question("a", ("b", "c"), 0)])
