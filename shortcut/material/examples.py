"""Images, sounds, and texts with what is to be said of them: for models that read other things than plain text.

What a model reads is its modalities, and whether it has a decoder behind an encoder, which then is given what it is to
say (teacher forcing). Without data of one's own, images are drawn, sounds are made up, and the text to read and the
text to say are neighbouring pieces of prose.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from inspect import signature
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.material.calibration import Calibration
from shortcut.material.documents import EMBEDDED, Source, read_documents, read_rows
from shortcut.material.pictures import DRAWN, IMAGE_COLUMNS, Pictures, open_image

READ_COLUMNS = ("source", "input", "document", "article", "text", "caption", "sentence")
SAID_COLUMNS = ("target", "output", "summary", "translation", "transcription", "answer")
AUDIO_COLUMNS = ("audio", "sound", "speech", "audio_path", "file_name")
SECONDS, TONES = 2, 3  # of a sound that is made up: how long it is, and of how many tones


@dataclass(frozen=True)
class Example:
    """What one model call is about: an image, a sound or a text to read, and what is to be said of it."""

    image: Any = None
    sound: Any = None
    read: str | None = None
    said: str | None = None


@dataclass(frozen=True)
class Examples:
    """Examples as a reader writes them, and everything needed to make them again.

    reads: "text", "image", "audio", what of these the model reads; reader: a processor, tokenizer, or what makes inputs
    of images or sounds; start: the token that what is said starts
    with; length: tokens of a text at most.
    """

    source: Source
    seed: int
    length: int
    reads: tuple[str, ...]
    reader: Any
    start: int | None
    sequences: tuple[Example, ...]

    @cached_property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of texts, pixels and samples of sound."""
        digest = hashlib.sha256()
        for example in self.sequences:
            digest.update(repr((example.read, example.said)).encode())
            digest.update(b"" if example.image is None else example.image.tobytes())
            digest.update(b"" if example.sound is None else example.sound.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def tokens(self) -> int:
        """Number of real tokens of text; of examples without text, of examples."""
        return sum(int(batch.mask.sum()) for batch in self.batches(1))

    def take(self, places: Iterable[int]) -> "Examples":
        """Some of the examples: those at these places."""
        return replace(self, sequences=tuple(self.sequences[place] for place in places))

    def split(self, samples: int) -> tuple["Examples", "Examples"]:
        """All but so many examples, and these: the last."""
        rest = len(self.sequences) - samples
        if not 0 < samples < len(self.sequences):
            raise ShortcutError(f"cannot set {samples} of {len(self.sequences)} examples aside: use more --samples")
        return self.take(range(rest)), self.take(range(rest, len(self.sequences)))

    @property
    def described(self) -> str:
        """For people: the data, and how much of it."""
        return f"{self.source.data}, {len(self.sequences)} examples of {' and '.join(self.reads)}"

    def record(self) -> dict[str, Any]:
        """What goes into scores and plans: source, count, seed, hash."""
        counts = {"samples": len(self.sequences), "length": self.length, "tokens": self.tokens}
        return {**asdict(self.source), "reads": list(self.reads), **counts, "seed": self.seed, "hash": self.hash}

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
        """The examples in batches on a device, shorter ones padded on the right."""
        if batch_size < 1:
            raise ShortcutError(f"--batch-size {batch_size} is not a positive number")
        starts = range(0, len(self.sequences), batch_size)
        return [self._batch(self.sequences[start : start + batch_size]).to(torch.device(device)) for start in starts]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        first = examples[0]
        try:
            given: dict[str, Any] = {}
            if first.image is not None:
                images = [example.image for example in examples]
                given |= dict(getattr(self.reader, "image_processor", self.reader)(images, return_tensors="pt"))
            if first.sound is not None:
                given |= self._hear([example.sound for example in examples])
            if first.read is not None:
                given |= self._write([example.read for example in examples], whole=first.image is not None)
            said = None if first.said is None else self._write([example.said for example in examples], say=True)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ShortcutError(f"the processor does not take {self.source.data}: {reason}") from None
        if said is not None:
            ids, mask = _behind(said["input_ids"], self.start or 0), _behind(said["attention_mask"], 1)
            return Batch(ids, mask.bool(), extra=given, name="decoder_input_ids")
        if "input_ids" in given:
            ids = given.pop("input_ids")
            mask = given.pop("attention_mask", torch.ones_like(ids)).bool()
            return Batch(ids, mask, extra=given)
        one = torch.zeros(len(examples), 1, dtype=torch.long)  # there are no tokens
        return Batch(one, torch.ones_like(one, dtype=torch.bool), extra=given, name="")

    def _hear(self, sounds: list[Any]) -> dict[str, Any]:
        hears = _hearing(self.reader)
        pads = signature(hears.__call__).parameters["padding"].default  # some are called with sounds of one length only
        return dict(hears(sounds, sampling_rate=hears.sampling_rate, padding=pads or True, return_tensors="pt"))

    def _write(self, texts: Sequence[str | None], *, whole: bool = False, say: bool = False) -> dict[str, Any]:
        """Token ids and their mask. whole: padded as far as the tokenizer goes, as towers are trained that pool the
        last token; say: as what is said, for which some tokenizers have another vocabulary."""
        tokenizer = getattr(self.reader, "tokenizer", self.reader)
        tokenizer.padding_side = "right"
        length = min(self.length, tokenizer.model_max_length)
        how = {"padding": "max_length" if whole else True, "truncation": True, "max_length": length}
        return dict(tokenizer(**{"text_target" if say else "text": list(texts)}, return_tensors="pt", **how))


Material = Calibration | Pictures | Examples  # what models are scored and measured on


def _behind(rows: torch.Tensor, first: int) -> torch.Tensor:
    """Rows of values, (batch, tokens), each behind a first one."""
    return torch.cat([torch.full_like(rows[:, :1], first), rows], dim=1)


def make_examples(
    reader: Any,
    modalities: Collection[str],
    start: int | None,
    source: Source,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    fewer: bool = False,
) -> Examples:
    """Take examples from a source, the same for the same seed on every machine.

    modalities: what the model reads: "text", "image", "audio"; start: the token that what is said starts with, of a
    model that has a decoder behind an encoder. fewer: whether fewer will do where there are no more. Raises
    ShortcutError where the source cannot be read, lacks a column, or holds fewer than asked for.
    """
    if source.chat_template:
        raise ShortcutError("a model that reads other things than conversations has no use for --chat-template")
    if samples < 1:
        raise ShortcutError(f"--samples {samples} is too small")
    says, prose = start is not None, Path(source.data).suffix == ".txt"
    if prose and set(modalities) - {"text"}:
        raise ShortcutError(f"{source.data} is text alone, and the model reads {' and '.join(sorted(modalities))}")
    if prose or source.data in {*EMBEDDED, *DRAWN}:
        found = _make_up(source, modalities, says, samples, length, seed, reader)
    else:
        found = _read(source, modalities, says, seed, reader)
    examples = tuple(islice(found, samples))
    if len(examples) < (1 if fewer else samples):
        raise ShortcutError(f"{source.data} holds {len(examples)} examples and --samples asks it for {samples}")
    return Examples(source, seed, length, tuple(sorted(modalities)), reader, start, examples)


def _make_up(
    source: Source, modalities: Collection[str], says: bool, samples: int, length: int, seed: int, reader: Any
) -> Iterator[Example]:
    """Examples of no data but prose: drawn images with what is asked about them, made-up sounds, neighbouring texts."""
    if "image" in modalities:
        if find_spec("PIL") is None:
            raise ShortcutError("images need the package pillow: pip install pillow")
        from shortcut.material.drawings import draw

        for drawing in draw(samples, 2 * seed + DRAWN[source.data]):
            text = drawing.question if "text" in modalities else None
            yield Example(image=drawing.image, read=None if says else text, said=text if says else None)
        return
    words = " ".join(map(str, read_documents(source, seed))).split()
    pieces = [" ".join(words[at : at + length // 2]) for at in range(0, len(words) - length // 2, length // 2)]
    for place in np.random.RandomState(seed).permutation(len(pieces) // 2)[:samples]:
        read, said = pieces[2 * place : 2 * place + 2]
        sound = _tones(int(place), reader) if "audio" in modalities else None
        yield Example(sound=sound, read=read if sound is None else None, said=said if says else None)


def _tones(number: int, reader: Any) -> Any:
    """A sound that is no speech: a few tones and some noise, always the same for a number: (samples,) float32."""
    rate, rng = _hearing(reader).sampling_rate, np.random.RandomState(number)
    times = np.arange(SECONDS * rate) / rate
    starts, pitches = rng.uniform(0, SECONDS / 2, TONES), rng.uniform(80, 2000, TONES)
    tones = [(times > start) * np.sin(2 * np.pi * pitch * times) for start, pitch in zip(starts, pitches, strict=True)]
    return (np.mean(tones, axis=0) + 0.05 * rng.standard_normal(len(times))).astype(np.float32)


def _read(source: Source, modalities: Collection[str], says: bool, seed: int, reader: Any) -> Iterator[Example]:
    """The rows of a file or data set as examples."""
    folder, reading = Path(source.data).parent, READ_COLUMNS if source.column is None else (source.column,)
    reads = "text" in modalities and not (says and set(modalities) - {"text"})  # else its text is what it is to say
    saying = SAID_COLUMNS if reads else (*SAID_COLUMNS, *reading)
    for row in read_rows(source, seed):
        image = open_image(_cell(source, row, "image", IMAGE_COLUMNS), folder) if "image" in modalities else None
        heard = _cell(source, row, "sound", AUDIO_COLUMNS) if "audio" in modalities else None
        sound = None if heard is None else _open_sound(heard, folder, _hearing(reader).sampling_rate)
        read = str(_cell(source, row, "text to read", reading)) if reads else None
        yield Example(image, sound, read, str(_cell(source, row, "text to say", saying)) if says else None)


def _hearing(reader: Any) -> Any:
    """The part of a processor that makes inputs of sounds."""
    return getattr(reader, "feature_extractor", reader)


def _cell(source: Source, row: Mapping[str, Any], what: str, columns: Sequence[str]) -> Any:
    found = next((row[column] for column in columns if row.get(column) is not None), None)
    if found is None:
        looked = f"looked for: {', '.join(columns)}"
        raise ShortcutError(f"{source.data} has a row without {what} ({looked}): {str(row)[:80]}")
    return found


def _open_sound(cell: Any, folder: Path, rate: int) -> Any:
    """The sound that a cell of a data set holds, or names by its path: (samples,) float32.

    rate: samples a second. Raises ShortcutError for another rate, and for what is no sound.
    """
    if find_spec("soundfile") is None:
        raise ShortcutError("sounds need the package soundfile: pip install soundfile")
    import soundfile

    name = cell if isinstance(cell, str) else "a sound"
    held = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    try:
        file = BytesIO(held) if isinstance(held, bytes) else folder / str(held)
        sound, found = soundfile.read(file, dtype="float32")
    except (OSError, RuntimeError) as error:
        raise ShortcutError(f"cannot read the sound {name}: {error}") from None
    if found != rate:
        raise ShortcutError(f"{name} has {found} samples a second, and the model hears {rate}: resample it")
    return sound if sound.ndim == 1 else sound.mean(axis=1)
