"""Questions about images: where they come from, in what order, and what is said where they are wrong."""

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import shortcut
from shortcut.checkpoint.open import EMBEDDED_VISION
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_processor
from shortcut.material.documents import Source
from shortcut.material.pictures import Pair, Pictures, holds_images, make_pictures, read_pairs

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
VISUAL = (4,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one colour each, and a file of questions that name it."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (20, 30), colour).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": f"is it {name} ?", "answer": "yes"} for name in COLOURS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def colour_of(pair: Pair) -> str:
    """The colour that the image has."""
    return next(name for name, colour in COLOURS.items() if pair.images[0].getpixel((3, 3)) == colour)


def make(data: Path | str, samples: int = 4, seed: int = 0, **how: Any) -> Pictures:
    """Questions, as the small model of the package reads them."""
    processor = load_processor(Path(EMBEDDED_VISION))
    return make_pictures(processor, VISUAL, Source(str(data), **how), samples=samples, seed=seed)


def test_every_question_has_its_own_image(folder: Path) -> None:
    """Also after the order was drawn, which a seed decides, and which is the same every time."""
    orders = []
    for seed in (0, 1, 2, 3, 0):
        pairs = make(folder / "pairs.jsonl", seed=seed).sequences
        assert all(pair.question == f"is it {colour_of(pair)} ?" for pair in pairs)
        orders.append([colour_of(pair) for pair in pairs])
    assert orders[0] == orders[-1]
    assert len(set(map(tuple, orders))) > 1
    assert make(folder / "pairs.jsonl").hash == make(folder / "pairs.jsonl").hash
    assert make(folder / "pairs.jsonl").hash != make(folder / "pairs.jsonl", seed=1).hash


def test_images_inside_of_a_data_set(folder: Path) -> None:
    """A parquet file with images in it, several for a question, columns of other names."""
    features = datasets.Features({"images": [datasets.Image()], "prompt": datasets.Value("string")})
    rows = {"images": [[str(folder / "red.png"), str(folder / "blue.png")]], "prompt": ["which ?"]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "data.parquet")
    (pair,) = make(folder / "data.parquet", 1).sequences
    assert [image.getpixel((0, 0)) for image in pair.images] == [COLOURS["red"], COLOURS["blue"]]
    assert (pair.question, pair.answer) == ("which ?", None)
    assert holds_images(Source(str(folder / "data.parquet")))
    batch = make(folder / "data.parquet", 1).batches(1)[0]
    assert batch.visual is not None
    assert batch.visual.sum() == 2 * 36
    assert len(batch.extra["pixel_values"]) == 2


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    """The folder, to be had by HTTP."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_images_by_address(folder: Path, server: str) -> None:
    """An image may be anywhere; one that is not there is one line."""
    path = folder / "far.jsonl"
    path.write_text(json.dumps({"image": f"{server}/red.png", "question": "is it red ?"}))
    assert colour_of(next(iter(read_pairs(Source(str(path)), 0)))) == "red"
    path.write_text(json.dumps({"image": f"{server}/none.png", "question": "is it red ?"}))
    with pytest.raises(ShortcutError, match=r"cannot read the image http://.*/none.png: .*404"):
        next(iter(read_pairs(Source(str(path)), 0)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "none.png", "question": "?"}, "cannot read the image none.png: No such file or directory"),
        ({"image": "pairs.jsonl", "question": "?"}, "pairs.jsonl is no image that can be read"),
        ({"question": "?"}, "has a row without image"),
        ({"image": "red.png"}, "has a row without question"),
        ({"image": "red.png", "question": 7}, "has a row without question"),
        ({"image": 7, "question": "?"}, "cannot read the image an image"),
    ],
)
def test_what_is_no_question_about_an_image(folder: Path, row: dict[str, Any], message: str) -> None:
    """Nothing is left out: the run stops, and says at what."""
    (folder / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(ShortcutError, match=message):
        make(folder / "bad.jsonl", 1)


def test_too_few(folder: Path) -> None:
    """Fewer questions than asked for are an error, and so are parts of them that would be empty."""
    with pytest.raises(ShortcutError, match="holds 4 questions and --samples asks it for 5"):
        make(folder / "pairs.jsonl", 5)
    with pytest.raises(ShortcutError, match="cannot set 4 of 4 questions aside"):
        make(folder / "pairs.jsonl", 4).split(4)
    with pytest.raises(ShortcutError, match="--samples 0 is too small"):
        make(folder / "pairs.jsonl", 0)


def test_drawings_differ_from_those_held_out() -> None:
    """Calibration, and what a result is measured on, have no picture in common, whatever the seeds."""
    seen = [
        image.tobytes() for seed in (0, 1) for pair in make("drawings", 20, seed).sequences for image in pair.images
    ]
    unseen = [
        image.tobytes() for seed in (0, 1) for pair in make("heldout", 20, seed).sequences for image in pair.images
    ]
    assert set(seen).isdisjoint(unseen)
    assert len(set(seen)) == len(set(unseen)) == 40


def test_batches_are_padded_on_the_right() -> None:
    """Ids, mask and places of image tokens agree, and alone or in a batch a question is the same."""
    pictures = make("drawings", 7)
    (together,), alone = pictures.batches(7), pictures.batches(1)
    for row, single in enumerate(alone):
        length = single.ids.shape[1]
        assert torch.equal(together.ids[row, :length], single.ids[0])
        assert together.mask[row].tolist() == [place < length for place in range(together.ids.shape[1])]
    assert together.visual is not None
    assert together.visual.sum(1).tolist() == [36] * 7
    assert pictures.tokens == sum(single.ids.numel() for single in alone)


def test_text_models_are_refused(llama: Path, folder: Path) -> None:
    """A model that sees nothing cannot be asked about images."""
    with pytest.raises(ShortcutError, match="llama sees no images: its config names no tokens of images"):
        shortcut.score(llama, metric="kl", allow="freeze-visual", data=str(folder / "pairs.jsonl"), quiet=True)
