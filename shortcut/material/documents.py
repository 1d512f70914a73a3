"""Where text comes from: documents of files and Hub data sets, each plain text or a conversation."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from shortcut.common.errors import ShortcutError

# Suffix -> builder of the datasets library: asked for a bare file name it would look for it on the Hub.
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
TEXT_COLUMNS = ("text", "content", "document", "sentence")
CHAT_COLUMNS = ("messages", "conversations")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names of them
EMBEDDED = {"default": "calibration.txt", "heldout": "heldout.txt"}

Conversation = list[dict[str, Any]]  # messages of role and content


@dataclass(frozen=True)
class Source:
    """Where the text comes from: "default" and "heldout" are in the package; else a local file or a Hub data set.

    data: one of these or several, with commas, each with its weight: "3*a.txt,b.jsonl". chat_template: whether the
    tokenizer's chat template writes the documents, which may then be conversations.
    """

    data: str = "default"
    split: str = "train"
    column: str | None = None
    chat_template: bool = False


def parse_domains(data: str) -> dict[str, float]:
    """What text is taken from, and with what weight, 1 where none is given: "3*a.txt,b.jsonl".

    Raises ShortcutError for a weight that is not a positive number, and a name that is missing or there twice.
    """
    domains: dict[str, float] = {}
    for part in data.split(","):
        weight, star, name = part.strip().rpartition("*")
        name = name.strip()
        try:
            number = float(weight) if star else 1.0
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ShortcutError(f'{data}: the weight {weight!r} is not a positive number, such as in "3*a.txt,b.jsonl"')
        if not name:
            raise ShortcutError(f"{data!r} lacks the name of a text, or has a comma too many")
        if Path(name).resolve() in (Path(other).resolve() for other in domains):
            raise ShortcutError(f'{data} names {name} twice: give it a weight instead, as in "2*{name}"')
        domains[name] = number
    return domains


def read_documents(source: Source, seed: int) -> Iterator[str | Conversation]:
    """Yield the documents of a source of one domain, in an order that the seed decides. A .txt file is one document.

    Raises ShortcutError for a file that is not there or not readable, and a split or column that it does not have, and
    for conversations where plain text is wanted.
    """
    path = Path(source.data)
    if source.data in EMBEDDED:
        yield files("shortcut").joinpath("data", EMBEDDED[source.data]).read_text(encoding="utf-8")
    elif path.suffix == ".txt":
        yield read_text(path)
    else:
        column = None
        for row in read_rows(source, seed):
            column = column or _pick_column(source, row)
            yield _read_cell(source, column, row[column])


def read_text(path: Path, hint: str = "") -> str:
    """The text of a file. Raises ShortcutError for one that is not there, with a hint at what could be, or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ShortcutError(f"no file {path}{hint}") from None
    except UnicodeDecodeError as error:
        raise ShortcutError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ShortcutError(f"cannot read {path}: {error.strerror}") from None


def read_rows(source: Source, seed: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file or Hub data set, in an order that the seed decides. Raises as `read_documents` does."""
    import datasets

    path = Path(source.data)
    local = path.suffix in BUILDERS
    if local and not path.is_file():
        raise ShortcutError(f"no file {path}")
    if not local and (path.exists() or source.data.count("/") > 1):
        raise ShortcutError(f"cannot read {source.data}: --data takes {', '.join(['.txt', *BUILDERS])} or a Hub id")
    datasets.disable_progress_bars()
    name, _, subset = source.data.partition(":")
    try:
        if local:
            where: dict[str, Any] = {"data_files": str(path), "split": "train"}
            where |= {"field": field} if (field := _rows_under(path)) else {}
            rows = datasets.load_dataset(BUILDERS[path.suffix], **where).shuffle(seed=seed)
        else:
            rows = datasets.load_dataset(name, subset or None, split=source.split, streaming=True)
            rows = rows.shuffle(seed=seed, buffer_size=1000)
        sounds = [name for name, kind in (rows.features or {}).items() if isinstance(kind, datasets.Audio)]
        for name in sounds:  # as they are stored
            rows = rows.cast_column(name, datasets.Audio(decode=False))
        yield from rows
    except (datasets.exceptions.DatasetsError, OSError, ValueError, StopIteration) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200] or "it is empty"
        raise ShortcutError(f"cannot read the data set {source.data}: {reason}") from None


def _rows_under(path: Path) -> str | None:
    """The name under which a JSON file of one object holds its rows, as `{"data": [...]}` does."""
    if path.suffix != ".json":
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads it says what is wrong, or reads it line by line
    lists = [pair for pair in content.items() if isinstance(pair[1], list)] if isinstance(content, dict) else []
    named = [name for name, rows in lists if rows and all(isinstance(row, dict) for row in rows)]
    return named[0] if len(lists) == len(named) == 1 else None


def _read_cell(source: Source, column: str, cell: Any) -> str | Conversation:
    if isinstance(cell, str):
        return cell
    messages = [_read_message(message) for message in cell] if isinstance(cell, list) else [{}]
    if not all(messages):
        raise ShortcutError(f"column {column!r} of {source.data} holds {type(cell).__name__}, not text or messages")
    if not source.chat_template:
        raise ShortcutError(f"column {column!r} of {source.data} holds messages: they need --chat-template")
    return messages


def _read_message(message: Any) -> dict[str, Any]:
    """A message as chat templates want it, from that or ShareGPT's form; empty for anything else."""
    match message:
        case {"role": str(), "content": content}:
            given = {name: value for name, value in message.items() if value is not None}
            return {**given, "content": _plain(content)}
        case {"from": str(role), "value": str(content)}:
            return {"role": ROLES.get(role, role), "content": content}
    return {}


def _plain(content: Any) -> Any:
    """The content of a message as text, where it is none beside a call of a tool, or a list of parts that are text."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return content


def _pick_column(source: Source, row: dict[str, Any]) -> str:
    if source.column is not None:
        if source.column not in row:
            raise ShortcutError(f"no column {source.column!r} in {source.data}; it has: {', '.join(row)}")
        return source.column
    known = CHAT_COLUMNS + TEXT_COLUMNS if source.chat_template else TEXT_COLUMNS + CHAT_COLUMNS
    for name in (*known, *(row if len(row) == 1 else ())):
        if name in row:
            return name
    raise ShortcutError(f"which column of {source.data} is the text? Name it with --column: {', '.join(row)}")
