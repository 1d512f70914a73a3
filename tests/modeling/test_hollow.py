"""Hollow checkpoints: smaller on disk, loaded by transformers alone, and equal to the base with silent branches."""

import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family.halves import read_hollowings
from shortcut.live.load import load_model
from shortcut.records.actions import Action
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Base, Plan
from tests.conftest import DEPTH, FAMILIES, make_model, make_tokenizer
from tests.fresh import run_fresh
from tests.hub_server import serve
from tests.reference import greedy, logits
from tests.scoring.test_halves import carried_out
from tests.surgery.test_quantised import METHODS, SIZES

pytestmark = pytest.mark.thorough

MIXTURES: list[dict[int, Action]] = [
    {0: "mlp-only", 1: "drop", 3: "attention-only", 4: "mlp-only"},
    {2: "attention-only", 6: "mlp-only"},
    {0: "attention-only", 1: "attention-only", 5: "drop"},
]


def hollowed(folder: Path, out: Path, actions: Mapping[int, Action], **how: Any) -> Any:
    """Cut by file, and load as anybody does."""
    shortcut.cut(folder, out, plan=Plan.of(Base(str(folder), None, DEPTH), actions), verify=True, quiet=True, **how)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("actions", MIXTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_checkpoint_is_the_hooked_base(
    family: str, actions: dict[int, Action], checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path
) -> None:
    """Logits, and continuations with and without a cache, alone and in a batch padded on the left."""
    folder = checkpoint_of(family, sharded=True)
    base, short = load_model(folder), hollowed(folder, tmp_path / "short", actions)
    padded = torch.cat([torch.zeros_like(token_ids[:1, :5]), token_ids[:1, :-5]], dim=1)
    rows, mask = torch.cat([token_ids[1:], padded]), torch.ones(2, token_ids.shape[1], dtype=torch.long)
    mask[1, :5] = 0
    with carried_out(base, family, actions):
        torch.testing.assert_close(logits(short, token_ids), logits(base, token_ids), rtol=0, atol=1e-5)
        expected = greedy(base, token_ids, cache=False)
    assert torch.equal(greedy(short, token_ids), expected)
    assert torch.equal(greedy(short, token_ids, cache=False), expected)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = short.generate(rows, attention_mask=mask, **how)
    alone = short.generate(token_ids[:1, :-5], attention_mask=mask[:1, :-5], **how)
    assert torch.equal(together[1, -5:], alone[0, -5:])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_is_not_on_the_disk(family: str, checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Every tensor of the branch and of norms only it uses is gone; all others are the base's, byte for byte."""
    folder = checkpoint_of(family)
    base = Base(str(folder), None, DEPTH)
    plan = Plan.of(base, {1: "attention-only", 2: "mlp-only"})
    shortcut.cut(folder, tmp_path / "short", plan=plan, quiet=True)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "short"))
    gone = before.keys() - after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    container = read_checkpoint(folder).anatomy.container
    assert {name.removeprefix(container).split(".")[0] for name in gone} == {"1", "2"}
    both = load_model(folder).get_submodule(container.removesuffix("."))[1]
    silent = sum(weight.numel() for name, weight in both.named_parameters())
    shared = {"phi": "input_layernorm"}.get(family)  # a parallel block has one norm, which stays
    rest = sum(weight.numel() for name, weight in both.named_parameters() if shared and name.startswith(shared))
    if family != "qwen3_moe":  # whose block 2 is dense
        assert sum(before[name].numel() for name in gone) == silent - rest


FRESH = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, attn_implementation="eager")
    AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    torch.save(model(torch.arange(4, 24)[None]).logits, f"{name}.pt")
