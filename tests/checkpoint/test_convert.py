"""Weights in other forms: pickled ones become safetensors without running what they say; adapters are sent back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.checkpoint.open import open_model
from shortcut.common.errors import ShortcutError
from shortcut.live.load import load_model
from tests.checkpoint.test_remote import run
from tests.hub_server import serve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "shortcut"


def pickle_weights(base: Path, folder: Path, shards: int = 1, *, zipped: bool = True) -> Path:
    """A copy of a checkpoint whose weights are pickled, as PyTorch did for years."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = read_tensors(base)
    names = sorted(tensors)
    files = [f"pytorch_model-{n:05d}-of-{shards:05d}.bin" for n in range(shards)] if shards > 1 else [PICKLE]
    for number, file in enumerate(files):
        part = {name: tensors[name] for name in names[number::shards]}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    if shards > 1:
        weight_map = {name: files[place % shards] for place, name in enumerate(names)}
        (folder / f"{PICKLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


PICKLE = "pytorch_model.bin"


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(("shards", "zipped"), [(1, True), (1, False), (3, True)])
def test_pickled_weights_are_converted_once(
    shards: int, zipped: bool, llama: Path, tmp_path: Path, cache: Path, token_ids: torch.Tensor
) -> None:
    """One file or several, of either format: the cut is that of the same weights in safetensors."""
    base = pickle_weights(llama, tmp_path / "base", shards, zipped=zipped)
    shortcut.cut(llama, tmp_path / "expected", drop="2,3", quiet=True)
    shortcut.cut(base, tmp_path / "short", drop="2,3", quiet=True)
    torch.testing.assert_close(read_tensors(tmp_path / "short"), read_tensors(tmp_path / "expected"), rtol=0, atol=0)
    with torch.no_grad():
        models = [load_model(tmp_path / name) for name in ("short", "expected")]
        torch.testing.assert_close(*(model(token_ids).logits for model in models), rtol=0, atol=0)
    assert (tmp_path / "short" / "tokenizer.json").exists()
    assert len(read_checkpoint(tmp_path / "short").files) == shards

    (made,) = cache.iterdir()
    before = (made / "shortcut.json").stat().st_mtime_ns
    assert open_model(base).folder == made
    assert (made / "shortcut.json").stat().st_mtime_ns == before
    assert open_model(base).base.model == str(base)


def test_changed_weights_are_converted_again(llama: Path, tmp_path: Path) -> None:
    """Other numbers in a file of the same name and size: what the cache has of the old ones is not taken for them."""
    base = pickle_weights(llama, tmp_path / "base")
    old, tensors = open_model(base).folder, torch.load(base / PICKLE, weights_only=True)
    size = (base / PICKLE).stat().st_size
    torch.save({name: 2 * tensor for name, tensor in tensors.items()}, base / PICKLE)
    assert (base / PICKLE).stat().st_size == size
    new = read_tensors(open_model(base).folder)
    torch.testing.assert_close(new, {name: 2 * tensor for name, tensor in read_tensors(old).items()}, rtol=0, atol=0)


def test_tied_weights_in_a_pickle_stay_as_they_are(llama: Path, tmp_path: Path) -> None:
    """Two names for the same memory become two tensors: what is there is copied, nothing is guessed."""
    base = pickle_weights(llama, tmp_path / "base")
    tensors = torch.load(base / PICKLE, weights_only=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, base / PICKLE)
    checkpoint = open_model(base)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= checkpoint.tensors.keys()


class Harmful:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


BROKEN = {
    "code": (lambda file, proof: torch.save({"a": Harmful(proof)}, file), "code in it is not run"),
    "old code": (
        lambda file, proof: torch.save({"a": Harmful(proof)}, file, _use_new_zipfile_serialization=False),
        "code in it is not run",
    ),
    "numbers": (lambda file, _: torch.save({"a": 3}, file), "is no plain map of names to tensors"),
    "nested": (lambda file, _: torch.save({"model": {"a": torch.zeros(1)}}, file), "is no plain map of names"),
    "half a file": (lambda file, _: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), PICKLE),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_pickle_of_anything_else_is_not_read(fault: str, llama: Path, tmp_path: Path, cache: Path) -> None:
    """Code is never run, and nothing is left behind."""
    base = pickle_weights(llama, tmp_path / "base")
    spoil, message = BROKEN[fault]
    spoil(base / PICKLE, tmp_path / "proof")
    with pytest.raises(ShortcutError, match=message):
        open_model(base, quiet=True)
    assert not (tmp_path / "proof").exists()
    assert not cache.exists() or not list(cache.iterdir())


def test_a_missing_pickle_is_named(llama: Path, tmp_path: Path) -> None:
    """An index that names a file that is not there, or one elsewhere, is an error."""
    base = pickle_weights(llama, tmp_path / "base", 3)
    (base / "pytorch_model-00001-of-00003.bin").unlink()
    with pytest.raises(ShortcutError, match=r"pytorch_model-00001-of-00003.bin is missing"):
        open_model(base, quiet=True)
    index = base / f"{PICKLE}.index.json"
    index.write_text(index.read_text().replace("pytorch_model-00001", "../pytorch_model-00001"))
    with pytest.raises(ShortcutError, match="which is no file of its own folder"):
        open_model(base, quiet=True)


@pytest.mark.thorough
def test_pickled_weights_on_the_hub(llama: Path, tmp_path: Path) -> None:
    """A model on the Hub that has no safetensors is fetched whole and converted."""
    base = pickle_weights(llama, tmp_path / "base")
    shortcut.cut(llama, tmp_path / "expected", drop="2", quiet=True)
    with serve("org/tiny", base) as hub:
        done = run(hub, tmp_path / "home", "cut", "org/tiny", str(tmp_path / "short"), "--drop", "2")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(read_tensors(tmp_path / "short"), read_tensors(tmp_path / "expected"), rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_adapters_are_to_be_merged_first(whole: bool, llama: Path, tmp_path: Path) -> None:
    """A PEFT adapter, alone or beside weights that it would be loaded on, is not cut."""
    folder = tmp_path / "adapter"
    if whole:
        shutil.copytree(llama, folder)
    else:
        folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    with pytest.raises(ShortcutError, match="is a PEFT adapter: merge it into its base first"):
        shortcut.cut(folder, tmp_path / "short", drop="2", quiet=True)
    with serve("org/adapter", folder) as hub:
        done = run(hub, tmp_path / "home", "cut", "org/adapter", str(tmp_path / "short"), "--drop", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("shortcut: org/adapter is a PEFT adapter: merge it into its base first (")
    assert done.stderr.count("\n") == 1
