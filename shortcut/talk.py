"""Talking with a model in the terminal, about an image as well; with the whole one and a shortened one in turn."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut.anatomy import sees_images
from shortcut.commands import read_record
from shortcut.errors import ShortcutError
from shortcut.progress import say
from shortcut.records.blocks import parse_blocks
from shortcut.records.plan import Base, Plan, read_plan
from shortcut.sources import open_model
from shortcut.surgery.checkpoint import Checkpoint

WAY_OUT = "an empty line ends the conversation, /help lists commands"
HELP = (
    "/base: the whole model; /short: the shortened one; /drop 3,5: without these blocks of the whole one; /help: this; "
    "/quit: the end"
)


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
    plan: str | Path | Plan | None = None,
    drop: str | None = None,
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
    first. Answers are the most likely ones: nothing is drawn at random. With --plan or --drop the model speaks as if it
    had been cut, and nothing is written. /base, /short and /drop 3,5 switch between the whole model and shorter ones.
    """
    from shortcut.live import load_model
    from shortcut.scoring.pictures import open_image
    from shortcut.speech import ask, load_reader, speak
    from shortcut.surgery.preview import preview

    if new_tokens < 1:
        raise ShortcutError(f"--new-tokens {new_tokens} is not a positive number")
    if plan is not None and drop is not None:
        raise ShortcutError("say what goes with one of --plan and --drop")
    checkpoint = open_model(model, revision, quiet=quiet)
    if drop is not None:
        plan = Plan.dropping(checkpoint.base, parse_blocks(drop, checkpoint.base.blocks))
    elif plan is not None and not isinstance(plan, Plan):
        plan = read_plan(Path(plan))
    sees = image is not None
    if sees and not sees_images(checkpoint.config):
        raise ShortcutError(f"{checkpoint.name} sees no images")
    reader = load_reader(checkpoint.folder, sees=sees, trust_remote_code=trust_remote_code)
    pictures = [open_image(image, Path())] if sees else []
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    voices = _Voices(checkpoint, lambda folder: load_model(folder, **loading), plan, quiet=quiet)
    messages: list[dict[str, Any]] = []
    for line in [prompt] if prompt is not None else _lines(voices, quiet=quiet):
        messages.append(ask(line, images=sees and not messages, parts=sees))
        answer = ""
        meanwhile = preview(voices.model, voices.plan) if voices.plan else None
        for piece in speak(voices.model, reader, messages, pictures, new_tokens=new_tokens, meanwhile=meanwhile):
            print(piece.text, end="", flush=True)
            answer += piece.text
        print(flush=True)
        answer = answer.strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if sees else answer})
    return Conversation(tuple(messages))


class _Voices:
    """Who speaks: `model`, meanwhile with `plan` carried out. That is the whole model, or the shortened one."""

    def __init__(self, checkpoint: Checkpoint, load: Callable[[Path], Any], plan: Plan | None, *, quiet: bool) -> None:
        self.checkpoint, self.load, self.quiet = checkpoint, load, quiet
        self.model, self.plan = load(checkpoint.folder), plan
        self.record = None if plan else read_record(checkpoint.folder)
        self.whole = None if self.record else self.model  # else it is loaded when first asked for
        self.short = (self.model, plan, plan or self.record)  # the last: what became of which blocks
        if plan is not None:
            self._preview(plan)

    @property
    def base(self) -> Base:
        """The model whose blocks are counted."""
        return self.record.base if self.record else self.checkpoint.base

    def obey(self, word: str, rest: str) -> None:
        """Change who speaks as a command says, or say in one line why not."""
        try:
            match word, rest:
                case "/base", "":
                    self.model, self.plan = self._load_whole(), None
                    say("now the whole model", quiet=self.quiet)
                case "/short", "":
                    self._shorten()
                case "/drop", blocks:
                    self._preview(Plan.dropping(self.base, parse_blocks(blocks, self.base.blocks)))
                    self._shorten()
                case _:
                    say(HELP if word == "/help" else f"no command {word} {rest}".rstrip() + f"; {HELP}", quiet=False)
        except ShortcutError as error:
            say(str(error), quiet=False)

    def _load_whole(self) -> Any:
        if self.whole is None:
            say(f"loading {self.base.model}, the base", quiet=self.quiet)
            self.whole = self.load(open_model(self.base.model, self.base.revision, quiet=self.quiet).folder)
        return self.whole

    def _preview(self, plan: Plan) -> None:
        """Make this the shortened model, or raise where it cannot be."""
        from shortcut.surgery.preview import preview

        with preview(self._load_whole(), plan):
            self.short = self.whole, plan, plan

    def _shorten(self) -> None:
        self.model, self.plan, made = self.short
        if made is None:
            raise ShortcutError("nothing is shortened so far: /drop 3,5 leaves out blocks 3 and 5")
        say(f"now without {made.described}", quiet=self.quiet)


def _lines(voices: _Voices, *, quiet: bool) -> Iterator[str]:
    """What is said; commands among it are carried out."""
    say(WAY_OUT, quiet=quiet)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        word, _, rest = line.partition(" ")
        if line in ("", "/quit"):
            return
        if re.fullmatch("/[a-z]+", word):
            voices.obey(word, rest.strip())
        else:
            yield line
