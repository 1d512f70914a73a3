"""Drawn questions are answered as the scene says, and the model of the package answers those that it has not seen."""

from importlib.resources import files
from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from shortcut.material.drawings import CELLS, COLOURS, EVALUATION, KINDS, SHAPES, TRAINING, WORDS, draw

pytestmark = pytest.mark.thorough

MODEL = files("shortcut") / "data" / "tiny-llava"
DRAWN = draw(110, 1)


def answer(question, scene):
    """The answer in the plainest Python, from the words of the question alone."""
    words = question.split()
    grid = [None] * 9
    for thing in scene:
        grid[thing.cell] = (thing.colour, thing.shape)
    things = [thing for thing in grid if thing]
    names = [(one, two) for one, two in pairwise(words) if one in COLOURS and two in SHAPES]
    wanted = words[1] == "shape"  # the second half of a pair
    place = grid.index(names[0]) if names and names[0] in things else None
    match words:
        case ["how", "many", "objects", *_]:
            return str(len(things))
        case ["how", "many", colour, *_]:
            return str(len([thing for thing in things if thing[0] == colour]))
        case ["where", *_]:
            return CELLS[place]
        case ["is", "there", "any", *_]:
            return "yes" if names[0] in things else "no"
        case ["is", "there", "more", one, "than", other, "?"]:
            one, other = ([thing[0] for thing in things].count(colour) for colour in (one, other))
            return "yes" if one > other else "no"
        case ["is", "the", _, _, "left", *_]:
            return "yes" if place % 3 < grid.index(names[1]) % 3 else "no"
        case [*_, cell, "object", "?"] if cell in CELLS:
            return grid[CELLS.index(cell)][wanted]
        case [*_, "above", "the", _, _, "?"]:
            return next(grid[cell] for cell in range(place - 3, -1, -3) if grid[cell])[wanted]
        case [*_, "two", "before", "the", _, _, "?"]:
            return things[things.index(names[0]) - 2][wanted]
        case [*_, "before", "the", _, _, "?"]:
            return things[things.index(names[0]) - 1][wanted]
    (match_,) = {thing[wanted] for thing in things if words[4] in thing}
    return match_


def test_answers_are_right():
    """Every kind of question is asked, and answered as a second reading of the scene answers it."""
    drawn = draw(550, 3)
    assert {one.kind for one in drawn} == set(KINDS)
    assert [one.answer for one in drawn] == [answer(one.question, one.scene) for one in drawn]


def test_pixels_are_those_of_the_scene():
    """In the middle of a cell is the colour of its shape, nearly, or the grey of the background."""
    for one in DRAWN:
        pixels = np.asarray(one.image).astype(int)
        assert pixels.shape == (48, 48, 3)
        for cell in range(9):
            centre = pixels[16 * (cell // 3) + 7 :, 16 * (cell % 3) + 7 :][:2, :2].mean((0, 1))
            colours = [COLOURS[thing.colour] for thing in one.scene if thing.cell == cell]
            if colours:
                assert abs(centre - colours[0]).max() < 40
            else:
                assert np.ptp(centre) < 40
                assert centre.max() < 120


def test_a_seed_gives_the_same_pixels():
    """The same seed gives the same images and questions, the first of them whatever the number; another seed others."""
    again = draw(30, 1)
    assert [one.question for one in again] == [one.question for one in DRAWN[:30]]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(again, DRAWN, strict=False))
    assert not np.array_equal(draw(1, 2)[0].image, DRAWN[0].image)
    assert int(np.asarray(DRAWN[0].image).sum(dtype=int)) == 314389


def test_training_and_evaluation_share_no_image():
    """The same seed draws other images for training than for evaluation."""
    seen = {one.image.tobytes() for seed in range(3) for one in draw(110, seed, stream=TRAINING)}
    assert not seen & {one.image.tobytes() for seed in range(3) for one in draw(110, seed, stream=EVALUATION)}


def test_every_word_is_in_the_vocabulary():
    """The tokenizer of the model knows every word of questions and answers, and no more than 64."""
    tokenizer = AutoProcessor.from_pretrained(MODEL).tokenizer
    assert {word for one in draw(1100, 4) for word in f"{one.question} {one.answer}".split()} <= set(WORDS)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(WORDS))["input_ids"]
    assert len(tokenizer) <= 64


@pytest.fixture(scope="module")
def answers():
    """What the model of the package generates about images, by plain transformers."""
    processor = AutoProcessor.from_pretrained(MODEL)
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()

    def generate(images, questions):
        """One answer for every question."""
        asked = [{"type": "image"}, {"type": "text"}]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [asked[0], {**asked[1], "text": question}]}], add_generation_prompt=True
            )
            for question in questions
        ]
        batch = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.dtype)
        with torch.no_grad():
            tokens = model.generate(**batch, do_sample=False)
        return processor.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return generate


def test_the_model_answers_unseen_questions(answers):
    """The model answers more than eight in ten questions, each with the one word alone; not so with other images."""
    questions, right = [one.question for one in DRAWN], [one.answer for one in DRAWN]
    images = [one.image for one in DRAWN]
    given = answers(images, questions)
    assert sum(map(str.__eq__, given, right)) >= 0.85 * len(right)
    shuffled = answers([*images[22:], *images[:22]], questions)
    assert sum(map(str.__eq__, shuffled, right)) <= 0.5 * len(right)
