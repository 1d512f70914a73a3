"""The calibration set: the text that scores are computed on, cut into sequences of tokens, and a record of what it was.

By default documents are packed: tokenised, joined and cut into windows of equal length, of which a seed picks some. By
document, every document is one sequence, cut off at the length and padded on the right.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from shortcut.decoder import Batch
from shortcut.errors import ShortcutError

ENOUGH = 8  # times the tokens asked for: what is tokenised of a larger source before windows are picked
# Suffix -> builder of the datasets library: asked for a bare file name it would look for it on the Hub.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "content", "document", "sentence")
EMBEDDED = {"default": "calibration.txt", "heldout": "heldout.txt"}


@dataclass(frozen=True)
class Source:
    """Where the text comes from: "default" and "heldout" are in the package; else a local file or a Hub data set."""

    data: str = "default"
    split: str = "train"
    column: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Sequences of token ids, and everything needed to make them again. `hash` is over the ids themselves."""

    source: Source
    length: int
    seed: int
    by_document: bool
    starts_with_bos: bool
    sequences: tuple[tuple[int, ...], ...]

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the token ids."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(map(len, self.sequences))

    def split(self, samples: int) -> tuple["Calibration", "Calibration"]:
        """All but the last so many sequences, and these."""
        if not 0 < samples < len(self.sequences):
            raise ShortcutError(f"cannot set {samples} of {len(self.sequences)} sequences aside: use more --samples")
        return replace(self, sequences=self.sequences[:-samples]), replace(self, sequences=self.sequences[-samples:])

    @property
    def described(self) -> str:
        """For people: the text, how much of it, and the BOS policy."""
        bos = "each starting with BOS" if self.starts_with_bos else "without BOS"
        return f"{self.source.data} text, {len(self.sequences)} sequences of {self.length} tokens, {bos}"

    def record(self) -> dict[str, Any]:
        """What goes into scores and plans: source, count, length, seed, hash."""
        return {
            **asdict(self.source),
            "samples": len(self.sequences),
            "length": self.length,
            "tokens": self.tokens,
            "seed": self.seed,
            "by_document": self.by_document,
            "starts_with_bos": self.starts_with_bos,
            "hash": self.hash,
        }


def make_calibration(
    tokenizer: Any, source: Source, *, samples: int, length: int, seed: int = 0, by_document: bool = False
) -> Calibration:
    """Tokenise a source into `samples` sequences of `length` tokens, the same for the same seed on every machine.

    Every sequence starts with the BOS token if the tokenizer puts one before text. Raises ShortcutError where the
    source cannot be read, or holds less text than was asked for.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 2 - (name == "samples"):
            raise ShortcutError(f"--{name} {value} is too small")
    bos = leading_bos(tokenizer)
    room = length - len(bos)
    pieces: list[Sequence[int]] = []
    joined: list[int] = []
    enough = ENOUGH * samples * room
    for document in read_documents(source, seed):
        tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
        if by_document and tokens:
            pieces.append(tokens[:room])
        elif tokens:
            joined += ([tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []) + tokens
        if len(pieces) == samples or len(joined) >= enough:
            break
    if not by_document:
        windows = [joined[start : start + room] for start in range(0, len(joined) - room + 1, room)]
        chosen = random.Random(seed).sample(range(len(windows)), min(samples, len(windows)))
        pieces = [windows[number] for number in sorted(chosen)]
    if len(pieces) < samples:
        unit = "documents" if by_document else f"sequences of {length} tokens"
        raise ShortcutError(f"{source.data} holds {len(pieces)} {unit} and --samples asks for {samples}")
    return Calibration(source, length, seed, by_document, bool(bos), tuple((*bos, *piece) for piece in pieces))


def leading_bos(tokenizer: Any) -> tuple[int, ...]:
    """The BOS token as a sequence of one if this tokenizer puts it before every text, else an empty one."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()


def read_documents(source: Source, seed: int) -> Iterator[str]:
    """Yield the documents of a source, several in an order that the seed decides. A .txt file is one document.

    Raises ShortcutError for a file that is not there or not readable, and a split or column that it does not have.
    """
    path = Path(source.data)
    if source.data in EMBEDDED:
        yield files("shortcut").joinpath("data", EMBEDDED[source.data]).read_text(encoding="utf-8")
    elif path.suffix == ".txt":
        yield _read_text(path)
    else:
        yield from _read_rows(source, path, seed)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ShortcutError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise ShortcutError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ShortcutError(f"cannot read {path}: {error.strerror}") from None


def _read_rows(source: Source, path: Path, seed: int) -> Iterator[str]:
    import datasets

    local = path.suffix in BUILDERS
    if local and not path.is_file():
        raise ShortcutError(f"no file {path}")
    if not local and (path.exists() or source.data.count("/") > 1):
        raise ShortcutError(f"cannot read {source.data}: --data takes {', '.join(['.txt', *BUILDERS])} or a Hub id")
    datasets.disable_progress_bars()
    name, _, subset = source.data.partition(":")
    try:
        if local:
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train").shuffle(seed=seed)
        else:
            rows = datasets.load_dataset(name, subset or None, split=source.split, streaming=True)
            rows = rows.shuffle(seed=seed, buffer_size=1000)
        column = None
        for row in rows:
            column = column or _pick_column(source, row)
            if not isinstance(row[column], str):
                raise ShortcutError(f"column {column!r} of {source.data} holds {type(row[column]).__name__}, not text")
            yield row[column]
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ShortcutError(f"cannot read the data set {source.data}: {reason}") from None


def _pick_column(source: Source, row: dict[str, Any]) -> str:
    if source.column is not None:
        if source.column not in row:
            raise ShortcutError(f"no column {source.column!r} in {source.data}; it has: {', '.join(row)}")
        return source.column
    for name in (*TEXT_COLUMNS, *(row if len(row) == 1 else ())):
        if name in row:
            return name
    raise ShortcutError(f"which column of {source.data} is the text? Name it with --column: {', '.join(row)}")


def make_batches(calibration: Calibration, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The sequences in batches on a device, shorter ones padded on the right with token 0 and masked."""
    if batch_size < 1:
        raise ShortcutError(f"--batch-size {batch_size} is not a positive number")
    batches = []
    for start in range(0, len(calibration.sequences), batch_size):
        rows = [torch.tensor(row) for row in calibration.sequences[start : start + batch_size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        batches.append(Batch(ids.to(device), mask.to(device)))
    return batches
