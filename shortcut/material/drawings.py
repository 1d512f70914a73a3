"""Drawn images with questions: what the small vision-language model of the package is trained on and measured with.

A scene is 1-5 coloured shapes in the cells of a 3 x 3 grid, no two of the same colour and shape. Its questions have one
word for an answer, and all words are of a vocabulary of 64. Reading order, from left to right and from the top down, is
what "before" means. Everything is made of integers from the one random stream that numpy keeps the same for ever, so
that a seed gives the same pixels on every machine. Training and evaluation draw from different streams, whatever the
seeds.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, CELL = 48, 16  # pixels
EVALUATION, TRAINING = 0, 1  # the first word of every seed
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (225, 205, 50),
    "purple": (155, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
CELLS = tuple(f"{row}-{column}" for row in ("top", "middle", "bottom") for column in ("left", "centre", "right"))


@dataclass(frozen=True)
class Thing:
    """One coloured shape of a scene. cell: 0-8 in reading order."""

    colour: str
    shape: str
    cell: int

    @property
    def name(self) -> str:
        """What a question calls it, which no other thing of the scene is called."""
        return f"{self.colour} {self.shape}"

    @property
    def row(self) -> int:
        """From 0 at the top."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """From 0 at the left."""
        return self.cell % 3


Scene = tuple[Thing, ...]  # in reading order


@dataclass(frozen=True)
class Drawn:
    """An image of 48 x 48 pixels, RGB, and a question about the scene that it shows, of one of the `KINDS`."""

    image: "Image"
    question: str
    answer: str
    kind: str
    scene: Scene


def draw(samples: int, seed: int, *, stream: int = EVALUATION) -> list[Drawn]:
    """So many images with one question each, the kinds in turn; more samples of a seed begin with the fewer ones."""
    from PIL.Image import fromarray

    generator = stream_of(seed, stream)
    drawn = []
    for number in range(samples):
        kind = list(KINDS)[number % len(KINDS)]
        while True:
            scene = compose(generator)
            if asked := ask(scene, kind, generator):
                break
        drawn.append(Drawn(fromarray(paint(scene, generator)), *asked, kind, scene))
    return drawn


def stream_of(seed: int, stream: int) -> RandomState:
    """The random numbers of a seed, others in training than in evaluation."""
    return RandomState([stream, seed])


def compose(generator: RandomState) -> Scene:
    """A random scene, of at most three colours, so that some are often there twice."""
    palette = generator.permutation(list(COLOURS))[:3]
    count = generator.randint(1, 6)
    pairs = generator.permutation(len(palette) * len(SHAPES))[:count]
    cells = sorted(generator.permutation(len(CELLS))[:count])
    return tuple(
        Thing(str(palette[pair // len(SHAPES)]), SHAPES[pair % len(SHAPES)], int(cell))
        for pair, cell in zip(pairs, cells, strict=True)
    )


def paint(scene: Scene, generator: RandomState) -> NDArray[np.uint8]:
    """The pixels of a scene, (rows, columns, RGB), with noise on them; sizes, places and colours vary a little."""
    pixels = np.full((SIDE, SIDE, 3), generator.randint(20, 100), np.int64)
    for thing in scene:
        colour = np.array(COLOURS[thing.colour]) + generator.randint(-15, 16, 3)
        top, left = thing.row * CELL, thing.column * CELL
        radius = generator.randint(5, 7)
        down, right = generator.randint(-1, 2, 2)
        pixels[top : top + CELL, left : left + CELL][_mask(thing.shape, radius, down, right)] = colour
    return (pixels + generator.randint(-16, 17, pixels.shape)).clip(0, 255).astype(np.uint8)


def _mask(shape: str, radius: int, down: int, right: int) -> NDArray[np.bool_]:
    """The pixels of a cell that a shape covers, (rows, columns); all is in half pixels, so that integers will do."""
    steps = np.arange(1 - CELL, CELL, 2)
    y, x, reach = steps[:, None] - 2 * down, steps[None] - 2 * right, 2 * radius
    across = abs(x)
    square = (abs(y) <= reach) & (across <= reach)
    match shape:
        case "circle":
            return x**2 + y**2 <= reach**2
        case "square":
            return square
        case "triangle":
            return square & (2 * across <= y + reach)
    return square & ((across <= reach // 3) | (abs(y) <= reach // 3))


def ask(scene: Scene, kind: str, generator: RandomState) -> tuple[str, str] | None:
    """A question of a kind, ending in " ?", and its answer; None where the scene has nothing to ask about."""
    return KINDS[kind](scene, generator)


def _pick(scene: Scene, generator: RandomState) -> Thing:
    return scene[generator.randint(len(scene))]


def _attribute(thing: Thing, generator: RandomState) -> tuple[str, str]:
    """ "colour" or "shape", and that of the thing."""
    return ("colour", thing.colour) if generator.randint(2) else ("shape", thing.shape)


def _ask_colour(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    thing = _pick(scene, generator)
    if sum(other.shape == thing.shape for other in scene) > 1:
        return None
    return f"what colour is the {thing.shape} ?", thing.colour


def _ask_shape(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    thing = _pick(scene, generator)
    if sum(other.colour == thing.colour for other in scene) > 1:
        return None
    return f"what shape is the {thing.colour} object ?", thing.shape


def _ask_count(scene: Scene, generator: RandomState) -> tuple[str, str]:
    if generator.randint(2):
        return "how many objects are there ?", str(len(scene))
    colour = _pick(scene, generator).colour
    return f"how many {colour} objects are there ?", str(sum(thing.colour == colour for thing in scene))


def _ask_where(scene: Scene, generator: RandomState) -> tuple[str, str]:
    thing = _pick(scene, generator)
    return f"where is the {thing.name} ?", CELLS[thing.cell]


def _ask_exists(scene: Scene, generator: RandomState) -> tuple[str, str]:
    """What is not there has its colour or its shape from something that is."""
    thing = _pick(scene, generator)
    if generator.randint(2):
        return f"is there any {thing.name} ?", "yes"
    near = [f"{thing.colour} {shape}" for shape in SHAPES] + [f"{colour} {thing.shape}" for colour in COLOURS]
    absent = [name for name in near if name not in {other.name for other in scene}]
    return f"is there any {absent[generator.randint(len(absent))]} ?", "no"


def _ask_left(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    one, other = _pick(scene, generator), _pick(scene, generator)
    if one.column == other.column:
        return None
    return f"is the {one.name} left of the {other.name} ?", "yes" if one.column < other.column else "no"


def _ask_more(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    one, other = _pick(scene, generator).colour, _pick(scene, generator).colour
    counts = Counter(thing.colour for thing in scene)
    if counts[one] == counts[other]:
        return None
    return f"is there more {one} than {other} ?", "yes" if counts[one] > counts[other] else "no"


def _ask_at(scene: Scene, generator: RandomState) -> tuple[str, str]:
    thing = _pick(scene, generator)
    attribute, value = _attribute(thing, generator)
    return f"what {attribute} is the {CELLS[thing.cell]} object ?", value


def _ask_above(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    thing = _pick(scene, generator)
    above = [other for other in scene if other.column == thing.column and other.row < thing.row]
    if not above:
        return None
    attribute, value = _attribute(above[-1], generator)
    return f"what {attribute} is above the {thing.name} ?", value


def _ask_before(scene: Scene, generator: RandomState, back: int = 1) -> tuple[str, str] | None:
    place = generator.randint(len(scene))
    if place < back:
        return None
    attribute, value = _attribute(scene[place - back], generator)
    return f"what {attribute} is {'two ' * (back == 2)}before the {scene[place].name} ?", value


def _ask_two_before(scene: Scene, generator: RandomState) -> tuple[str, str] | None:
    return _ask_before(scene, generator, 2)


KINDS: dict[str, Callable[[Scene, RandomState], tuple[str, str] | None]] = {
    "colour": _ask_colour,
    "shape": _ask_shape,
    "count": _ask_count,
    "where": _ask_where,
    "exists": _ask_exists,
    "left of": _ask_left,
    "more": _ask_more,
    "at": _ask_at,
    "above": _ask_above,
    "before": _ask_before,
    "two before": _ask_two_before,
}
GRAMMAR = (
    *("what", "colour", "shape", "is", "the", "object", "objects", "?", "how", "many", "are", "there", "where", "any"),
    *("left", "of", "more", "than", "above", "before", "two", "yes", "no", "1", "2", "3", "4", "5"),
)
WORDS = (*GRAMMAR, *COLOURS, *SHAPES, *CELLS)
