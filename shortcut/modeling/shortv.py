"""LLaVA of which some blocks leave the tokens of images as they are (ShortV, arXiv 2504.00502).

`shortv` in config.json says which: {"blocks": [2, 4], "token_ids": [32000]}. Of a prompt, tokens of these ids pass by
these blocks, which take keys and values from them and compute nothing else; `set_frozen_blocks` changes the blocks.
This file is part of a checkpoint made by shortcut, and needs nothing but transformers. Apache-2.0.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from shortcut.modeling.passing import Rows, Whole, blocks_in, changed_class, check_passing, make_changed, run_some

BLOCKS = "model.language_model.layers"
NATIVE, OWN = ("llava", "LlavaForConditionalGeneration"), ("shortv_llava", "ShortvLlavaForConditionalGeneration")
for native, own in zip(NATIVE, OWN, strict=True):
    if (mapping := get_checkpoint_conversion_mapping(native)) is not None:  # from stored to used
        register_checkpoint_conversion_mapping(own, mapping, overwrite=True)
FROZEN: ContextVar[Rows | None] = ContextVar("frozen", default=None)  # of the prompt that is being read


class Freezing:
    """A block that may leave tokens as they are, in front of its own class."""

    frozen = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        rows = FROZEN.get() if self.frozen else None  # as an argument it is there again when gradients are computed
        return super().__call__(*args, **kwargs, **({} if rows is None else {"rows": rows}))  # type: ignore[misc]

    def forward(self, *args: Any, rows: Rows | None = None, **kwargs: Any) -> Any:
        own: Any = super().forward  # type: ignore[misc]
        return own(*args, **kwargs) if rows is None else run_some(self, own, rows, *args, **kwargs)  # type: ignore[arg-type]

    def __reduce__(self) -> Any:
        return make_changed, type(self).__mro__[1:3], self.__dict__


class Reading:
    """The model without the vocabulary, when it is called by itself, in front of its own class."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with reading(self, self.config.shortv["token_ids"], *args, **kwargs):  # type: ignore[attr-defined]
            return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce__(self) -> Any:
        return make_changed, type(self).__mro__[1:3], self.__dict__


@contextmanager
def reading(model: Any, token_ids: Sequence[int], *args: Any, **kwargs: Any) -> Iterator[None]:
    """While a model is called with this, its blocks know which tokens are frozen: those of these ids, and padding."""
    if FROZEN.get() is not None:  # by the model around this one
        yield
        return
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    rows = find_frozen(model, token_ids, **given)
    with ExitStack() as stack:
        stack.callback(FROZEN.reset, FROZEN.set(rows))
        if rows is not None:
            read_by_sdpa(model, stack)
        yield


def read_by_sdpa(model: Any, stack: ExitStack) -> None:
    """Until the stack is closed, have attention that cannot run for some tokens alone give way to sdpa."""
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    if own in ("sdpa", "eager", None):
        return
    if model.training:  # blocks may run again for gradients, when all of this is over
        raise TypeError(f"blocks that images pass by are trained with attention by sdpa or eager, not by {own}")
    stack.callback(setattr, config, "_attn_implementation", own)
    config._attn_implementation = "sdpa"


def find_frozen(
    model: Any,
    token_ids: Sequence[int],
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    attention_mask: Any = None,
    **_: Any,
) -> Rows | None:
    """The rows of a prompt with tokens of these ids, which embeddings are told by their values; else None."""
    if input_ids is not None:
        found = torch.isin(input_ids, torch.tensor(token_ids, device=input_ids.device))
    elif inputs_embeds is not None:
        table = model.get_input_embeddings()
        known = [number for number in token_ids if number < table.weight.shape[0]]
        each = table(torch.tensor(known, device=inputs_embeds.device)).to(inputs_embeds)
        found = (inputs_embeds[..., None, :] == each).all(-1).any(-1)
    else:
        return None
    if found.shape[1] == 1 or not found.any():
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        found = found | (attention_mask[:, -found.shape[1] :] == 0)
    return Rows.of(found)


class ShortvLlavaConfig(LlavaConfig):
    """As the native one, but for the type: with that one, no token would be frozen, and nobody would know."""

    model_type = "shortv_llava"


class ShortvLlavaForConditionalGeneration(Whole, LlavaForConditionalGeneration):
    """The native model, of which blocks leave the tokens of images as they are, as `shortv` in its config has it."""

    config_class = ShortvLlavaConfig

    def __init__(self, config: ShortvLlavaConfig) -> None:
        super().__init__(config)
        for block in blocks_in(self, BLOCKS):
            block.__class__ = changed_class(Freezing, type(block))  # type: ignore[arg-type]
        if (inner := self.base_model) is not self and inner.config is self.config:
            inner.__class__ = changed_class(Reading, type(inner))  # type: ignore[arg-type]
        self.set_frozen_blocks(config.shortv["blocks"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with reading(self, self.config.shortv["token_ids"], *args, **kwargs):
            return super().__call__(*args, **kwargs)

    def set_frozen_blocks(self, blocks: Sequence[int]) -> None:
        """Have the tokens of images pass by these blocks, and by no others. Raises ValueError for one not there."""
        own = list(blocks_in(self, BLOCKS))
        if wrong := sorted(set(blocks) - set(range(len(own)))):
            raise ValueError(f"no block {wrong[0]}: the model has blocks 0-{len(own) - 1}")
        self.config.shortv = {**self.config.shortv, "blocks": sorted(set(blocks))}
        for number, block in enumerate(own):
            block.frozen = number in blocks
            if block.frozen:
                check_passing(type(block).__mro__[2])
