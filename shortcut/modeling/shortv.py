"""LLaVA of which some blocks leave the tokens of images as they are (ShortV, arXiv 2504.00502).

`shortv` in config.json says which: {"blocks": [2, 4], "token_ids": [32000]}. Of a prompt, tokens of these ids pass by
these blocks, which take keys and values from them and compute nothing else; `set_frozen_blocks` changes the blocks.
This file is part of a checkpoint made by shortcut, and needs nothing but transformers 5. Apache-2.0.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

BLOCKS = "model.language_model.layers"
# Arguments of a block that have an entry for every token, and in which dimension.
TOKENS = {"hidden_states": -2, "position_embeddings": -2, "position_ids": -1, "cache_position": -1}
NATIVE, OWN = ("llava", "LlavaForConditionalGeneration"), ("shortv_llava", "ShortvLlavaForConditionalGeneration")
for native, own in zip(NATIVE, OWN, strict=True):
    if (mapping := get_checkpoint_conversion_mapping(native)) is not None:  # from stored to used
        register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


class Rows:
    """Which tokens of a prompt go through a block, given those that are frozen: (batch, tokens).

    run: the places of those that go through, (batch, n); passing: of the others. Where sequences differ in n, the
    shorter ones run some frozen tokens as well, and nothing comes of it. back: where each is in the two together.
    """

    def __init__(self, frozen: Tensor) -> None:
        count = max(1, int((~frozen).sum(1).max()))
        order = frozen.byte().argsort(dim=1, stable=True)
        order = order if count < frozen.shape[1] else torch.arange(count, device=frozen.device)[None]
        order = order[:1] if bool((order == order[:1]).all()) else order
        self.frozen, self.run, self.passing, self.back = frozen, order[:, :count], order[:, count:], order.argsort(1)

    def to(self, device: Any, **_: Any) -> "Rows":
        """The rows on a device."""
        return self if self.frozen.device == device else Rows(self.frozen.to(device))


FROZEN: ContextVar[Rows | None] = ContextVar("frozen", default=None)  # of the prompt that is being read


class Stored(Exception):  # noqa: N818  (it is no error)
    """Ends a block as soon as its keys and values are known."""


class Catcher:
    """In place of a cache: takes the keys and values of the tokens that go no further."""

    def __init__(self, cache: Any) -> None:
        self.cache = DynamicCache() if cache is None else cache

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Any:
        raise Stored(keys, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class Merger(Catcher):
    """In place of a cache: puts these keys and values among those of the tokens that go through, and stores all.

    alone: whether those of the prompt are all there is to see, whatever room for more the cache has.
    """

    def __init__(self, cache: Any, others: tuple[Tensor, Tensor], back: Tensor, *, alone: bool) -> None:
        super().__init__(cache)
        self.others, self.back, self.alone = others, back, alone

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        both = (torch.cat(pair, dim=-2) for pair in zip((keys, values), self.others, strict=True))
        keys, values = (pick(each, self.back, -2, heads=True) for each in both)
        stored = self.cache.update(keys, values, *args, **kwargs)
        return tuple(each[..., : self.back.shape[1], :] for each in stored) if self.alone else stored


def run_some(block: nn.Module, forward: Callable[..., Any], rows: Rows, *args: Any, **kwargs: Any) -> Any:
    """Run a block for some tokens of a prompt: all give it keys and values, and only these are changed by it."""
    given = dict(inspect.signature(forward).bind(*args, **kwargs).arguments)
    given |= given.pop("kwargs", {})
    states, cache, mask = given["hidden_states"], given.get("past_key_values"), given.get("attention_mask")
    rows = rows.to(states.device)
    if rows.passing.shape[1]:
        try:
            with without_queries(block):
                forward(**of_tokens(given, rows.passing) | {"attention_mask": None, "past_key_values": Catcher(cache)})
            raise TypeError(f"{type(block).__name__} stores no keys and values")
        except Stored as stored:
            cache = Merger(cache, stored.args, rows.back, alone=mask is None)
        given = of_tokens(given, rows.run) | {"attention_mask": mask_of(mask, rows, block), "past_key_values": cache}
    output = forward(**given)
    alone = isinstance(output, Tensor)
    frozen, before = (pick(each, rows.run, -2) for each in (rows.frozen[..., None], states))
    after = torch.where(frozen, before, output if alone else output[0])
    changed = states.scatter(1, rows.run[..., None].expand_as(after), after)
    return changed if alone else (changed, *output[1:])


def of_tokens(given: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments of a block for the tokens of an index, (batch, n)."""

    def take(value: Any, dimension: int) -> Any:
        if isinstance(value, tuple):
            return tuple(take(each, dimension) for each in value)
        if not isinstance(value, Tensor):
            return value
        return pick(value, index, dimension)

    return {name: take(value, TOKENS[name]) if name in TOKENS else value for name, value in given.items()}


