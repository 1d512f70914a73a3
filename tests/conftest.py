"""Tiny random models of several families, made once per run, and what compares them.

Sizes are distinct primes where the family allows it, so that no transposed axis passes. Weights are large enough for
every block to matter: a wrong block changes the logits by far more than rounding.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported: no test may reach the network
# Of processes that run beside each other, threads of one wait for those of another.
os.environ |= {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shortcut.checking import benchmark, samples
from shortcut.material import calibration, take

# Random models have little to say, and two models are told apart by little text.
samples.SAMPLE_TOKENS = 4
benchmark.PROMPT, benchmark.NEW_TOKENS, benchmark.RUNS = 16, 4, 1
take.HELDOUT_SAMPLES["text"] = 4
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose much on a busy machine
VOCABULARY = 263
DEPTH = 7
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    **_COMMON,
    "num_hidden_layers": DEPTH,
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 14, "max_window_layers": 3, "use_sliding_window": True, "sliding_window": 5},
    "mistral": {**_LLAMA, "sliding_window": 5},
    "gemma3_text": {**_LLAMA, "head_dim": 14, "sliding_window": 5, "sliding_window_pattern": 3},
    "gpt2": {**_COMMON, "n_layer": DEPTH, "n_embd": 44, "n_head": 4, "n_positions": 128},
    "opt": {
        **_COMMON,
        "num_hidden_layers": DEPTH,
        "hidden_size": 44,
        "word_embed_proj_dim": 44,
        "ffn_dim": 53,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "phi": {**_LLAMA, "num_attention_heads": 2},  # rotates half of each head: its width has to be even
    "gpt_neox": {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"},
    # Products grouped by expert want rows of whole 16 bytes.
    "mixtral": {**_LLAMA, "intermediate_size": 52, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA,
        "head_dim": 14,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [2],
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first, so that of two processes none is left with them at the end."""
    slow, thorough = (
        Counter(item.path for item in items if item.get_closest_marker(marker)) for marker in ("slow", "thorough")
    )
    items.sort(key=lambda item: (-slow[item.path], -thorough[item.path]))


_tokenise, _tokenised = calibration.tokenise, dict[tuple[str, str], list[int]]()


def tokenise_once(tokenizer: Any, document: Any, template: str | None) -> list[int]:
    """As `calibration.tokenise`; but the same text by an equal tokenizer is tokenised once per run."""
    if template is not None or not isinstance(document, str) or len(document) < 10_000:
        return _tokenise(tokenizer, document, template)
    key = (tokenizer.backend_tokenizer.to_str(), document)
    if key not in _tokenised:
        _tokenised[key] = _tokenise(tokenizer, document, template)
    return list(_tokenised[key])


calibration.tokenise = tokenise_once


def make_tokenizer(*, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: any text, 256 tokens and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(family: str, **changes: Any) -> Any:
    """A random model of a family, in float32, whose every block turns its input by a good deal; any like Llama, too."""
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(family, **{**FAMILIES.get(family, _LLAMA), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    return model


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for the next time is not kept beyond a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a tiny checkpoint with tokenizer: by family, in one file or forced into many shards."""
    made: dict[tuple[Any, ...], Path] = {}

    def give(family: str, *, sharded: bool = False, bos: bool = False, **changes: Any) -> Path:
        key = (family, sharded, bos, *sorted(changes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(family) / "base"
            make_model(family, **changes).save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
            make_tokenizer(bos=bos).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return give


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Gives the folders of a tiny vision-language model and of its checkpoint with blocks 0, 2, 3 and 5 frozen."""
    import shortcut
    from tests.vision import FAMILIES, make_vision_model

    made: dict[str, tuple[Path, Path]] = {}

    def give(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make_vision_model(FAMILIES[name]).save_pretrained(folder / "base")
            shortcut.cut(folder / "base", folder / "short", freeze_visual="0,2-3,5", quiet=True)
            made[name] = folder / "base", folder / "short"
        return made[name]

    return give


@pytest.fixture
def llama(checkpoint_of: Callable[..., Path]) -> Path:
    """The tiny Llama that most tests cut: seven blocks, one file."""
    return checkpoint_of("llama")


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Random token ids, (2, 23), without special tokens."""
    return torch.randint(4, VOCABULARY - 3, (2, 23), generator=torch.Generator().manual_seed(5))
