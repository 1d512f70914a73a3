"""Talking with a model in the terminal, about an image as well."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut.anatomy import sees_images
from shortcut.errors import ShortcutError
from shortcut.progress import say
from shortcut.sources import open_model

WAY_OUT = "an empty line ends the conversation"


@dataclass(frozen=True)
class Conversation:
    """What was said, as messages of role and content."""

    messages: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {"messages": list(self.messages)}

    def __str__(self) -> str:
        return ""  # it was printed as it was made


def chat(
    model: str | Path,
    *,
    image: str | None = None,
    prompt: str | None = None,
    new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> Conversation:
    """Talk with a model in the terminal, by its chat template where it has one; answers appear as they are made.

    Lines of stdin are what is said, until an empty one; --prompt is a single line instead. --image is shown with the
    first. Answers are the most likely ones: nothing is drawn at random.
    """
    from shortcut.live import load_model, load_processor, load_tokenizer
    from shortcut.scoring.pictures import open_image

    if new_tokens < 1:
        raise ShortcutError(f"--new-tokens {new_tokens} is not a positive number")
    checkpoint = open_model(model, revision, quiet=quiet)
    trust: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    sees = image is not None
    if sees and not sees_images(checkpoint.config):
        raise ShortcutError(f"{checkpoint.name} sees no images")
    reader = load_processor(checkpoint.folder, **trust) if sees else load_tokenizer(checkpoint.folder, **trust)
    pictures = [open_image(image, Path())] if sees else []
    live = load_model(checkpoint.folder, device=device, dtype=dtype, **trust)
    messages: list[dict[str, Any]] = []
    for line in [prompt] if prompt is not None else _lines(quiet=quiet):
        shown = [{"type": "image"}] * (sees and not messages)
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": line}] if sees else line})
        answer = _answer(live, reader, messages, pictures, new_tokens)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if sees else answer})
    return Conversation(tuple(messages))


def _lines(*, quiet: bool) -> Iterator[str]:
    say(WAY_OUT, quiet=quiet)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(live: Any, reader: Any, messages: list[dict[str, Any]], pictures: list[Any], new_tokens: int) -> str:
    """What a model says next, which is printed as it comes."""
    from transformers import TextStreamer

    tokenizer = getattr(reader, "tokenizer", reader)
    text = _written(reader, messages)
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    how: dict[str, Any] = {"return_tensors": "pt", "add_special_tokens": special}
    inputs = reader(pictures, text, **how) if pictures else reader(text, **how)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = live.generate(**inputs.to(live.device), max_new_tokens=new_tokens, do_sample=False, streamer=streamer)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _written(reader: Any, messages: list[dict[str, Any]]) -> str:
    """A conversation as one text: by the chat template, or line by line where there is none."""
    if getattr(reader, "chat_template", None):
        return str(reader.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    lines = []
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else [{"text": message["content"]}]
        lines.append("".join(part.get("text", getattr(reader, "image_token", "")) for part in parts))
    return "\n".join(lines)
