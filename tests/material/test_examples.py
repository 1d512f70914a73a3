"""Examples: what models of images, sounds and pairs of texts are called with, from data of one's own or none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from PIL import Image

from shortcut.common.errors import ShortcutError
from shortcut.material.documents import Source
from shortcut.material.examples import Examples, make_examples
from tests.conftest import make_tokenizer
from tests.verbs.test_encoders import framing_tokenizer

RATE = 16000
PAIRS = [
    {"source": "one two three", "target": "eins zwei"},
    {"input": "four", "output": "vier fuenf sechs"},
    {"source": "seven", "target": "sieben", "other": "x"},
]


def hearing() -> Any:
    """What makes inputs of sounds, of any length."""
    return transformers.Wav2Vec2FeatureExtractor()


def rows(tmp_path: Path, *lines: dict[str, Any]) -> Source:
    """A file with these rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return Source(str(path))


def take(reader: Any, reads: set[str], source: Source, samples: int = 3, start: int | None = None) -> Examples:
    """So many of them."""
    return make_examples(reader, reads, start, source, samples=samples, length=24)


def test_pairs_of_texts(tmp_path: Path) -> None:
    """What is read goes to the encoder, what is said to the decoder behind its start; padding counts nowhere."""
    tokenizer = make_tokenizer()
    found = take(tokenizer, {"text"}, rows(tmp_path, *PAIRS), start=7)
    said = {row.get("source", row.get("input")): row.get("target", row.get("output")) for row in PAIRS}
    (batch,) = found.batches(3)
    assert batch.name == "decoder_input_ids"
    for number, example in enumerate(found.sequences):
        assert example.said == said[example.read]
        ids = batch.ids[number][batch.mask[number]].tolist()
        assert ids == [7, *tokenizer(text_target=example.said)["input_ids"]]
        read = batch.inputs["input_ids"][number][batch.inputs["attention_mask"][number].bool()].tolist()
        assert read == tokenizer(example.read)["input_ids"]
    assert set(batch.inputs) == {"decoder_input_ids", "decoder_attention_mask", "input_ids", "attention_mask"}
    alone = [each.inputs for each in found.batches(1)]
    assert all("decoder_attention_mask" not in each for each in alone)  # a full mask is left out
    assert found.tokens == int(batch.mask.sum())


def test_prose_in_the_place_of_pairs() -> None:
    """Without data, what is said goes on where what is read ends; the same on every call, other text held out."""
    found, again = (take(make_tokenizer(), {"text"}, Source(), start=0) for _ in range(2))
    assert found.hash == again.hash
    assert found.hash != take(make_tokenizer(), {"text"}, Source("heldout"), start=0).hash
    text = " ".join(_text("default").split())
    for example in found.sequences:
        assert f"{example.read} {example.said}" in text


def _text(name: str) -> str:
    from shortcut.material.documents import read_documents

    return str(next(iter(read_documents(Source(name), 0))))


def test_sounds_of_a_file(tmp_path: Path) -> None:
    """Sounds are read by their path, in one channel; with a decoder, the text beside them is what is said."""
    sounds = {}
    for name, channels in (("a", 1), ("b", 2)):
        sounds[name] = np.random.RandomState(len(sounds)).uniform(-0.5, 0.5, (800, channels)).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", sounds[name], RATE, subtype="FLOAT")
    source = rows(tmp_path, *({"audio": f"{name}.wav", "text": f"word {name}"} for name in sounds))
    found = take(hearing(), {"audio"}, source, samples=2)
    assert all(example.read is None and example.said is None for example in found.sequences)
    expected = [sound.mean(1) for sound in sounds.values()]
    for example in found.sequences:
        assert min(np.abs(example.sound - sound).max() for sound in expected) == 0
    (batch,) = found.batches(2)
    assert batch.inputs["input_values"].shape == (2, 800)
    assert "input_ids" not in batch.inputs

    class Processor:
        feature_extractor, tokenizer = hearing(), make_tokenizer()

    spoken = take(Processor(), {"audio", "text"}, source, samples=2, start=1)
    assert {example.said for example in spoken.sequences} == {"word a", "word b"}
    assert spoken.batches(2)[0].name == "decoder_input_ids"


