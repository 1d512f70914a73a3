"""Checkpoints with frozen blocks in use: training, copies, fresh processes, other places for weights."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.fresh import run_fresh
from tests.modeling.test_shortv import ONE, THREE, TWO_FAMILIES, load, logits, restored
from tests.vision import DEPTH, FAMILIES, image_id, make_inputs

pytestmark = pytest.mark.thorough


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_gradients(name: str, frozen: Callable[..., Any]) -> None:
    """Loss and gradients are those of the definition, also where blocks run once more for the gradients."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], THREE, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == image_id(base), -100)
    with restored(base):
        expected = base(**inputs, labels=labels).loss
        expected.backward()
    short.activation_checkpointing_enable()
    loss = short.train()(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    wanted = {name: weight.grad for name, weight in base.named_parameters() if weight.grad is not None}
    found = {name: weight.grad for name, weight in short.named_parameters() if weight.grad is not None}
    assert found.keys() == wanted.keys()
    for weight, gradient in wanted.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, w=weight: f"{w}: {m}")


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_adapters(name: str, frozen: Callable[..., Any]) -> None:
    """With LoRA on every projection, frozen blocks are as defined, and the merged model is the adapted one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.[qkvo]_proj", init_lora_weights=False)
    adapted = []
    for model in map(load, frozen(name)):
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(model, config))
    base = adapted[0].get_base_model()
    inputs = make_inputs(base, FAMILIES[name], THREE)
    before = logits(load(frozen(name)[1]), inputs)
    with restored(base):
        expected = logits(base, inputs)
    torch.testing.assert_close(logits(adapted[1], inputs), expected, rtol=0, atol=1e-4)
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(logits(adapted[1].merge_and_unload(), inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_copies_and_round_trips(name: str, frozen: Callable[..., Any], tmp_path: Path) -> None:
    """Copied, pickled and saved again, it freezes the same blocks; copies stand on their own."""
    short = load(frozen(name)[1])
    pickled = pickle.dumps(short)  # before it is called: some towers then get hooks that cannot be pickled
    inputs = make_inputs(short, FAMILIES[name], THREE)
    expected = logits(short, inputs)
    short.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    first, second = (json.loads((f / "config.json").read_text()) for f in (frozen(name)[1], tmp_path / "again"))
    for entry in ("shortv", "auto_map", "model_type", "architectures"):
        assert first[entry] == second[entry]
    for other in (copy.deepcopy(short), pickle.loads(pickled), again):
        torch.testing.assert_close(logits(other, inputs), expected, rtol=0, atol=0)
        other.set_frozen_blocks([])
        assert (logits(other, inputs) - expected).abs().max() > 0.3
    torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_blocks_are_changed_live(name: str, frozen: Callable[..., Any], tmp_path: Path) -> None:
    """Other blocks, and all and none of them; what is saved then loads so."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], THREE)
    for blocks in ([], list(range(DEPTH)), [4, 1]):
        short.set_frozen_blocks(blocks)
        with restored(base, blocks):
            expected = logits(base, inputs)
        torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)
    short.save_pretrained(tmp_path / "other")
    assert load(tmp_path / "other").config.shortv["blocks"] == [1, 4]
    torch.testing.assert_close(logits(load(tmp_path / "other"), inputs), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no block 6: the model has blocks 0-5"):
        short.set_frozen_blocks([6])


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_hidden_states_of_a_prompt(name: str, frozen: Callable[..., Any]) -> None:
    """What comes out of every block is handed over as by the base."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], ONE)
    with restored(base), torch.no_grad():
        expected = base(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        found = short(**inputs, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == DEPTH + 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_inside_freezes_as_well(name: str, frozen: Callable[..., Any]) -> None:
    """Called by itself, without the vocabulary, and in a copy."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], THREE)
    with restored(base), torch.no_grad():
        expected = base(**inputs, output_hidden_states=True).hidden_states[-1]
    real = inputs["attention_mask"].bool()
    for model in (short, copy.deepcopy(short)):
        with torch.no_grad():
            found = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-5)


FRESH = """
import torch
from transformers import AutoModelForImageTextToText
for number, folder in enumerate(sys.argv[1:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    torch.save(model(**torch.load(f"inputs-{number}.pt")).logits, f"logits-{number}.pt")
"""


def test_a_fresh_process_loads_it(frozen: Callable[..., Any], tmp_path: Path) -> None:
    """With transformers alone, shortcut not being there."""
    expected = []
    for number, name in enumerate(TWO_FAMILIES):
        short = load(frozen(name)[1])
        inputs = make_inputs(short, FAMILIES[name], ONE)
        torch.save(inputs, tmp_path / f"inputs-{number}.pt")
        expected.append(logits(short, inputs))
    run_fresh(FRESH, *(frozen(name)[1] for name in TWO_FAMILIES), folder=tmp_path)
    for number, values in enumerate(expected):
        torch.testing.assert_close(torch.load(tmp_path / f"logits-{number}.pt").flatten(0, 1), values)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_trust_it_does_not_load(name: str, frozen: Callable[..., Any]) -> None:
    """Plain from_pretrained fails: no dense and no random model comes of it."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageTextToText.from_pretrained(frozen(name)[1], trust_remote_code=False)


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_placed_by_accelerate(name: str, frozen: Callable[..., Any], tmp_path: Path) -> None:
    """On one device, and with weights on the disk and in memory until they are wanted."""
    from accelerate import cpu_offload, disk_offload

    short = load(frozen(name)[1])
    inputs = make_inputs(short, FAMILIES[name], THREE)
    expected = logits(short, inputs)
    torch.testing.assert_close(logits(load(frozen(name)[1], device_map={"": "cpu"}), inputs), expected)
    model = load(frozen(name)[1])
    disk_offload(model, tmp_path / "weights", execution_device="cpu")
    torch.testing.assert_close(logits(model, inputs), expected)
    model = load(frozen(name)[1])
    cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(logits(model, inputs), expected)
