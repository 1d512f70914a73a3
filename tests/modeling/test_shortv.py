"""Blocks that leave the tokens of images as they are: the definition by hooks, in every family, on disk and live."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import visual_tokens
from shortcut.records.plan import Base, Plan
from tests.reference import blocks_of, cached, with_cache
from tests.sweep.tiny import VOCABULARY, tiny_model
from tests.vision import DEPTH, FAMILIES, IMAGE, WORDS, Segments, as_videos, image_id, make_inputs, visual_ids

pytestmark = pytest.mark.thorough

FROZEN = (0, 2, 3, 5)
PLAN = Plan.of(Base("", None, DEPTH), dict.fromkeys(FROZEN, "freeze-visual"))
TWO_FAMILIES = ("llava", "qwen2_vl")  # where whatever does not hang on the family is tried
ONE: list[Segments] = [[3, IMAGE, 4, IMAGE, 2]]
THREE: list[Segments] = [[3, IMAGE, 4, IMAGE, 2], [9], [2, IMAGE, 5]]  # one of them without an image
ALIKE: list[Segments] = [[2, IMAGE, 5], [2, IMAGE, 5]]
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
GREEDY["suppress_tokens"] = list(range(WORDS, VOCABULARY))  # no images


def load(folder: Path, attention: str = "sdpa", **how: Any) -> Any:
    """As anybody loads a checkpoint, and nothing in it is missing."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention, output_loading_info=True, **how
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


loaded = cache(load)  # for tests that leave a model as it was