def test_images_with_captions(tmp_path: Path) -> None:
    """Images alone for towers that see, with their captions for two towers."""
    for number in range(2):
        Image.new("RGB", (40, 30), (90 * number, 10, 200)).save(tmp_path / f"{number}.png")
    source = rows(tmp_path, *({"image": f"{number}.png", "caption": f"picture {number}"} for number in range(2)))
    sees = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    (batch,) = take(sees, {"image"}, source, samples=2).batches(2)
    assert set(batch.inputs) == {"pixel_values"}
    assert batch.inputs["pixel_values"].shape == (2, 3, 32, 32)
    both = transformers.CLIPProcessor(sees, framing_tokenizer())
    found = take(both, {"image", "text"}, source, samples=2)
    (batch,) = found.batches(2)
    assert batch.ids.shape == (2, 24)  # as far as the length goes, as these are trained
    assert {example.read for example in found.sequences} == {"picture 0", "picture 1"}


def test_made_up_sounds_and_drawings() -> None:
    """Without data, sounds are tones and images are drawn: always the same for a number, and no two alike."""
    sounds = take(hearing(), {"audio"}, Source())
    assert sounds.hash == take(hearing(), {"audio"}, Source()).hash
    assert len({example.sound.tobytes() for example in sounds.sequences}) == 3
    assert sounds.sequences[0].sound.shape == (2 * RATE,)
    assert 0.01 < np.abs(sounds.sequences[0].sound).max() < 2
    sees = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    images = take(sees, {"image"}, Source())
    assert len({example.image.tobytes() for example in images.sequences}) == 3
    assert images.record()["tokens"] == 3  # there are none: examples are counted
    rest, aside = images.split(1)
    assert (len(rest.sequences), len(aside.sequences)) == (2, 1)


FAULTS: dict[str, tuple[set[str], Any, list[dict[str, Any]], str]] = {
    "no target": ({"text"}, 1, [{"source": "a"}], "has a row without text to say .looked for: target, output"),
    "no source": ({"text"}, 1, [{"target": "a"}], "has a row without text to read .looked for: source, input"),
    "no sound": ({"audio"}, None, [{"text": "a"}], "has a row without sound .looked for: audio"),
    "not there": ({"audio"}, None, [{"audio": "no.wav"}], "cannot read the sound no.wav"),
    "another rate": (
        {"audio"},
        None,
        [{"audio": "slow.wav"}],
        "slow.wav has 8000 samples a second, and the model",
    ),
    "too few": ({"audio"}, None, [{"audio": "right.wav"}], "holds 1 examples and --samples asks it for 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_rows_that_lack_something(name: str, tmp_path: Path) -> None:
    """Each is one line that says what is missing."""
    for file, rate in (("slow", 8000), ("right", RATE)):
        soundfile.write(tmp_path / f"{file}.wav", np.zeros(100, dtype=np.float32), rate)
    reads, start, lines, message = FAULTS[name]
    reader = hearing() if "audio" in reads else make_tokenizer()
    with pytest.raises(ShortcutError, match=message):
        take(reader, reads, rows(tmp_path, *lines), start=start)


def test_what_does_not_fit_the_model(tmp_path: Path) -> None:
    """Plain text is nothing to see; a chat template has no use; a full mask is none at all."""
    (tmp_path / "a.txt").write_text("word " * 100)
    with pytest.raises(ShortcutError, match=r"a.txt is text alone, and the model reads image"):
        take(hearing(), {"image"}, Source(str(tmp_path / "a.txt")))
    with pytest.raises(ShortcutError, match="has no use for --chat-template"):
        take(make_tokenizer(), {"text"}, Source(chat_template=True), start=1)
    found = take(make_tokenizer(), {"text"}, Source(str(tmp_path / "a.txt")), start=1)
    assert torch.equal(found.batches(3)[0].mask, torch.ones_like(found.batches(3)[0].mask))
