"""Models side by side: the same prompt for each in turn, with what each takes and how fast it is."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.common.text import format_count, format_size
from shortcut.family.anatomy import sees_images
from shortcut.live.blocks import find_blocks
from shortcut.live.load import Model, load_model
from shortcut.material.pictures import open_image
from shortcut.options.groups import Loading
from shortcut.records.plan import Plan
from shortcut.surgery.preview import preview
from shortcut.talk.speech import ask, load_reader, speak


@dataclass(frozen=True)
class Column:
    """A live model that answers, with a plan carried out on it where there is one."""

    checkpoint: Checkpoint
    model: Model
    reader: Any
    size: int  # bytes of the weights in memory
    block_sizes: tuple[int, ...]
    plan: Plan | None = None
    turn: AbstractContextManager[Any] = field(default_factory=Lock)  # one answer, or one plan, at a time

    @property
    def sees(self) -> bool:
        """Whether it can be asked about an image."""
        return sees_images(self.checkpoint.config)

    @property
    def facts(self) -> str:
        """Parameters, and bytes of the weights in memory: of a plan, what both would be if it were cut."""
        gone = self.plan.dropped if self.plan else ()
        parameters = self.checkpoint.parameters - sum(self.checkpoint.block_parameters[i] for i in gone)
        size = self.size - sum(self.block_sizes[i] for i in gone)
        return f"{format_count(parameters)} parameters, {format_size(size)}"


@dataclass(frozen=True)
class Answer:
    """What was said so far, by how many tokens, and how many of them a second."""

    text: str = ""
    tokens: int = 0
    speed: float | None = None


def load_column(checkpoint: Checkpoint, how: Loading) -> Column:
    """Load what a checkpoint needs to answer. Raises ShortcutError where it cannot be."""
    sees = sees_images(checkpoint.config)
    reader = load_reader(checkpoint.folder, sees=sees, trust_remote_code=how.trust_remote_code)
    model = load_model(checkpoint.folder, how)
    # measured here: a model that is answering changes its config, in a thread of its own
    sizes = tuple(sum(weight.nbytes for weight in block.parameters()) for block in find_blocks(model))
    return Column(checkpoint, model, reader, model.get_memory_footprint(), sizes)


def without(column: Column, blocks: Sequence[int]) -> Column:
    """The same model as if these blocks had been cut. Raises ShortcutError where none would be left."""
    return replace(column, plan=Plan.dropping(column.checkpoint.base, blocks))


def answer_in_turn(
    columns: Sequence[Column], prompt: str, image: Any = None, *, new_tokens: int, temperature: float = 0.0
) -> Iterator[tuple[Answer, ...]]:
    """The answers of all columns as they grow, one after the other: every speed is that of a model that runs alone.

    The first ones are empty, and nobody is asked without a prompt.
    """
    answers = [Answer() for _ in columns]
    yield tuple(answers)
    if not prompt.strip():
        return
    for place, column in enumerate(columns):
        for answers[place] in _answer(column, prompt, image, new_tokens, temperature):
            yield tuple(answers)


def _answer(column: Column, prompt: str, image: Any, new_tokens: int, temperature: float) -> Iterator[Answer]:
    if image is not None and not column.sees:
        yield Answer("(sees no images)")
        return
    pictures = [] if image is None else [open_image(image, Path())]
    messages = [ask(prompt, images=len(pictures), parts=column.sees)]
    text = ""
    for piece in speak(
        column.model,
        column.reader,
        messages,
        pictures,
        new_tokens=new_tokens,
        temperature=temperature,
        meanwhile=_as_planned(column),
    ):
        text += piece.text
        yield Answer(text, piece.tokens, piece.speed)


@contextmanager
def _as_planned(column: Column) -> Iterator[None]:
    with column.turn, preview(column.model, column.plan) if column.plan else nullcontext():
        yield
