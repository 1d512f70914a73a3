"""Tokens that pass by a block: it takes keys and values from all, and computes everything else for some alone.

`hollow.py` and `shortv.py` share this: a checkpoint carries it and one of them as a single file.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig

# Arguments of a block, besides the states, that have an entry for every token, and in which dimension; then those that
# are the same for all tokens, or speak of keys, which stay whole. Of the mask, queries are picked apart.
TOKENS = {"position_embeddings": -2, "position_ids": -1, "cache_position": -1}
WHOLE = {"alibi", "position_bias", "encoder_hidden_states", "encoder_attention_mask"}
MASK = "attention_mask"
# Where no argument is annotated as a cache, it has one of these names.
CACHES = ("cache", "past_key_values", "layer_past")
WAY_OUT = "use a release that the first line of the modeling file names, or renew that file: `shortcut refresh`"


@dataclass(frozen=True)
class Rows:
    """Which tokens of a prompt go through a block, each field (batch, n), or (1, n) where all sequences are alike.

    frozen: whether a token passes by; run: the places of those that go through; passing: of the others. Where sequences
    differ in n, the shorter ones run some that pass by as well, and nothing comes of it. back: where each token is in
    the two together; last: whether the last token alone goes through.
    """

    frozen: Tensor
    run: Tensor
    passing: Tensor
    back: Tensor
    last: bool = False

    @classmethod
    def of(cls, frozen: Tensor) -> "Rows":
        """The rows of a prompt of which these tokens, (batch, tokens), pass by."""
        count = max(1, int((~frozen).sum(1).max()))
        order = frozen.byte().argsort(dim=1, stable=True)
        order = order if count < frozen.shape[1] else torch.arange(count, device=frozen.device)[None]
        order = order[:1] if bool((order == order[:1]).all()) else order
        return cls(frozen, order[:, :count], order[:, count:], order.argsort(1))

    @classmethod
    def of_last(cls, tokens: int, device: Any) -> "Rows":
        """The rows of a prompt of so many tokens of which all but the last pass by."""
        places = torch.arange(tokens, device=device)[None]
        return cls(places < tokens - 1, places[:, -1:], places[:, :-1], (places + 1) % tokens, last=True)

    def to(self, device: Any) -> "Rows":
        """The rows on a device."""
        if self.frozen.device == device:
            return self
        frozen, run, passing, back = (each.to(device) for each in (self.frozen, self.run, self.passing, self.back))
        return Rows(frozen, run, passing, back, self.last)


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

    alone: whether, for want of a mask, nothing says how much of a cache with room for more is filled.
    """

    def __init__(self, cache: Any, others: tuple[Tensor, Tensor], back: Tensor, *, alone: bool) -> None:
        super().__init__(cache)
        self.others, self.back, self.alone = others, back, alone

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        both = (torch.cat(pair, dim=-2) for pair in zip((keys, values), self.others, strict=True))
        keys, values = (pick(each, self.back, -2, heads=True) for each in both)
        layer, *_ = *args, *kwargs.values()
        filled = self.back.shape[1] + int(self.cache.get_seq_length(layer)) if self.alone else None
        return tuple(each[..., :filled, :] for each in self.cache.update(keys, values, *args, **kwargs))


def run_some(block: nn.Module, forward: Callable[..., Any], rows: Rows, *args: Any, **kwargs: Any) -> Any:
    """Run a block for some tokens of a prompt: all give it keys and values, and only these are changed by it.

    forward: that of the block. Raises TypeError where it does not take or use its arguments as this file knows them.
    """
    given, place = given_to(inspect.signature(forward), *args, **kwargs), cache_argument(forward)
    states, cache, mask = next(iter(given.values())), given.get(place), given.get(MASK)
    rows = rows.to(states.device)
    if rows.passing.shape[1]:
        try:
            with without_queries(block):
                forward(**of_tokens(given, rows.passing) | {MASK: None, place: Catcher(cache)})
        except Stored as stored:
            cache = Merger(cache, stored.args, rows.back, alone=mask is None)
        else:
            raise TypeError(f"{type(block).__name__} stored nothing in the cache it was given as {place!r}: {WAY_OUT}")
    output = forward(**of_tokens(given, rows.run) | {MASK: mask_of(mask, rows, block), place: cache})
    alone = isinstance(output, Tensor)
    frozen, before = (pick(each, rows.run, -2) for each in (rows.frozen[..., None], states))
    after = torch.where(frozen, before, output if alone else output[0])
    changed = states.scatter(1, rows.run[..., None].expand_as(after), after)
    return changed if alone else (changed, *output[1:])


