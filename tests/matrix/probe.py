"""Loads checkpoints with whatever transformers this interpreter has, and compares their answers with noted ones.

It is run by its file name, one process per release, and imports nothing of tests or shortcut. Beside a checkpoint X lie
X.json, which says how it is loaded, and X.safetensors, with the inputs and the answers. One line of JSON is printed for
each: what was raised, or how far the logits are off and whether the tokens are the same, and what was logged meanwhile.
"""

import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKENS = 8
ALWAYS = ("input_ids", "attention_mask")


def main() -> None:
    sys.path.pop(0)  # the folder of this file
    sys.modules["shortcut"] = None  # type: ignore[assignment]  # whoever imports it fails
    import torch

    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        print(json.dumps(probe(Path(name))), flush=True)


def probe(folder: Path) -> dict[str, Any]:
    """What became of one checkpoint."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    told: dict[str, Any] = {"checkpoint": folder.name, "release": transformers.__version__}
    with tempfile.TemporaryFile("w+") as log:
        with written_to(log):
            try:
                told |= compare(folder)
            except Exception as error:  # noqa: BLE001  (whatever it is, it is what there is to tell)
                told |= describe(error)
        log.seek(0)
        return {**told, "log": log.read().strip()}


@contextmanager
def written_to(log: Any) -> Iterator[None]:
    """All that is written to stderr meanwhile goes into this file, by whatever road."""
    sys.stderr.flush()
    own = os.dup(2)
    os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)


def compare(folder: Path) -> dict[str, Any]:
    """Load a checkpoint, let it answer, and compare.

    difference: the largest between logits of tokens that are no padding, in parts of the largest logit.
    """
    from safetensors.torch import load_file

    noted = load_file(folder.with_suffix(".safetensors"))
    inputs = {name.removeprefix("inputs."): each for name, each in noted.items() if name.startswith("inputs.")}
    how = json.loads(folder.with_suffix(".json").read_text())
    answers = answer(load(folder, how), inputs, how["silent"])
    real = inputs["attention_mask"].bool()
    expected = noted["logits"][real]
    return {
        "difference": ((answers["logits"][real] - expected).abs().max() / expected.abs().max()).item(),
        "cached": answers["cached"].equal(noted["cached"]),
        "uncached": answers["uncached"].equal(noted["uncached"]),
    }


def load(folder: Path, how: dict[str, Any]) -> Any:
    """The model of a checkpoint, in float32. how: its auto class, and whether it carries code of its own."""
    import torch
    import transformers

    dtype = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    auto = getattr(transformers, how["auto"])
    return auto.from_pretrained(folder, trust_remote_code=how["code"], **{dtype: torch.float32}).eval()


def answer(model: Any, inputs: dict[str, Any], silent: list[int]) -> dict[str, Any]:
    """The logits of a prompt, and greedy tokens behind it with a cache and without; silent: those it must not choose.

    Inputs that a model of this release does not name are left out: its processor would not make them.
    """
    import torch

    known = inspect.signature(model.forward).parameters
    inputs = {name: each for name, each in inputs.items() if name in known or name in ALWAYS}
    how: dict[str, Any] = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    how |= {"suppress_tokens": silent} if silent else {}
    with torch.no_grad():
        return {
            "logits": model(**inputs, use_cache=False).logits,
            "cached": model.generate(**inputs, **how, use_cache=True)[:, -TOKENS:],
            "uncached": model.generate(**inputs, **how, use_cache=False)[:, -TOKENS:],
        }


def describe(error: Exception) -> dict[str, Any]:
    """What was raised: its class, its words as they are, and the file and line it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return {"error": type(error).__name__, "message": str(error), "place": place}


if __name__ == "__main__":
    main()
