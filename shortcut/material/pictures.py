"""Images with questions: where they come from, and the batches that a vision-language model reads."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.material.documents import Source, parse_domains, read_rows

DRAWN = {"default": 0, "drawings": 0, "heldout": 1}  # those that come with the package: even seeds and odd ones
IMAGE_COLUMNS = ("image", "images", "img", "picture", "image_path", "image_url", "file_name")
QUESTION_COLUMNS = ("question", "prompt", "instruction", "query", "text", "problem")
ANSWER_COLUMNS = ("answer", "answers", "label", "response", "multiple_choice_answer")
SECONDS = 30  # to wait for an image from the network
NOT_INPUTS = ("input_ids", "attention_mask", "labels")


@dataclass(frozen=True)
class Pair:
    """Images, what is asked about them, and the right answer where it is known."""

    images: tuple[Any, ...]
    question: str
    answer: str | None


@dataclass(frozen=True)
class Pictures:
    """Questions about images as a processor writes them, and everything needed to make them again.

    visual: the ids of tokens that stand for parts of images. answered: whether the answers are written as well.
    """

    source: Source
    seed: int
    processor: Any
    visual: tuple[int, ...]
    sequences: tuple[Pair, ...]
    answered: bool = False

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of questions, answers and pixels."""
        digest = hashlib.sha256()
        for pair in self.sequences:
            digest.update(repr((pair.question, pair.answer, [image.size for image in pair.images])).encode())
            for image in pair.images:
                digest.update(image.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(int(batch.mask.sum()) for batch in self.batches(1))

    def take(self, places: Iterable[int]) -> "Pictures":
        """Some of the questions: those at these places."""
        return replace(self, sequences=tuple(self.sequences[place] for place in places))

    def split(self, samples: int) -> tuple["Pictures", "Pictures"]:
        """All but so many questions, and these: the last."""
        rest = len(self.sequences) - samples
        if not 0 < samples < len(self.sequences):
            raise ShortcutError(f"cannot set {samples} of {len(self.sequences)} questions aside: use more --samples")
        return self.take(range(rest)), self.take(range(rest, len(self.sequences)))

    @property
    def described(self) -> str:
        """For people: the data, and how much of it."""
        return f"{self.source.data} images, {len(self.sequences)} questions"

    def record(self) -> dict[str, Any]:
        """What goes into scores and plans: source, count, seed, hash."""
        counts = {"samples": len(self.sequences), "tokens": self.tokens}
        return {**asdict(self.source), **counts, "seed": self.seed, "hash": self.hash}

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
        """The questions in batches on a device, shorter ones padded on the right."""
        if batch_size < 1:
            raise ShortcutError(f"--batch-size {batch_size} is not a positive number")
        starts = range(0, len(self.sequences), batch_size)
        return [self._batch(self.sequences[start : start + batch_size]).to(torch.device(device)) for start in starts]

    def _batch(self, pairs: Sequence[Pair]) -> Batch:
        self.processor.tokenizer.padding_side = "right"
        read = encode(self.processor, pairs, answered=self.answered)
        ids, mask = read["input_ids"], read["attention_mask"].bool()
        extra = {name: value for name, value in read.items() if name not in NOT_INPUTS}
        answers = None
        if self.answered:
            asked = encode(self.processor, pairs)["attention_mask"].sum(dim=1, keepdim=True)
            answers = mask & (torch.arange(ids.shape[1]) >= asked)
        return Batch(ids, mask, torch.isin(ids, torch.tensor(self.visual)), extra, answers)

    def with_answers(self) -> "Pictures":
        """The same, with the answers behind the questions. Raises ShortcutError where one is not known."""
        if missing := [pair.question for pair in self.sequences if pair.answer is None]:
            raise ShortcutError(f"{self.source.data} has no answer to {missing[0][:60]!r}: training needs answers")
        return replace(self, answered=True)


def encode(processor: Any, pairs: Sequence[Pair], *, answered: bool = False) -> dict[str, Any]:
    """What a processor makes of questions with their images, as they are put to the model, padded to equal length.

    Raises ShortcutError for what the processor does not take.
    """
    try:
        prompts = [prompt(processor, pair, answered=answered) for pair in pairs]
        bos = getattr(processor.tokenizer, "bos_token", None)
        special = not (bos and all(text.startswith(bos) for text in prompts))
        images = [list(pair.images) for pair in pairs]
        return dict(processor(images, prompts, padding=True, return_tensors="pt", add_special_tokens=special))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShortcutError(f"the processor does not take these images with these questions: {reason}") from None


def prompt(processor: Any, pair: Pair, *, answered: bool = False) -> str:
    """A question as the model is asked it: by the chat template, where there is one, else behind its images.

    answered: whether its answer, and what ends one, is behind it.
    """
    if getattr(processor, "chat_template", None):
        content = [*({"type": "image"} for _ in pair.images), {"type": "text", "text": pair.question}]
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if answered:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": pair.answer}]})
        return processor.apply_chat_template(turns, add_generation_prompt=not answered)
    end = f"\n{pair.answer}{processor.tokenizer.eos_token or ''}" if answered else ""
    return f"{processor.image_token * len(pair.images)}\n{pair.question}{end}"


def make_pictures(
    processor: Any, visual: tuple[int, ...], source: Source, *, samples: int, seed: int = 0, fewer: bool = False
) -> Pictures:
    """Take questions about images from a source, the same for the same seed on every machine.

    fewer: whether fewer will do where there are no more. Raises ShortcutError where the source cannot be read, an image
    is none, or there are fewer than asked for.
    """
    if source.chat_template:
        raise ShortcutError(
            "questions about images go through the processor's chat template: leave out --chat-template"
        )
    if samples < 1:
        raise ShortcutError(f"--samples {samples} is too small")
    if find_spec("PIL") is None:
        raise ShortcutError('images need the package pillow: pip install "shortcut[vision]"')
    if source.data in DRAWN:
        from shortcut.material.drawings import draw

        drawn = draw(samples, 2 * seed + DRAWN[source.data])
        pairs = [Pair((drawing.image,), drawing.question, drawing.answer) for drawing in drawn]
    else:
        pairs = []
        for pair in read_pairs(source, seed):
            pairs.append(pair)
            if len(pairs) == samples:
                break
    if len(pairs) < (1 if fewer else samples):
        raise ShortcutError(f"{source.data} holds {len(pairs)} questions and --samples asks it for {samples}")
    return Pictures(source, seed, processor, visual, tuple(pairs))


def holds_images(source: Source) -> bool:
    """Whether a source has images beside its text. Raises ShortcutError as `read_rows` does."""
    if source.data == "drawings":
        return True
    domains = list(parse_domains(source.data))
    if domains[0] in DRAWN or Path(domains[0]).suffix == ".txt" or len(domains) > 1:
        return False
    first = next(iter(read_rows(replace(source, data=domains[0]), seed=0)), {})
    return any(column in first for column in IMAGE_COLUMNS)


def read_pairs(source: Source, seed: int) -> Iterator[Pair]:
    """Yield the questions of a file or Hub data set with their images, in an order that the seed decides."""
    for row in read_rows(source, seed):
        image = next((row[column] for column in IMAGE_COLUMNS if row.get(column) is not None), None)
        question = next((row[column] for column in _columns(source) if isinstance(row.get(column), str)), None)
        if image is None or question is None:
            missing = "image" if image is None else f"question (looked for: {', '.join(_columns(source))})"
            raise ShortcutError(f"{source.data} has a row without {missing}: {str(row)[:80]}")
        answer = next((row[column] for column in ANSWER_COLUMNS if isinstance(row.get(column), str)), None)
        cells = image if isinstance(image, list) else [image]
        yield Pair(tuple(open_image(cell, Path(source.data).parent) for cell in cells), question, answer)


def _columns(source: Source) -> tuple[str, ...]:
    return QUESTION_COLUMNS if source.column is None else (source.column,)


def open_image(cell: Any, folder: Path) -> Any:
    """The image that a cell of a data set holds or names: by its path, seen from the folder, or by its address.

    Raises ShortcutError for what is no image.
    """
    from PIL import Image, UnidentifiedImageError

    name = cell if isinstance(cell, str) else "an image"
    try:
        if isinstance(cell, Image.Image):
            return cell.convert("RGB")
        if isinstance(cell, dict):
            name = str(cell.get("path") or name)
            cell = cell.get("bytes") or cell.get("path")
        if isinstance(cell, str) and cell.startswith(("http://", "https://")):
            with urlopen(cell, timeout=SECONDS) as answer:
                cell = answer.read()
        return Image.open(BytesIO(cell) if isinstance(cell, bytes) else folder / cell).convert("RGB")
    except UnidentifiedImageError:
        raise ShortcutError(f"{name} is no image that can be read") from None
    except (OSError, TypeError, ValueError) as error:
        raise ShortcutError(f"cannot read the image {name}: {getattr(error, 'strerror', None) or error}") from None