@contextmanager
def restored(model: Any, blocks: Iterable[int] = FROZEN, places: Tensor | None = None) -> Iterator[None]:
    """These blocks run for all tokens, and of a prompt the tokens of images get back what went in.

    places: where those are, when token ids do not say so; (batch, tokens).
    """
    seen: list[Tensor] = []

    def look(_: Any, __: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids")
        found = places if ids is None else torch.isin(ids, torch.tensor(visual_ids(model)))
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
    family, (base, short) = FAMILIES[name], (loaded(folder, attention) for folder in frozen(name))
    assert list(visual_tokens(base.config.to_dict())) == short.config.shortv["token_ids"] == sorted(visual_ids(base))
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


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_videos_are_frozen(name: str, frozen: Callable[..., Any]) -> None:
    """Videos are images as well."""
    base, short = map(loaded, frozen(name))
    inputs = as_videos(base, make_inputs(base, FAMILIES[name], THREE))
    with restored(base):
        expected, written = logits(base, inputs), base.generate(**inputs, **GREEDY)
    torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)
    assert torch.equal(short.generate(**inputs, **GREEDY), written)
    assert (logits(base, inputs) - expected).abs().max() > 0.3


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_is_dense(name: str, frozen: Callable[..., Any]) -> None:
    """Without an image the checkpoint is its base, to the bit."""
    base, short = map(loaded, frozen(name))
    for rows in ([[9]], [[9], [4]]):
        inputs = make_inputs(base, FAMILIES[name], rows)
        torch.testing.assert_close(logits(short, inputs), logits(base, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mask(name: str, frozen: Callable[..., Any]) -> None:
    """Blocks are given no mask where nothing is padded and every token sees those in front of it, or all."""
    base, short = map(loaded, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], ONE)
    inputs.pop("token_type_ids", None)
    for drop in ((), ("attention_mask",)):
        for argument in drop:
            del inputs[argument]
        with restored(base):
            expected = logits(base, inputs)
        torch.testing.assert_close(logits(short, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_in_place_of_ids(name: str, frozen: Callable[..., Any]) -> None:
    """The tokens of images are told by their embeddings, in families that tell them so themselves."""
    base, short = map(loaded, frozen(name))
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
    family, (base, short) = FAMILIES[name], map(loaded, frozen(name))
    first, second = (make_inputs(base, family, ONE, seed=seed) for seed in (3, 4))
    del second["attention_mask"]
    found = []
    for model in (base, short):
        with restored(model, FROZEN if model is base else ()), torch.no_grad():
            _, cache = cached(model, **first)
            found.append(cached(model, cache, **second)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_a_conversation_goes_on(name: str, frozen: Callable[..., Any]) -> None:
    """`generate` with the whole conversation and a cache of its first turn reads the second image alone."""
    base, short = map(loaded, frozen(name))
    first, second = (make_inputs(base, FAMILIES[name], ONE, seed=seed) for seed in (3, 4))
    both = {key: torch.cat([first[key], second[key]], dim=1) for key in ("input_ids", "attention_mask")}
    written = []
    for model in (base, short):
        with restored(model, FROZEN if model is base else ()), torch.no_grad():
            _, cache = cached(model, **first)
            written.append(model.generate(**{**second, **both}, **with_cache(model, cache), **GREEDY))
    assert torch.equal(written[1], written[0])


STATIC = {"cache_implementation": "static", "disable_compile": True}
OTHERWISE = [(STATIC, THREE), (STATIC, ONE), ({"num_beams": 3}, THREE), ({"use_cache": False}, THREE)]


@pytest.mark.parametrize(("how", "rows"), OTHERWISE, ids=["static", "static, no mask", "beams", "no cache"])
@pytest.mark.parametrize("name", [*TWO_FAMILIES, "gemma3"])
def test_other_ways_to_write(name: str, how: Any, rows: list[Segments], frozen: Callable[..., Any]) -> None:
    """A static cache, whose room for what will be written no token may see; beam search; no cache at all."""
    base, short = map(loaded, frozen(name))
    inputs = make_inputs(base, FAMILIES[name], rows)
    with restored(base):
        expected = base.generate(**inputs, **GREEDY, **how)
    assert torch.equal(short.generate(**inputs, **GREEDY, **how), expected)


def short_of_masks(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any) -> Any:
    """Attention that takes the padding of keys in place of a mask, as flash attention does: (batch, keys)."""
    if mask is not None and mask.dim() != 2:
        raise ValueError("this attention takes no masks of queries and keys")
    causal = torch.ones(1, 1, query.shape[2], key.shape[2]).tril(key.shape[2] - query.shape[2]).bool()
    mask = causal if mask is None else causal & mask[:, None, None, :].bool()
    return sdpa_attention_forward(module, query, key, value, mask, **how)


@pytest.fixture
def padding_only(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an attention that takes no mask but that of padding."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "padding_only", short_of_masks)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "padding_only", flash_attention_mask)
    return "padding_only"


@pytest.mark.parametrize("name", TWO_FAMILIES)
def test_attention_that_takes_no_mask(name: str, frozen: Callable[..., Any], padding_only: str) -> None:
    """A prompt with images is read by sdpa and all else by what was asked for; gradients are refused."""
    model, short = (load(frozen(name)[1], how) for how in ({"text_config": padding_only}, "sdpa"))
    config = model.config.get_text_config()
    assert config._attn_implementation == padding_only
    for rows in (ONE, THREE):
        inputs = make_inputs(short, FAMILIES[name], rows)
        torch.testing.assert_close(logits(model, inputs), logits(short, inputs), rtol=0, atol=1e-5)
        assert torch.equal(model.generate(**inputs, **GREEDY), short.generate(**inputs, **GREEDY))
        assert config._attn_implementation == padding_only
    with pytest.raises(TypeError, match="trained with attention by sdpa or eager, not by padding_only"):
        model.train()(**inputs)
    assert config._attn_implementation == padding_only


def test_other_masks_are_refused(frozen: Callable[..., Any]) -> None:
    """Masks of other kinds than (batch, heads, queries, keys) are no masks of some tokens."""
    short = load(frozen("llava")[1])
    inputs = make_inputs(short, FAMILIES["llava"], ONE)
    for block in blocks_of(short):
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": inputs["attention_mask"]}), with_kwargs=True
        )
    with pytest.raises(TypeError, match="need attention by sdpa or eager"):
        short(**inputs)


def test_blocks_without_keys_are_refused(tmp_path: Path) -> None:
    """Blocks of another kind than attention, and families whose attention picks keys by itself, on disk and live."""
    for name, fault in (
        ("qwen3_5", "cannot freeze block 0 of Qwen3_5For.*: it is linear_attention .*; blocks 1,4-5 do"),
        ("minimax_m3_vl", "MiniMaxM3SparseFor.* cannot leave the tokens of images as they are in blocks"),
    ):
        model = tiny_model(name, "image-text")
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ShortcutError, match=fault):
            shortcut.cut(tmp_path / name, tmp_path / "short", freeze_visual="0-1", quiet=True)
        assert not (tmp_path / "short").exists()
        plan = Plan.of(Base("", None, DEPTH), {0: "freeze-visual", 1: "freeze-visual"})
        with pytest.raises(ShortcutError, match=fault), shortcut.preview(model, plan):
            pass
