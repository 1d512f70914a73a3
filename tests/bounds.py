"""The road from scores to a checked checkpoint, with the oldest libraries that pyproject.toml admits and the newest.

Each runs in an environment of its own under .bounds/, from the built package, on a tiny random model made there. One
line each says which releases they were and what failed. An interpreter that is not there is left out.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".bounds"
UV = str(Path(sys.prefix) / "bin/uv")
NAMED = ("transformers", "torch", "huggingface-hub", "numpy", "datasets", "accelerate", "safetensors", "peft")
EXTRAS = ("plot", "vision", "gguf", "heal")
SMALL = ["--samples", "3", "--length", "32", "--quiet"]
RESOLUTION = {"lowest": "lowest-direct", "highest": "highest"}
ROAD = {
    "score": ["score", "base", "--out", "scores.json", *SMALL],
    "plan": ["plan", "scores.json", "--count", "2", "--out", "plan.yaml"],
    "cut": ["cut", "base", "cut", "--plan", "plan.yaml"],
    "check": ["check", "cut", *SMALL],
    "prune": ["prune", "base", "pruned", "--count", "2", *SMALL],
    "halves": ["cut", "base", "halves", "--drop", "1", "--attention-only", "2", "--mlp-only", "3", "--last-token", "5"],
    "check halves": ["check", "halves", *SMALL],
    "heal": ["heal", "cut", "healed", "--method", "lora", "--learning-rate", "0.01", "--epochs", "3", *SMALL],
}
MODEL = """
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

torch.manual_seed(11)
config = LlamaConfig(
    vocab_size=263, hidden_size=40, intermediate_size=53, num_hidden_layers=7, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
AutoModelForCausalLM.from_config(config).save_pretrained("base")
specials = ["<pad>", "<s>", "</s>", "<unk>"]
vocabulary = {token: number for number, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained("base")
"""


def build(python: str, end: str) -> Path:
    """Makes the environment of one interpreter at one end of the bounds, and gives its folder."""
    home = FOLDER / end
    releases = home.with_suffix(".txt")
    if not (home / "bin/python").exists():
        run([UV, "venv", "--quiet", "--python", python, str(home)])
    inside = ["--quiet", "--python", str(home / "bin/python")]
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    chosen = [
        "--resolution",
        RESOLUTION[end],
        "--upgrade",
        "--no-annotate",
        "--no-header",
        "--output-file",
        str(releases),
    ]
    run([UV, "pip", "compile", *inside, *chosen, *extras, "pyproject.toml"])
    run([UV, "pip", "sync", *inside, str(releases)])
    run([UV, "pip", "install", *inside, "--no-deps", "--reinstall", "."])
    return home


def run(command: list[str], folder: Path = ROOT) -> None:
    """Runs a command without a network for models, and raises with what it said where it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)


def walk(home: Path, folder: Path) -> list[str]:
    """Goes the road in a folder, and gives the stations that failed; what they said goes to stderr."""
    run([str(home / "bin/python"), "-c", MODEL], folder)
    failed = []
    for name, words in ROAD.items():
        try:
            run([str(home / "bin/shortcut"), *words], folder)
        except subprocess.CalledProcessError as error:
            print(f"--- {home.name}: {name}\n{error.stdout}{error.stderr}", file=sys.stderr)
            failed.append(name)
    return failed


def report(python: str, end: str) -> bool:
    """Prints the line of one interpreter, and says whether all went well."""
    if not shutil.which(python):
        print(f"{end}: left out, there is no {python}")
        return True
    try:
        home = build(python, end)
        with tempfile.TemporaryDirectory() as folder:
            failed = walk(home, Path(folder))
    except subprocess.CalledProcessError as error:
        print(f"{end}: failed: {' '.join(error.cmd[:3])}\n{error.stdout}{error.stderr}")
        return False
    locked = dict(re.findall(r"^([\w-]+)==(\S+)", (FOLDER / f"{end}.txt").read_text("utf-8"), re.MULTILINE))
    releases = ", ".join(f"{name} {locked[name]}" for name in NAMED)
    said = subprocess.run([home / "bin/python", "--version"], check=True, capture_output=True, text=True).stdout.strip()
    print(f"{end}: {'failed: ' + ', '.join(failed) if failed else 'passed'} ({said}, {releases})")
    return not failed


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    oldest, newest = sys.argv[1:]
    outcomes = [report(oldest, "lowest"), report(newest, "highest")]
    sys.exit(not all(outcomes))
