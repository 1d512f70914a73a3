"""Hostile checkpoints, made at random without end: `make fuzz`, or python -m tests.fuzz --seconds 600 --seed 7.

A small checkpoint is spoilt in one to three places: bytes, header, index, config, record. Then it is inspected and cut.
Whatever is wrong has to end in a ShortcutError, within two seconds and 300 MB; whatever is cut has to hold the bytes of
the base. The first breach stops the run, names its seed and keeps the folder. Prints one JSON line.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family.fields import (
    CYCLES,
    INCLUSIVE_ENDS,
    INDEX_SETS,
    KEYED,
    PERIODS,
    PERIODS_WITH_OFFSET,
    PREFIX_COUNTS,
    SUFFIX_COUNTS,
    UNSOLVED,
    is_plain,
)
from shortcut.surgery.diff import compare_tensors

SECONDS, MEGABYTES = 2.0, 300
DEPTH = 5
CONFIG = {"model_type": "llama", "num_hidden_layers": DEPTH, "layer_types": ["full_attention"] * DEPTH}
DEEP: Any = "deep"  # stands for JSON nested deeper than any parser likes
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "a",
        "model.layers.3.mlp",
        r"re:.*layers\.[12].*",
        "\x00",
        "\ud800",
        "../x",
        "/etc/passwd",
    ),
    *(0, 1, -1, 2, DEPTH, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf")),
    *([], {}, [1], [0, 99], [-1], ["a"] * DEPTH, [0] * DEPTH, [[]], {"0": 1}, {"x": {}}, {"3": {"skip": []}}, DEEP),
]
FIELDS = [
    *sorted(PREFIX_COUNTS | INCLUSIVE_ENDS | SUFFIX_COUNTS | set(INDEX_SETS) | KEYED),
    *sorted(CYCLES | set(PERIODS_WITH_OFFSET) | set(PERIODS_WITH_OFFSET.values())),
    *PERIODS,
    *UNSOLVED,
    *("num_hidden_layers", "n_layer", "layer_types", "indexer_types", "kv_source_layers", "quantization_config"),
    *("text_config", "model_type", "auto_map", "decoder_sparse_step", "scale_depth", "num_nextn_predict_layers"),
    *("architectures", "transformers_version", "ignore", "weight_map", "plan", "lineage", "__metadata__"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args()
    print(json.dumps(fuzz(options.seconds, options.seed)))
    return 0


def fuzz(seconds: float, seed: int) -> dict[str, Any]:
    """Spoil and cut for so many seconds; what came of it. Raises at the first breach."""
    outcomes: Counter[str] = Counter()
    slowest, end, number = 0.0, time.monotonic() + seconds, seed
    with tempfile.TemporaryDirectory() as home:
        base = Path(home) / "base"
        make_base(base)
        while time.monotonic() < end:
            folder = Path(home) / "spoilt"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(base, folder)
            spoil(folder, random.Random(number))
            started = time.process_time()
            try:
                outcomes[attempt(folder, Path(home) / "out")] += 1
                slowest = max(slowest, time.process_time() - started)
                megabytes = peak_megabytes()
                if slowest > SECONDS or megabytes > MEGABYTES:
                    raise AssertionError(f"{slowest:.1f} s, {megabytes:.0f} MB")
            except BaseException as error:
                kept = shutil.copytree(folder, tempfile.mkdtemp(), dirs_exist_ok=True)
                error.add_note(f"seed {number}, folder {kept}")
                raise
            number += 1
    return {"bench": "fuzz", "seed": seed, **outcomes, "slowest_s": round(slowest, 3), "peak_mb": round(megabytes)}


def peak_megabytes() -> float:
    """The most memory that this process ever had (the kernel's ru_maxrss would count its parent's too)."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def make_base(folder: Path) -> None:
    """A checkpoint of five blocks in three shards, written without torch."""
    tensors: dict[str, Any] = {"model.embed_tokens.weight": np.ones((7, 4), np.float32)}
    tensors["model.norm.weight"] = np.ones(4, np.float16)
    for block in range(DEPTH):
        tensors[f"model.layers.{block}.mlp.up_proj.weight"] = np.full((3, 4), block, np.float32)
        tensors[f"model.layers.{block}.input_layernorm.weight"] = np.full(4, block, np.float16)
    write_shards(folder, tensors, 3)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "shortcut.json").write_text(json.dumps({"shortcut": 1, "plan": {}, "lineage": []}))


