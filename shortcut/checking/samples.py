"""What models write behind the same prompts, or answer to the same questions: to be read side by side, not counted."""

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from shortcut.live.load import LOADING_ERRORS, Model, load_tokenizer
from shortcut.material.examples import Material
from shortcut.material.pictures import Pictures

# A question where there is a chat template, else the beginning of a text.
PROMPTS = (
    ("Why is the sky blue? Answer in one sentence.", "The sky is blue because"),
    ("Begin a story about the keeper of a lighthouse.", "The old keeper of the lighthouse"),
    ("I have 17 apples and buy 25 more. How many are there?", "Seventeen apples and twenty-five more are"),
)
SAMPLE_TOKENS = 40
SHOWN_QUESTIONS, SIDE = 6, 224  # questions about images that are shown, and pixels of their longer side at most


@dataclass(frozen=True)
class Sample:
    """A prompt and what is written behind it, by the name of the model that wrote it.

    right: the right answer, where one is known. images: what the question is about, as data URIs.
    """

    prompt: str
    written: Mapping[str, str]
    right: str | None = None
    images: tuple[str, ...] = ()


@torch.inference_mode()
def write_on(model: Model, folder: Path, *, trust_remote_code: bool = False) -> list[tuple[str, str]]:
    """Every prompt and what a live model writes behind it, by greedy decoding, one by one: nothing is padded.

    folder: of its checkpoint, for the tokenizer. Empty where this model cannot write: that is no fault of a cut.
    """
    from jinja2 import TemplateError

    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    asked = bool(getattr(tokenizer, "chat_template", None))
    prompts = [question if asked else beginning for question, beginning in PROMPTS]
    try:
        return [(prompt, _continue(model, tokenizer, prompt, asked=asked)) for prompt in prompts]
    except (*LOADING_ERRORS, TemplateError):
        return []


def _continue(model: Model, tokenizer: Any, prompt: str, *, asked: bool) -> str:
    """What comes behind one prompt; asked: whether it is put as a message of the user."""
    if asked:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not asked)
    ids, mask = (inputs[name].to(model.device) for name in ("input_ids", "attention_mask"))
    room = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    number = int(min(SAMPLE_TOKENS, room - ids.shape[1]))
    new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=number, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def pair_samples(heldout: Material, written: Mapping[str, Sequence[Any]]) -> tuple[Sample, ...]:
    """Put side by side what models wrote; written: by model, what `write_on` found, or the answers to all questions.

    Of questions about images a few are taken: first those that are not answered alike.
    """
    if not isinstance(heldout, Pictures):
        rows = zip(*written.values(), strict=False)  # a model that cannot write has no rows
        return tuple(Sample(row[0][0], {name: row[n][1] for n, name in enumerate(written)}) for row in rows)
    order = sorted(range(len(heldout.sequences)), key=lambda n: len({given[n] for given in written.values()}) == 1)
    found = []
    for place in order[:SHOWN_QUESTIONS]:
        pair, given = heldout.sequences[place], {name: answers[place] for name, answers in written.items()}
        found.append(Sample(pair.question, given, pair.answer, tuple(map(as_uri, pair.images))))
    return tuple(found)


def as_uri(image: Any) -> str:
    """An image as a data URI, scaled down where it is large."""
    small, file = image.convert("RGB"), BytesIO()
    small.thumbnail((SIDE, SIDE))
    kind = "jpeg" if max(image.size) > SIDE else "png"
    small.save(file, kind, quality=80)
    return f"data:image/{kind};base64,{b64encode(file.getvalue()).decode()}"
