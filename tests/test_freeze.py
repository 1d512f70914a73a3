"""Blocks that leave the tokens of images as they are: the definition by hooks, in every family, on disk and live."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import shortcut
from shortcut.anatomy import visual_tokens
from shortcut.records.plan import Base, Plan
from tests.reference import blocks_of
from tests.vision import DEPTH, FAMILIES, IMAGE, Segments, image_id, make_inputs, make_vision_model

FROZEN = (0, 2, 3, 5)
PLAN = Plan.of(Base("", None, DEPTH), dict.fromkeys(FROZEN, "freeze-visual"))
TWO_FAMILIES = ("llava", "qwen2_vl")  # where whatever does not hang on the family is tried
ONE: list[Segments] = [[3, IMAGE, 4, IMAGE, 2]]
THREE: list[Segments] = [[3, IMAGE, 4, IMAGE, 2], [9], [2, IMAGE, 5]]  # one of them without an image
ALIKE: list[Segments] = [[2, IMAGE, 5], [2, IMAGE, 5]]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Gives the folders of a tiny model and of its checkpoint with frozen blocks, by family."""
    made: dict[str, tuple[Path, Path]] = {}

    def give(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            make_vision_model(FAMILIES[name]).save_pretrained(folder / "base")
            shortcut.cut(folder / "base", folder / "short", freeze_visual="0,2-3,5", quiet=True)
            made[name] = folder / "base", folder / "short"
        return made[name]

    return give


def load(folder: Path, attention: str = "sdpa", **how: Any) -> Any:
    """As anybody loads a checkpoint, and nothing in it is missing."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention, output_loading_info=True, **how
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@contextmanager
def restored(model: Any, blocks: Iterable[int] = FROZEN, places: Tensor | None = None) -> Iterator[None]:
    """These blocks run for all tokens, and of a prompt the tokens of images get back what went in.

    places: where those are, when token ids do not say so; (batch, tokens).
    """
    seen: list[Tensor] = []

    def look(_: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        found = places if ids is None else torch.isin(ids, torch.tensor([image_id(model)]))
        seen[:] = [] if found is None or (ids is not None and ids.shape[1] == 1) else [found[..., None]]

    def restore(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
        if seen:
            after = torch.where(seen[0], before, after)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(look, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(blocks_of(model)[block].register_forward_hook(restore, with_kwargs=True).remove)
        yield


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **how: Any) -> Tensor:
    """(tokens, vocabulary): of the tokens of all rows that are no padding."""
    found = model(**inputs, **how).logits
    return found[inputs["attention_mask"].bool()] if "attention_mask" in inputs else found.flatten(0, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_blocks_are_as_defined(name: str, attention: str, frozen: Callable[..., Any]) -> None:
    """Alone and in batches padded left and right, several images in a row, none in another; far from the dense model.

    On disk and live, in a prompt and in what is written after it.
    """
    family, (base, short) = FAMILIES[name], (load(folder, attention) for folder in frozen(name))
    assert visual_tokens(base.config.to_dict()) == tuple(short.config.shortv["token_ids"])
    assert image_id(base) in short.config.shortv["token_ids"]
    for rows, side in ((ONE, "left"), (ALIKE, "left"), (THREE, "right"), (THREE, "left")):
        inputs = make_inputs(base, family, rows, side=side)
        with restored(base):
            expected = logits(base, inputs)
        torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)
        assert (logits(base, inputs) - expected).abs().max() > 0.3
        with shortcut.preview(base, PLAN):
            torch.testing.assert_close(logits(base, inputs), expected, rtol=0, atol=1e-5)
    with restored(base):
        written = base.generate(**inputs, **GREEDY)
    assert torch.equal(short.generate(**inputs, **GREEDY), written)
    with shortcut.preview(base, PLAN):
        assert torch.equal(base.generate(**inputs, **GREEDY), written)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_is_dense(name: str, frozen: Callable[..., Any]) -> None:
    """Without an image the checkpoint is its base, to the bit."""
    base, short = map(load, frozen(name))
    for rows in ([[9]], [[9], [4]]):
        inputs = make_inputs(base, FAMILIES[name], rows)
        torch.testing.assert_close(logits(short, inputs), logits(base, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask(name: str, frozen: Callable[..., Any]) -> None:
    """Where attention is causal and nothing is padded, blocks are given no mask."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], ONE)
    del inputs["attention_mask"]
    with restored(base):
        expected = logits(base, inputs)
    torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_in_place_of_ids(name: str, frozen: Callable[..., Any]) -> None:
    """The tokens of images are told by their embeddings, in families that tell them so themselves."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], THREE)
    ids = inputs.pop("input_ids")
    if image_id(base) >= base.get_input_embeddings().num_embeddings:
        pytest.skip("an id beyond the vocabulary has no embedding")
    inputs["inputs_embeds"] = base.get_input_embeddings()(ids).detach()
    inputs.pop("mm_token_type_ids", None)
    with restored(base, places=ids == image_id(base)):
        expected = logits(base, inputs)
    torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*TWO_FAMILIES, "qwen3_vl", "gemma3"])
def test_a_second_turn(name: str, frozen: Callable[..., Any]) -> None:
    """A second image, in a prompt that comes after a filled cache."""
    family, (base, short) = FAMILIES[name], map(load, frozen(name))
    first, second = (make_inputs(base, family, ONE, seed=seed) for seed in (3, 4))
    del second["attention_mask"]
    found = []
    for model in (base, short):
        with restored(model, FROZEN if model is base else ()), torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            found.append(model(**second, past_key_values=cache).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how", [{"cache_implementation": "static", "disable_compile": True}, {"num_beams": 3}], ids=["static", "beams"]
)
@pytest.mark.parametrize("name", [*TWO_FAMILIES, "gemma3"])
def test_other_ways_to_write(name: str, how: dict[str, Any], frozen: Callable[..., Any]) -> None:
    """A static cache and beam search."""
    base, short = map(load, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], THREE)
    with restored(base):
        expected = base.generate(**inputs, **GREEDY, **how)
    assert torch.equal(short.generate(**inputs, **GREEDY, **how), expected)


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


FRESH = """
import sys
sys.modules["shortcut"] = None
sys.path = [place for place in sys.path if place != sys.argv[1]]
import torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
torch.save(model(**torch.load(sys.argv[3])).logits, sys.argv[4])
"""


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_a_fresh_process_loads_it(name: str, frozen: Callable[..., Any], tmp_path: Path) -> None:
    """With transformers alone, shortcut not being there."""
    short = load(frozen(name)[1])
    inputs = make_inputs(short, FAMILIES[name], ONE)
    torch.save(inputs, tmp_path / "inputs.pt")
    words = [str(Path(shortcut.__file__).parents[1]), str(frozen(name)[1]), "inputs.pt", "logits.pt"]
    subprocess.run([sys.executable, "-I", "-c", FRESH, *words], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt").flatten(0, 1), logits(short, inputs))


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
