"""Multiple-choice questions: which choice a model finds likeliest, measured as lm-evaluation-harness 0.4 measures it.

The model sees a question, a blank and one choice, and the log likelihoods of the choice's tokens are added up. The
likeliest choice is the answer (acc); by another count, the one likeliest per character (acc_norm).
"""

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from torch import nn

from shortcut.common.errors import ShortcutError
from shortcut.common.progress import track
from shortcut.live.blocks import device_of, run_model
from shortcut.live.load import Model
from shortcut.material.calibration import leading_bos, pad, tokenise
from shortcut.material.documents import read_text

QUESTION_FIELDS, ANSWER_FIELDS = ("question", "goal", "query", "ctx"), ("answer", "label")
Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval


@dataclass(frozen=True)
class Question:
    """A question as a model is shown it, and its choices; answer: the number of the right one, from 0."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def is_right(self, values: Sequence[float]) -> bool:
        """Whether the right choice has the highest value; of equal ones the first counts."""
        return values.index(max(values)) == self.answer


@dataclass(frozen=True)
class Chosen:
    """The summed log likelihood of every choice of every question, and how often the right choice is the likeliest."""

    questions: tuple[Question, ...]
    likelihoods: tuple[tuple[float, ...], ...]

    @cached_property
    def right(self) -> tuple[bool, ...]:
        """Whether every question is answered rightly, by the sum."""
        return tuple(q.is_right(sums) for q, sums in zip(self.questions, self.likelihoods, strict=True))

    @cached_property
    def right_norm(self) -> tuple[bool, ...]:
        """Whether every question is answered rightly, by the sum per character of the choice."""
        return tuple(
            question.is_right([total / len(choice) for total, choice in zip(sums, question.choices, strict=True)])
            for question, sums in zip(self.questions, self.likelihoods, strict=True)
        )

    @property
    def accuracy(self) -> float:
        """The share of questions answered rightly by the sum, from 0 to 1."""
        return fmean(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `accuracy`."""
        return interval_of(self.right)


@dataclass(frozen=True)
class Flips:
    """The questions, by place from 0, that one model answers wrongly and the next rightly (gained), and the reverse.

    p: of McNemar's exact test, two-sided: how often as many flips would fall as unevenly if either way were as likely.
    """

    gained: tuple[int, ...]
    lost: tuple[int, ...]

    @property
    def p(self) -> float:
        """From 0 to 1; 1 where nothing flipped."""
        flips, fewer = len(self.gained) + len(self.lost), min(len(self.gained), len(self.lost))
        return min(1.0, 2 * sum(math.comb(flips, k) for k in range(fewer + 1)) / 2**flips)


def find_flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """Pair what two models got right of the same questions."""
    pairs = list(enumerate(zip(before, after, strict=True)))
    gained = tuple(place for place, pair in pairs if pair == (False, True))
    return Flips(gained, tuple(place for place, pair in pairs if pair == (True, False)))


def interval_of(right: Sequence[bool]) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson's score interval), which stays within 0 and 1."""
    share, n = fmean(right), len(right)
    middle, spread = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    return max(0.0, (middle - spread) / (1 + Z**2 / n)), min(1.0, (middle + spread) / (1 + Z**2 / n))


