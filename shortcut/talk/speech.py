"""What a live model says to messages, piece by piece as it is made."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from shortcut.live.load import Model, load_processor, load_tokenizer

Message = dict[str, Any]  # role and content, as chat templates take them


@dataclass(frozen=True)
class Piece:
    """What was said since the piece before. tokens: made so far; seconds: since the first of them."""

    text: str
    tokens: int
    seconds: float

    @property
    def speed(self) -> float | None:
        """Tokens per second behind the first; None before there are two."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else None


def load_reader(folder: Path, *, sees: bool, trust_remote_code: bool = False) -> Any:
    """What turns messages into inputs of a model: a processor where images are among them, else a tokenizer."""
    return (load_processor if sees else load_tokenizer)(folder, trust_remote_code=trust_remote_code)


def ask(line: str, *, images: int = 0, parts: bool = False) -> Message:
    """A message of the user. parts: whether its content is a list of images and text, which processors take."""
    text = [{"type": "image"}] * images + [{"type": "text", "text": line}]
    return {"role": "user", "content": text if parts else line}


def speak(
    model: Model,
    reader: Any,
    messages: Sequence[Message],
    pictures: Sequence[Any] = (),
    *,
    new_tokens: int,
    temperature: float = 0.0,
    meanwhile: AbstractContextManager[Any] | None = None,
) -> Iterator[Piece]:
    """What a model says next, the last piece being without text; it stops when nobody takes the pieces any more.

    temperature: 0 for the likeliest tokens, above that tokens are drawn at random. meanwhile: what holds while a model
    runs, such as a preview; whatever that raises is raised here.
    """
    from transformers import TextIteratorStreamer

    tokenizer, inputs = getattr(reader, "tokenizer", reader), _inputs(reader, messages, pictures).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    moments: list[float] = []
    unheard = Event()

    def note(*_: Any, **__: Any) -> bool:
        moments.append(time.perf_counter())
        return unheard.is_set()

    def generate() -> None:
        with meanwhile or nullcontext():
            options: dict[str, Any] = {"max_new_tokens": new_tokens, "stopping_criteria": [note], **sampling}
            model.generate(**inputs, streamer=streamer, **options)

    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(generate)
        made.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))  # also where it fails
        try:
            for piece in streamer:
                yield Piece(piece, len(moments), moments[-1] - moments[0] if moments else 0.0)
        finally:
            unheard.set()
    made.result()
    yield Piece("", len(moments), moments[-1] - moments[0])


def _inputs(reader: Any, messages: Sequence[Message], pictures: Sequence[Any]) -> Any:
    """What a model is called with for a conversation; BOS is put in front where the template did not."""
    text = written(reader, messages)
    tokenizer = getattr(reader, "tokenizer", reader)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    given = (list(pictures), text) if pictures else (text,)
    return (reader if pictures else tokenizer)(*given, return_tensors="pt", add_special_tokens=special)


def written(reader: Any, messages: Sequence[Message]) -> str:
    """A conversation as one text: by the chat template, or line by line where there is none."""
    if getattr(reader, "chat_template", None):
        return str(reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    lines = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        lines.append("".join(part.get("text", getattr(reader, "image_token", "")) for part in parts))
    return "\n".join(lines)