def run_last(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block whose prompts pass by, all but their last token."""
    states = args[0] if args else kwargs[next(iter(inspect.signature(forward).parameters))]
    if states.shape[1] == 1:
        return forward(*args, **kwargs)
    return run_some(block, forward, Rows.of_last(states.shape[1], states.device), *args, **kwargs)


def given_to(signature: inspect.Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the signature, then those that it does not name."""
    given = dict(signature.bind(*args, **kwargs).arguments)
    for name in [name for name, it in signature.parameters.items() if it.kind is it.VAR_KEYWORD]:
        given |= given.pop(name, {})
    return given


def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument by which a block or a model takes its cache.

    It is the one that is annotated so, else one with a known name. Raises TypeError where there is none.
    """
    parameters = inspect.signature(forward).parameters
    found = [name for name, parameter in parameters.items() if _is_cache(parameter.annotation)]
    found = found if len(found) == 1 else [name for name in CACHES if name in parameters]
    if len(found) != 1:
        sought = f"no argument is annotated as one, or named {', '.join(CACHES)}"
        where = f"{forward.__qualname__} of transformers {transformers.__version__}"
        raise TypeError(f"{where} takes no cache that is known: {sought}; {WAY_OUT}")
    return found[0]


def _is_cache(annotation: Any) -> bool:
    kinds = get_args(annotation) or (annotation,)
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds)


def blocks_in(model: nn.Module, path: str) -> Any:
    """The blocks of a model. Raises TypeError where this release keeps them elsewhere."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        here = f"transformers {transformers.__version__}"
        raise TypeError(f"{type(model).__name__} of {here} has no blocks at {path}: {WAY_OUT}") from None


def check_passing(stock: Any) -> None:
    """Raise TypeError where blocks of a class take their cache or their mask by a name that is not known."""
    cache_argument(stock.forward)
    if MASK not in inspect.signature(stock.forward).parameters:
        raise TypeError(f"{stock.forward.__qualname__} takes no {MASK}: {WAY_OUT}")


def of_tokens(given: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments of a block for the tokens of an index, (batch, n).

    Raises TypeError for a tensor that may have an entry for every token, and is not known.
    """
    states, *others = given
    tokens = given[states].shape[-2]
    taken = {states: pick(given[states], index, -2)}
    for name in others:
        taken[name] = given[name]
        if name in TOKENS:
            taken[name] = _take(given[name], index, TOKENS[name])
        elif name not in WHOLE | {MASK} and any(tokens in each.shape for each in _tensors_in(given[name])):
            raise TypeError(f"{name!r} is as long as the prompt ({tokens} tokens), and is not known here: {WAY_OUT}")
    return taken


def _take(value: Any, index: Tensor, dimension: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_take(each, index, dimension) for each in value)
    return pick(value, index, dimension) if isinstance(value, Tensor) else value


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors_in(each)


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
    if rows.last and (mask is None or mask.dim() == 2):  # that of flash attention speaks of keys alone
        return mask
    if mask is None and not all(getattr(part, "is_causal", True) for part in block.children()):
        return None
    if mask is None:
        return (rows.run[..., None] >= torch.arange(rows.back.shape[1], device=rows.run.device))[:, None]
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TypeError("blocks that tokens pass by need attention by sdpa or eager")
    return pick(mask, rows.run, -2, heads=True)


@contextmanager
def without_queries(block: nn.Module) -> Iterator[None]:
    """Tokens that pass by ask nothing: their queries are zeros, where a module of its own gives them."""
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


def store_nothing(config: Any, silent: Sequence[bool]) -> list[str]:
    """Tell the caches that are made from the config of a decoder which of its blocks store no keys and values.

    Caches read their length from the first block of its kind, and it would stay 0 for ever. Returns what is wrong with
    caches where this transformers cannot be told; else nothing.
    """
    config.kv_sharing_modes = ["reuse" if each else None for each in silent]
    kinds = getattr(config, "layer_types", None) or [None] * len(silent)
    firsts = [] if caches_can_be_told() else sorted(number for number in map(kinds.index, set(kinds)) if silent[number])
    here = f"transformers {transformers.__version__} cannot count the tokens of its cache then"
    return [f"block {number} has no attention, and {here}: pip install -U transformers" for number in firsts]


@functools.cache
def caches_can_be_told() -> bool:
    """Whether caches of this transformers leave out blocks that a config says store nothing."""
    config: Any = LlamaConfig(num_hidden_layers=2)
    plain = [type(layer) for layer in DynamicCache(config=config).layers]
    config.kv_sharing_modes = ["reuse", None]
    return plain != [type(layer) for layer in DynamicCache(config=config).layers]


@functools.cache
def changed_class(change: Any, stock: Any) -> Any:
    """The class of a changed block or model, under the name of its own class, as policies go by names."""
    return type(stock.__name__, (change, stock), {})


def make_changed(change: Any, stock: Any) -> Any:
    """An empty block or model of a changed class, for copies and pickles."""
    return object.__new__(changed_class(change, stock))


class Whole:
    """Refuses to load where weights are missing, which transformers fills at random; in front of a model's class."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        if missing := sorted(map(str, info["missing_keys"])):
            raise ValueError(f"{len(missing)} weights are not in the checkpoint, such as {missing[0]}: {WAY_OUT}")
        return (model, info) if output_loading_info else model