def pick(values: Tensor, index: Tensor, dimension: int, *, heads: bool = False) -> Tensor:
    """The places of an index along a dimension: (1, n) for all sequences, or (batch, n).

    heads: whether there is a dimension between batch and tokens.
    """
    if len(index) == 1:
        return values.index_select(dimension, index[0])
    index = index.reshape(len(index), *[1] * heads, -1, *[1] * (-1 - dimension))
    values = values.reshape((1,) * (index.dim() - values.dim()) + values.shape)
    return values.take_along_dim(index.reshape((1,) * (values.dim() - index.dim()) + index.shape), dimension)


def mask_of(mask: Any, rows: Rows, block: nn.Module) -> Tensor | None:
    """The attention mask for the tokens that go through. Without one, every token sees those in front of it, or all."""
    if mask is None and not all(getattr(part, "is_causal", True) for part in block.children()):
        return None
    if mask is None:
        return (rows.run[..., None] >= torch.arange(rows.back.shape[1], device=rows.run.device))[:, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError("blocks that images pass by need attention by sdpa or eager")
    return pick(mask, rows.run, -2, heads=True)


@contextmanager
def without_queries(block: nn.Module) -> Iterator[None]:
    """Frozen tokens ask nothing: their queries are zeros, where a module of its own gives them."""
    with ExitStack() as stack:
        for part in block.children():
            module: Any = getattr(part, "q_proj", None)
            if width := getattr(module, "out_features", None):
                own = vars(module).get("forward")
                stack.callback(vars(module).pop if own is None else functools.partial(setattr, module), "forward", own)
                module.forward = functools.partial(zeros, width)
        yield


def zeros(width: int, states: Tensor) -> Tensor:
    """Zeros of another width than these states, which take the memory of one token."""
    return states.new_zeros(width).expand(*states.shape[:-1], width)


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


@functools.cache
def changed_class(change: Any, stock: Any) -> Any:
    """The class of such a block or model, under the name of its own class, as policies go by names."""
    return type(stock.__name__, (change, stock), {})


def make_changed(change: Any, stock: Any) -> Any:
    """An empty block or model, for copies and pickles."""
    return object.__new__(changed_class(change, stock))


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
    return Rows(found)


class ShortvLlavaConfig(LlavaConfig):
    """As the native one, but for the type: with that one, no token would be frozen, and nobody would know."""

    model_type = "shortv_llava"


class ShortvLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """The native model, of which blocks leave the tokens of images as they are, as `shortv` in its config has it."""

    config_class = ShortvLlavaConfig

    def __init__(self, config: ShortvLlavaConfig) -> None:
        super().__init__(config)
        for block in self.get_submodule(BLOCKS):
            block.__class__ = changed_class(Freezing, type(block))  # type: ignore[arg-type]
        if (inner := self.base_model) is not self and inner.config is self.config:
            inner.__class__ = changed_class(Reading, type(inner))  # type: ignore[arg-type]
        self.set_frozen_blocks(config.shortv["blocks"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with reading(self, self.config.shortv["token_ids"], *args, **kwargs):
            return super().__call__(*args, **kwargs)

    def set_frozen_blocks(self, blocks: Sequence[int]) -> None:
        """Have the tokens of images pass by these blocks, and by no others. Raises ValueError for one not there."""
        own = list(self.get_submodule(BLOCKS))
        if wrong := sorted(set(blocks) - set(range(len(own)))):
            raise ValueError(f"no block {wrong[0]}: the model has blocks 0-{len(own) - 1}")
        self.config.shortv = {**self.config.shortv, "blocks": sorted(set(blocks))}
        for number, block in enumerate(own):
            block.frozen = number in blocks
