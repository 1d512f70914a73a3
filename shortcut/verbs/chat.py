"""Talking with a model in the terminal, about an image as well; with the whole one and a shortened one in turn."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_model, read_record
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.family.anatomy import sees_images
from shortcut.family.tasks import check_writes
from shortcut.options.groups import Loading, Model, Quiet, Revision
from shortcut.options.verb import verb
from shortcut.records.block_lists import parse_blocks
from shortcut.records.plan import Base, Plan, read_plan

WAY_OUT = "an empty line ends the conversation, /help lists commands"
HELP = (
    "/base: the whole model; /short: the shortened one; /drop 3,5: without these blocks of the whole one; /help: this; "
    "/quit: the end"
)


@dataclass(frozen=True)
class Talk:
    """What was said, as messages of role and content."""

    messages: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {"messages": list(self.messages)}

    def __str__(self) -> str:
        return ""  # it was printed as it was made


@dataclass(frozen=True)
class ChatOptions(Loading, Revision, Quiet):
    """The conversation"""

    model: Model
    _: KW_ONLY
    plan: Annotated[str | Path | Plan | None, "a plan.yaml of `shortcut plan`, by which the model speaks as if cut"] = (
        None
    )
    drop: Annotated[str | None, 'blocks to leave out, by number, counted from 0: "21-29,31"'] = None
    image: Annotated[str | None, "an image file or address, to talk about"] = None
    prompt: Annotated[str | None, "what is said, instead of lines of stdin"] = None
    new_tokens: Annotated[int, "tokens of an answer at most"] = 256


@verb(ChatOptions, first="prompt image drop", example="shorter")
def chat(asked: ChatOptions) -> Talk:
    """Talk with a model in the terminal, by its chat template where it has one; answers appear as they are made.

    Lines of stdin are what is said, until an empty one; --prompt is a single line instead. --image is shown with the
    first line. Answers are the most likely ones: nothing is drawn at random. With --plan or --drop the model speaks as
    if it had been cut, and nothing is written. /base, /short and /drop 3,5 switch between the whole model and shorter
    ones. Fails where an image is given to a model that sees none.
    """
    from shortcut.live.load import load_model
    from shortcut.material.pictures import open_image
    from shortcut.surgery.preview import preview
    from shortcut.talk.speech import ask, load_reader, speak

    if asked.new_tokens < 1:
        raise ShortcutError(f"--new-tokens {asked.new_tokens} is not a positive number")
    if asked.plan is not None and asked.drop is not None:
        raise ShortcutError("say what goes with one of --plan and --drop")
    checkpoint = open_model(asked.model, asked.revision, quiet=asked.quiet)
    check_writes(checkpoint.config, "chat")
    plan = read_plan(Path(asked.plan)) if isinstance(asked.plan, str | Path) else asked.plan
    if asked.drop is not None:
        plan = Plan.dropping(checkpoint.base, parse_blocks(asked.drop, checkpoint.base.blocks))
    sees = asked.image is not None
    if sees and not sees_images(checkpoint.config):
        raise ShortcutError(f"{checkpoint.name} sees no images")
    reader = load_reader(checkpoint.folder, sees=sees, trust_remote_code=asked.trust_remote_code)
    pictures = [open_image(asked.image, Path())] if sees else []
    voices = _Voices(checkpoint, lambda folder: load_model(folder, asked), plan, quiet=asked.quiet)
    messages: list[dict[str, Any]] = []
    for line in [asked.prompt] if asked.prompt is not None else _lines(voices, quiet=asked.quiet):
        messages.append(ask(line, images=sees and not messages, parts=sees))
        answer = ""
        meanwhile = preview(voices.model, voices.plan) if voices.plan else None
        for piece in speak(voices.model, reader, messages, pictures, new_tokens=asked.new_tokens, meanwhile=meanwhile):
            print(piece.text, end="", flush=True)
            answer += piece.text
        print(flush=True)
        answer = answer.strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}] if sees else answer})
    return Talk(tuple(messages))


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