def read_choices(source: str, samples: int | None = None, seed: int = 0) -> tuple[Question, ...]:
    """Read the questions of a JSONL file, or "default", those of the package; so many that the seed picks, in order.

    A line has a question (or goal, query, ctx), choices and the number of the right one (answer or label), from 0; or
    is in PIQA's own form, goal, sol1, sol2 and label, asked as lm-evaluation-harness asks it. Raises ShortcutError for
    a file or line that is not so.
    """
    path = Path(str(files("shortcut").joinpath("data", "questions.jsonl"))) if source == "default" else Path(source)
    lines = enumerate(read_text(path, ': questions are a .jsonl file, or "default"').split("\n"), 1)
    found = [_read_choice(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    wanted = len(found) if samples is None else samples
    if not 0 < wanted <= len(found):
        raise ShortcutError(f"{path} holds {len(found)} questions and is asked for {wanted or 'none'}")
    places = sorted(random.Random(seed).sample(range(len(found)), wanted))
    return tuple(found[place] for place in places)


def _read_choice(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ShortcutError(f"{where} is not JSON: {line[:60]}") from None
    if not isinstance(row, dict):
        raise ShortcutError(f"{where} is no object with question, choices and answer: {line[:60]}")
    if {"goal", "sol1", "sol2"} <= row.keys():
        asked, choices = f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
    else:
        asked, choices = _field(row, QUESTION_FIELDS, where), _field(row, ("choices",), where)
    if not isinstance(asked, str) or not asked.strip():
        raise ShortcutError(f"{where} asks nothing: its question is {asked!r}")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ShortcutError(f"{where} needs two choices or more, all of them text")
    answer = _field(row, ANSWER_FIELDS, where)
    if str(answer) not in map(str, range(len(choices))):
        raise ShortcutError(f"{where} has the answer {answer!r}: it is the number of a choice, 0 to {len(choices) - 1}")
    return Question(asked, tuple(choices), int(answer))


def _field(row: dict[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ShortcutError(f"{where} lacks {' or '.join(names)}; it has: {', '.join(row)}")


def hash_of(questions: Sequence[Question]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of questions, choices and answers."""
    return hashlib.sha256(json.dumps([astuple(question) for question in questions]).encode()).hexdigest()[:16]


def check_choices(tokenizer: Any, questions: Sequence[Question], limit: int | None) -> None:
    """Raise ShortcutError, before the long work, for a choice that is longer than the tokens that a model takes."""
    for question in questions:
        for choice in question.choices:
            _encode(tokenizer, question.question, choice, limit)


@torch.inference_mode()
def answer_choices(
    model: Model,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    batch_size: int = 4,
    label: str = "questions",
    quiet: bool = True,
) -> Chosen:
    """Take the log likelihood of every choice behind its question, as a live model sees it.

    Every choice is a sequence of its own with the question in front, padded on the right, the longest first: so it is
    right for every family, with a cache or without. What is longer than the model takes loses its beginning. Raises
    ShortcutError for a choice that is longer alone, and where the result is not finite.
    """
    if batch_size < 1:
        raise ShortcutError(f"--batch-size {batch_size} is not a positive number")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = [_encode(tokenizer, q.question, choice, limit) for q in questions for choice in q.choices]
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
    sums = [0.0] * len(rows)
    for start in track(range(0, len(rows), batch_size), label, quiet=quiet):
        places = order[start : start + batch_size]
        batch = pad([rows[place][0] for place in places], device_of(model))
        logits = run_model(model, batch.inputs)
        for place, ids, row in zip(places, batch.ids, logits, strict=True):
            end, first = len(rows[place][0]), rows[place][1]
            losses = nn.functional.cross_entropy(row[first - 1 : end - 1].float(), ids[first:end], reduction="sum")
            sums[place] = -losses.item()
    if not all(map(math.isfinite, sums)):
        raise ShortcutError(f"the model gives NaN or infinity in {logits.dtype}: use --dtype float32 or bfloat16")
    rest = iter(sums)
    return Chosen(tuple(questions), tuple(tuple(next(rest) for _ in q.choices) for q in questions))


def _encode(tokenizer: Any, question: str, choice: str, limit: int | None) -> tuple[list[int], int]:
    """Token ids of a question, a blank and a choice, with BOS where the tokenizer puts it; and where the choice starts.

    Blanks at the end of the question belong to the choice; its first token is the first one behind as many as the
    question takes alone.
    """
    bos, asked = leading_bos(tokenizer), question.rstrip()
    whole = [*bos, *tokenise(tokenizer, f"{question} {choice}", None)]
    first = min(len(bos) + len(tokenise(tokenizer, asked, None)), len(whole) - 1)
    over = max(0, len(whole) - (limit or len(whole)))
    if first - over < 1:
        raise ShortcutError(f"the choice {choice[:60]!r} is longer than the {limit} tokens that the model takes")
    return whole[over:], first - over
