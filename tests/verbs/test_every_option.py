"""No option is read and then ignored: what a command is told arrives where the work is done."""

import functools
import inspect
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import shortcut
from shortcut.material.documents import Source
from shortcut.material.take import HELDOUT_SAMPLES
from shortcut.options.groups import Loading
from shortcut.options.verb import handed_on

TEXT = {"samples": 5, "length": 24, "by_document": True, "seed": 6, "split": "test", "column": "body"}
MODEL = {"batch_size": 3, "device": "cpu", "dtype": "bfloat16", "trust_remote_code": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "score": {"metric": "l2", "offload": True},
    "sweep": {"metric": "l2", "count": "1", "offload": True, "heldout": "heldout.jsonl"},
    "prune": {"select": "auto", "count": 1, "overwrite": True, "max_shard_size": "50KB", "heldout": "heldout.jsonl"},
    "check": {},
}
CHOSEN_BY, TRIED_ON = Source("data.jsonl", "test", "body"), Source("heldout.jsonl", "test", "body")
TAKEN = {  # source, samples, length, by_document, seed
    "score": [(CHOSEN_BY, 5, 24, True, 6)],
    "sweep": [(CHOSEN_BY, 5, 24, True, 6), (TRIED_ON, 5, 24, True, 6)],
    "prune": [(TRIED_ON, HELDOUT_SAMPLES["text"], 24, False, 0), (CHOSEN_BY, 5 + 1, 24, True, 6)],
    "check": [(CHOSEN_BY, 5, 24, True, 6)],
}
Spy = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """Notes the arguments of every call of a function, under all the names that modules know it by."""

    def notes_of(*places: str) -> list[dict[str, Any]]:
        notes: list[dict[str, Any]] = []
        for place in places:
            module, _, name = place.rpartition(".")
            real = getattr(import_module(f"shortcut.{module}"), name)

            def noting(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                told = inspect.signature(real).bind(*args, **kwargs)
                told.apply_defaults()
                notes.append(told.arguments)
                return real(*args, **kwargs)

            monkeypatch.setattr(f"shortcut.{place}", functools.wraps(real)(noting))
        return notes

    return notes_of


@pytest.mark.parametrize("command", OPTIONS)
def test_what_a_command_is_told_arrives(
    command: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spy: Spy
) -> None:
    """For every text, tokenizer and model that a command opens: where from, how much, which seed, device and type."""
    monkeypatch.chdir(tmp_path)
    for name in ("data.jsonl", "heldout.jsonl"):
        rows = [json.dumps({"title": "none", "body": "lorem ipsum " * n}) for n in range(30)]
        Path(name).write_text("\n".join(rows))
    shortcut.cut(llama, "short", drop="1", quiet=True)
    models = spy("live.offload.load_model", "checking.verify.load_model")
    texts, tokenizers = spy("material.calibration.make_calibration"), spy("live.load.load_tokenizer")
    batches = spy("material.calibration.make_batches")

    of_command = {"score": (llama,), "sweep": (llama,), "prune": (llama, "short"), "check": ("short",)}[command]
    getattr(shortcut, command)(*of_command, data="data.jsonl", quiet=True, **OPTIONS[command], **TEXT, **MODEL)

    found = [(call["source"], *(call[name] for name in ("samples", "length", "by_document", "seed"))) for call in texts]
    assert found == TAKEN[command]
    assert [call["trust_remote_code"] for call in tokenizers] == [True] * len(texts)
    assert {call["batch_size"] for call in batches} == {3}
    assert len(batches) >= len(texts)
    assert {handed_on(Loading, call["how"]) for call in models} == {
        Loading(device="cpu", dtype="bfloat16", trust_remote_code=True)
    }
    if "offload" in OPTIONS[command]:
        assert all(call["places"] for call in models)  # blocks on the disk
    if "max_shard_size" in OPTIONS[command]:
        assert len(list(Path("short").glob("*.safetensors"))) > 3