"""


def test_a_fresh_process_loads_it(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """With transformers alone, shortcut not being there; weights fused in memory are found."""
    shorts = {name: hollowed(checkpoint_of(name), tmp_path / name, MIXTURES[0]) for name in ("llama", "mixtral")}
    run_fresh(FRESH, *shorts, folder=tmp_path)
    for name, short in shorts.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits(short, torch.arange(4, 24)[None]))


def test_without_trust_it_does_not_load(llama: Path, tmp_path: Path) -> None:
    """Plain from_pretrained fails, and the native class is never filled with random numbers."""
    hollowed(llama, tmp_path / "short", MIXTURES[0])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "short", trust_remote_code=False)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_round_trips(family: str, checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path) -> None:
    """Saved, pickled, placed by accelerate and in a pipeline, the loaded model is what it was."""
    short = hollowed(checkpoint_of(family), tmp_path / "short", MIXTURES[0])
    expected = logits(short, token_ids)
    short.save_pretrained(tmp_path / "again")
    for folder in ("short", "again"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, trust_remote_code=True, device_map="auto", attn_implementation="eager"
        )
        torch.testing.assert_close(logits(model.eval(), token_ids), expected, rtol=0, atol=0)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("short", "again"))
    skipped = [{int(k): v for k, v in config["per_layer_config"].items()} for config in (first, second)]
    assert skipped[0] == skipped[1]
    assert first["auto_map"] == second["auto_map"]
    torch.testing.assert_close(logits(pickle.loads(pickle.dumps(short)), token_ids), expected, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "short", trust_remote_code=True)
    written = pipeline("text-generation", model=short, tokenizer=tokenizer)("abc", max_new_tokens=4, do_sample=False)
    assert written[0]["generated_text"].startswith("abc")


PUSH_AND_PULL = """
import torch
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained("short", trust_remote_code=True).push_to_hub("org/short")
model = AutoModelForCausalLM.from_pretrained("org/short", trust_remote_code=True, attn_implementation="eager")
torch.save(model(torch.arange(4, 24)[None]).logits, sys.argv[1])
"""


def test_pushed_and_pulled(llama: Path, tmp_path: Path) -> None:
    """push_to_hub takes the modeling file along, and from_pretrained by id loads it on a machine without shortcut."""
    short = hollowed(llama, tmp_path / "short", {**MIXTURES[0], 5: "last-token"})
    (tmp_path / "remote").mkdir()
    with serve("org/short", tmp_path / "remote") as hub:
        run_fresh(PUSH_AND_PULL, "logits.pt", folder=tmp_path, hub=hub.url)
    assert (tmp_path / "remote" / "modeling_hollow.py").exists()
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(short, torch.arange(4, 24)[None]))


def test_adapters_are_trained_and_merged(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """PEFT finds the linear layers that are left; a merged adapter saves and loads as the checkpoint does."""
    peft = pytest.importorskip("peft")
    short = hollowed(llama, tmp_path / "short", MIXTURES[0])
    before = logits(short, token_ids)
    adapted = peft.get_peft_model(short, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted(input_ids=token_ids, labels=token_ids).loss.backward()
    merged = adapted.merge_and_unload()
    expected = logits(merged, token_ids)
    assert not torch.allclose(expected, before, atol=1e-2)
    merged.save_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", trust_remote_code=True, attn_implementation="eager"
    )
    torch.testing.assert_close(logits(model.eval(), token_ids), expected)


def test_static_cache_and_compiled_attention(llama: Path, token_ids: Tensor, tmp_path: Path) -> None:
    """Block 0 without attention stores nothing, and the positions of new tokens are right in every kind of cache."""
    short = hollowed(llama, tmp_path / "short", MIXTURES[0])
    expected = greedy(short, token_ids)
    how = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(token_ids)
    static = short.generate(token_ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **how)
    assert torch.equal(static, expected)
    sdpa = AutoModelForCausalLM.from_pretrained(tmp_path / "short", trust_remote_code=True)
    assert torch.equal(greedy(sdpa.eval(), token_ids), expected)


def test_the_road_with_halves(llama: Path, tmp_path: Path) -> None:
    """prune chooses halves, writes a hollow checkpoint and checks it; check and score take it without being told to."""
    text: dict[str, Any] = {"samples": 2, "length": 32, "quiet": True}
    report = shortcut.prune(
        llama,
        tmp_path / "short",
        count=3,
        select="greedy",
        metric="perplexity",
        allow="attention-only,mlp-only",
        **text,
    )
    assert report.cut.plan.hollow
    assert report.check.logit_difference == pytest.approx(0, abs=1e-4)
    assert shortcut.check(tmp_path / "short", **text).bytes_compared == report.check.bytes_compared
    assert len(shortcut.score(tmp_path / "short", **text).of_blocks("block-influence")) == len(report.cut.plan.kept)
    card = (tmp_path / "short" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    blocks = format_blocks(report.cut.plan.blocks("attention-only"))
    assert f"{blocks} have lost their MLP" in card
    shorter = shortcut.cut(tmp_path / "short", tmp_path / "shorter", drop="0", quiet=True)
    assert load_model(tmp_path / "shorter").config.num_hidden_layers == len(shorter.plan.kept)


def test_code_that_was_changed_is_not_run(llama: Path, tmp_path: Path) -> None:
    """The modeling file is trusted as long as it is the one shortcut writes, to the letter."""
    hollowed(llama, tmp_path / "short", MIXTURES[0])
    path = tmp_path / "short" / "modeling_hollow.py"
    path.write_text(path.read_text() + "print('boo')\n")
    with pytest.raises(ShortcutError, match="contains custom code"):
        load_model(tmp_path / "short")


def test_what_cannot_be_hollow(checkpoint_of: Callable[..., Path], tmp_path: Path) -> None:
    """Architectures that were not found exact, and checkpoints that are hollow already, are one line."""
    llama = checkpoint_of("llama")
    hollowed(llama, tmp_path / "short", MIXTURES[0])
    with pytest.raises(ShortcutError, match="blocks of a hollow checkpoint cannot lose more"):
        shortcut.cut(tmp_path / "short", tmp_path / "two", mlp_only="3", quiet=True)
    config = json.loads((llama / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").symlink_to(llama / "model.safetensors")
    for family, architecture in (("llama", "NoneSuchForCausalLM"), ("exaone", "LlamaForCausalLM")):
        changed = {**config, "model_type": family, "architectures": [architecture]}
        (other / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ShortcutError, match=f"{architecture} of {family} cannot lose parts of blocks"):
            shortcut.cut(other, tmp_path / "three", mlp_only="3", quiet=True)
    assert not (tmp_path / "three").exists()


def test_the_modeling_file_names_its_architecture() -> None:
    """Of every architecture it compiles, needs no other package, and names that architecture and no other."""
    for (_, name), hollowing in read_hollowings().items():
        code = hollowing.modeling.code
        compile(code, name, "exec")
        assert "shortcut." not in code
        assert name == "LlamaForCausalLM" or not re.search(r"\bLlamaForCausalLM", code)
        assert f"class Hollow{name}(Whole, {name}):" in code


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroed_branches(family: str, checkpoint_of: Callable[..., Path], token_ids: Tensor, tmp_path: Path) -> None:
    """--format zeroed loads with the native class anywhere, is as large as before, and gives the same logits."""
    folder, actions = checkpoint_of(family), MIXTURES[0]
    shortcut.prune(
        folder,
        tmp_path / "short",
        drop="1",
        mlp_only="0,4",
        attention_only="3",
        format="zeroed",
        heldout="default",
        length=32,
        quiet=True,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "short", attn_implementation="eager").eval()
    base = load_model(folder)
    with carried_out(base, family, actions):
        torch.testing.assert_close(logits(model, token_ids), logits(base, token_ids), rtol=0, atol=1e-5)
        assert torch.equal(greedy(model, token_ids), greedy(base, token_ids))
    assert shortcut.check(tmp_path / "short", quiet=True, length=32).logit_difference is not None
    assert not (tmp_path / "short" / "modeling_hollow.py").exists()


@pytest.mark.parametrize("method", ["bitsandbytes-nf4", "bitsandbytes-int8", "compressed-tensors-int4"])
def test_halves_of_quantised_blocks(method: str, token_ids: Tensor, tmp_path: Path) -> None:
    """Their tensors go as they are, and what stays computes what it did; zeros they cannot hold."""
    make_model("llama", **SIZES).save_pretrained(tmp_path / "plain")
    METHODS[method](tmp_path / "plain", tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    plan = Plan.of(Base("base", None, DEPTH), MIXTURES[0])
    shortcut.cut(tmp_path / "base", tmp_path / "short", plan=plan, quiet=True)
    base, short = load_model(tmp_path / "base"), load_model(tmp_path / "short")
    with carried_out(base, "llama", MIXTURES[0]):
        torch.testing.assert_close(logits(short, token_ids), logits(base, token_ids), rtol=0, atol=1e-5)
    with pytest.raises(ShortcutError, match="which is quantised .*: use --format custom"):
        shortcut.cut(tmp_path / "base", tmp_path / "zeroed", plan=plan, format="zeroed", quiet=True)