def write_shards(folder: Path, tensors: dict[str, Any], count: int) -> None:
    """Write tensors in turn into this many weight files, with an index."""
    folder.mkdir()
    names = sorted(tensors)
    weight_map = {n: f"model-{place % count + 1:05d}-of-{count:05d}.safetensors" for place, n in enumerate(names)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil(folder: Path, rng: random.Random) -> None:
    """Spoil one to three files of a checkpoint."""
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(sorted(folder.iterdir()))
        raw = path.read_bytes()
        if path.suffix == ".safetensors":
            raw = rng.choice([spoil_header, spoil_bytes])(raw, rng)
        else:
            raw = rng.choice([spoil_json, spoil_json, spoil_json, spoil_bytes])(raw, rng)
        path.write_bytes(raw)


def spoil_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Flip, cut out, double or add bytes anywhere."""
    place, length = rng.randrange(len(raw) + 1), rng.choice([1, 1, 2, 8, 100])
    noise = rng.randbytes(length)
    middle = rng.choice([b"", noise, raw[place : place + length] * 2, b"[" * 100_000, noise + raw[place:][:length]])
    return raw[:place] + middle + raw[place + length :]


def spoil_header(raw: bytes, rng: random.Random) -> bytes:
    """Change the header of a weight file as JSON, or the number that says how long it is."""
    length = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.2 or len(raw) < 8 + length:
        length = rng.choice([0, 1, length - 1, length + 1, 2**32, 2**63, 2**64 - 1]) % 2**64
        return length.to_bytes(8, "little") + raw[8:]
    header = spoil_json(raw[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def spoil_json(raw: bytes, rng: random.Random) -> bytes:
    """Put a hostile value, key or name somewhere into a JSON document."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        return raw
    place: Any = data
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if rng.random() < 0.5 or not isinstance(place[key], dict | list) or not place[key]:
            action = rng.random()
            if action < 0.5:
                place[key] = rng.choice(VALUES)
            elif action < 0.8 and isinstance(place, dict):
                value = {field: rng.choice(VALUES) for field in rng.sample(FIELDS, 2)}
                place[rng.choice(FIELDS)] = rng.choice([rng.choice(VALUES), value])
            elif isinstance(place, dict):
                place[rng.choice(["", "model.layers.5.x", "model.layers.-1.x", "../a", "a" * 9999])] = place.pop(key)
            else:
                place.append(rng.choice(VALUES))
            break
        place = place[key]
    text = json.dumps(data).replace(f'"{DEEP}"', rng.choice(["[" * 50_000, "[" * 900 + "]" * 900, "[" * 60 + "]" * 60]))
    return text.encode("utf-8", "surrogatepass")


def attempt(folder: Path, out: Path) -> str:
    """Inspect and cut; what came of it. Families that need the guard are only inspected: it imports torch."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        inspection = shortcut.inspect(folder, quiet=True)
        str(inspection)
        if not is_plain(read_checkpoint(folder).config):
            return "inspected"
        report = shortcut.cut(folder, out, drop="1,3", quiet=True)
        str(report)
        json.dumps(report.to_dict())
    except ShortcutError as error:
        if "\n" in str(error) or out.exists():
            raise RuntimeError("an error of several lines, or something left behind") from error
        return "refused"
    compare_tensors(read_checkpoint(out), read_checkpoint(folder), report.plan)
    return "cut"


if __name__ == "__main__":
    sys.exit(main())
