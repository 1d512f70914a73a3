"""The whole command `shortcut cut`, start-up and fsync included, against cp of what it keeps and against other tools.

The kernel counts the memory of a child from the fork on, when it is still this process; so this one stays small, and
imports neither shortcut nor numpy.
"""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.rounds import compare, emit, say, scratch, take_turns

RUNS, RUNS_OF_SLOW = 7, 3
DEPTH = 24
DROP = "6,8,10,12,14,16,18,20,22"  # 9 of 24, no two of them neighbours: the most pieces to copy
WIDTH, INNER, VOCABULARY = 2048, 6144, 49152
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": DEPTH,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
SHARD = 800_000_000  # bytes: four shards
CHUNK = 1 << 20
NEEDED = 10_000_000_000  # bytes: the base, what cp copies, and one result
COPY = 'mkdir "$2" && for file in "$1"/*; do cp "$file" "$2" && sync "$2/${file##*/}" || exit 1; done && sync "$2"'
SYNC = '"$@" && for file in "$0"/*; do sync "$file" || exit 1; done && sync "$0"'  # $0: what the command writes
BIN = Path(sys.executable).parent
MERGEKIT = Path(".mergekit/bin/mergekit-yaml")  # an environment of its own, made by `make bench`


def main() -> None:
    if shutil.disk_usage(tempfile.gettempdir()).free < NEEDED:
        sys.exit(f"the benchmark of cut needs {NEEDED / 1e9:.0f} GB in {tempfile.gettempdir()}")
    if not MERGEKIT.exists():
        sys.exit(f"no {MERGEKIT}: run `make bench`, which installs this rival")
    with scratch() as folder:
        base = folder / "base"
        say("writing a random Llama checkpoint")
        size = write_base(base)
        against_cp(base, folder, f"9 of {DEPTH} blocks of {size / 1e9:.2f} GB in four shards")
        against_tools(base, folder, DEPTH, f"9 of {DEPTH} blocks of {size / 1e9:.2f} GB in four shards", bound=4)
        shutil.rmtree(base)
        finder = "from shortcut.checkpoint.open import *; print(open_model(embedded_model(), quiet=True).folder)"
        found = subprocess.run([sys.executable, "-c", finder], check=True, capture_output=True, text=True)
        against_tools(Path(found.stdout.strip()), folder, 30, "9 of 30 blocks of SmolLM2-135M", bound=10)


def against_cp(base: Path, folder: Path, what: str) -> None:
    """Time the command against cp and fsync of what it keeps, and measure its memory."""
    kept, target = folder / "kept", folder / "target"
    run([*cut_command(base), str(kept)])  # its result is what the rival copies
    copied = read_through(kept)
    read_through(base)
    peaks: list[float] = []

    def tool() -> float:
        seconds, peak = run([*cut_command(base), str(target)], target)
        peaks.append(peak)
        return seconds

    def rival() -> float:
        return run(["sh", "-c", COPY, "sh", str(kept), str(target)], target)[0]

    take_turns(1, tool, rival)  # does not count
    timings = take_turns(RUNS, tool, rival)
    found = {"rival": "cp + fsync", **compare(*timings), "bound": 1.15}
    peak = {"peak_mb": round(statistics.median(peaks), 1), "peak_bound_mb": 60}
    emit("cut", f"{what}, {copied / 1e9:.2f} GB kept, whole process", **found, **peak)
    shutil.rmtree(kept)


def against_tools(base: Path, folder: Path, depth: int, what: str, *, bound: int) -> None:
    """Time the command against mergekit and against loading, deleting and saving; first see that all write the same."""
    outs = [folder / name for name in ("tool", "mergekit", "by-hand")]
    recipe = folder / "slices.yaml"
    recipe.write_text(slices(base, depth))
    copying = ["--copy-tokenizer"] if (base / "tokenizer.json").exists() else ["--no-copy-tokenizer"]
    by_hand = [sys.executable, "-m", "tests.bench.load_delete_save", str(base), str(outs[2]), DROP]
    commands = [
        [*cut_command(base), str(outs[0])],  # syncs by itself
        ["sh", "-c", SYNC, str(outs[1]), str(MERGEKIT), str(recipe), str(outs[1]), "--quiet", *copying],
        ["sh", "-c", SYNC, str(outs[2]), *by_hand],
    ]
    for command in commands:
        run(command)
    subprocess.run([sys.executable, "-m", "tests.bench.same", *map(str, outs)], check=True)
    for out in outs:
        shutil.rmtree(out)
    works = [lambda command=command, out=out: run(command, out)[0] for command, out in zip(commands, outs, strict=True)]
    tool, *rivals = take_turns(RUNS_OF_SLOW, *works)
    for name, timings in zip(("mergekit passthrough", "load, delete, save"), rivals, strict=True):
        found = {"rival": f"{name} + fsync", **compare(tool, timings), "bound": round(1 / bound, 2)}
        emit("cut", f"{what}, same tensors", **found)


def cut_command(base: Path) -> list[str]:
    return [str(BIN / "shortcut"), "cut", str(base), "--drop", DROP, "--quiet"]


def slices(base: Path, depth: int) -> str:
    """The recipe that tells mergekit to keep what the command keeps."""
    dropped = [-1, *map(int, DROP.split(",")), depth]
    spans = [(before + 1, after) for before, after in itertools.pairwise(dropped) if before + 1 < after]
    sources = "".join(f"- sources: [{{model: {base}, layer_range: [{a}, {b}]}}]\n" for a, b in spans)
    return f"slices:\n{sources}merge_method: passthrough\ndtype: bfloat16\n"


def write_base(folder: Path) -> int:
    """Write the checkpoint shard by shard, of random bytes in the order save_pretrained gives them; gives its size."""
    shards = pack_shards(list_tensors())
    folder.mkdir()
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(shard, path.name)
        write_shard(path, shard)
    size = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return size


def list_tensors() -> dict[str, tuple[int, ...]]:
    """Name -> shape."""
    parts = {f"self_attn.{part}_proj": (WIDTH, WIDTH) for part in "qkvo"}
    parts |= {"mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH), "mlp.down_proj": (WIDTH, INNER)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for block in range(DEPTH):
        shapes |= {f"model.layers.{block}.{part}.weight": shape for part, shape in parts.items()}
        shapes |= {f"model.layers.{block}.{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    return {**shapes, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def pack_shards(shapes: dict[str, tuple[int, ...]]) -> list[dict[str, tuple[int, ...]]]:
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(count_bytes, shards[-1].values())) + count_bytes(shape) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    return shards


def count_bytes(shape: Sequence[int]) -> int:
    return 2 * math.prod(shape)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in sorted(shapes.items()):
        stop = position + count_bytes(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while position:
            file.write(os.urandom(min(CHUNK, position)))
            position -= min(CHUNK, position)
        os.fsync(file.fileno())


def read_through(folder: Path) -> int:
    """Bring a folder's files into the page cache; gives their bytes."""
    size = 0
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                size += len(chunk)
    return size


def run(command: Sequence[str], target: Path | None = None) -> tuple[float, float]:
    """Run a command and remove what it wrote: its seconds, and the peak of its memory in MB."""
    os.sync()  # nobody pays for what was written or removed before
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen did not see it end
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{errors.read().decode(errors='replace')[-2000:]}")
    if target is not None:
        shutil.rmtree(target)
    return seconds, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
