"""What a vision-language model answers to questions about images, and how often it is right."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shortcut.common.progress import track
from shortcut.live.load import Model
from shortcut.material.pictures import Pictures, encode

ANSWER_TOKENS = 16  # of an answer at most


@dataclass(frozen=True)
class Answers:
    """Shares of questions: answered rightly by the base and by the shortened model, and alike by both.

    right, right_base: None where the right answers are not known; same, right_base: None without a base.
    """

    questions: int
    right: float | None
    right_base: float | None
    same: float | None


@torch.inference_mode()
def answer(
    model: Model, pictures: Pictures, batch_size: int, label: str, *, tokens: int = ANSWER_TOKENS, quiet: bool = True
) -> list[str]:
    """What a live model answers to every question, by greedy decoding of so many tokens at most."""
    pairs, processor = pictures.sequences, pictures.processor
    processor.tokenizer.padding_side = "left"
    found: list[str] = []
    for start in track(range(0, len(pairs), batch_size), label, quiet=quiet):
        inputs = encode(processor, pairs[start : start + batch_size])
        inputs = {name: v.to(model.device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        found += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return found


def compare_answers(pictures: Pictures, answers: Sequence[str], base: Sequence[str] | None) -> Answers:
    """Count right answers, and those that are the base's. Case and a full stop at the end do not matter."""
    known = [(place, pair.answer) for place, pair in enumerate(pictures.sequences) if pair.answer is not None]

    def right(given: Sequence[str] | None) -> float | None:
        if given is None or not known:
            return None
        return sum(_plain(given[place]) == _plain(wanted) for place, wanted in known) / len(known)

    same = None if base is None else sum(map(str.__eq__, answers, base)) / len(answers)
    return Answers(len(answers), right(answers), right(base), same)


def _plain(text: str) -> str:
    return text.strip().rstrip(".").casefold()
