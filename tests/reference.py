"""What the fast paths are compared with: hooks on the whole model and loops, in the plainest Python."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shortcut.checking.speed import cache_in
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder
from shortcut.modeling.passing import cache_argument
from shortcut.scoring.blocks import score_blocks
from shortcut.scoring.metrics import Metric


def blocks_of(model: Any) -> list[Any]:
    """The longest list of modules of the model, found without shortcut."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len))


@contextmanager
def bypassed(model: Any, dropped: Iterable[int]) -> Iterator[None]:
    """Blocks run, and what they return is thrown away for what they were given: works in every family."""

    def hand_on(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden

    blocks = blocks_of(model)
    handles = [blocks[i].register_forward_hook(hand_on, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """(batch, tokens, vocabulary), without a cache."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def cached(model: Any, cache: Any = None, **inputs: Any) -> tuple[Tensor, Any]:
    """Logits, and the cache behind these tokens, under whatever names this release of transformers has for it."""
    output = model(**inputs, use_cache=True, **with_cache(model, cache))
    return output.logits, cache_in(output)


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """A cache as an argument of a model and of its `generate`."""
    return {} if cache is None else {cache_argument(model.forward): cache}


@torch.no_grad()
def greedy(model: Any, ids: Tensor, tokens: int = 9, *, cache: bool = True) -> Tensor:
    """Token ids of a greedy continuation that never stops early: (batch, prompt + tokens)."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=cache,
        pad_token_id=0,
    )


@torch.no_grad()
def states_around_blocks(model: Any, ids: Tensor) -> list[Tensor]:
    """The stream before block 0 and after every block, by hooks: L + 1 tensors, the last before the final norm."""
    states: list[Tensor] = []

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        if not states:
            states.append((args[0] if args else kwargs["hidden_states"]).clone())
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks_of(model)]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return states


def mean_over_tokens(sequences: list[list[Tensor]], block: int, rule: Callable[[Tensor, Tensor], float]) -> float:
    """A metric of one block by a loop over all tokens. sequences: the states of one sequence each, (tokens, width)."""
    values = [
        rule(x, y)
        for states in sequences
        for x, y in zip(states[block].double(), states[block + 1].double(), strict=True)
    ]
    return math.fsum(values) / len(values)


def cosine(x: Tensor, y: Tensor) -> float:
    """Cosine of the angle between two vectors, in float64."""
    return (x @ y / (x.norm() * y.norm())).item()


def angle(x: Tensor, y: Tensor) -> float:
    """Angle between two vectors as a fraction of a half turn."""
    return math.acos(min(1.0, max(-1.0, cosine(x, y)))) / math.pi


def scores_of(model: Any, batches: Sequence[Batch], metrics: Sequence[Metric], **how: Any) -> dict[str, Any]:
    """What is to be compared: the scores of whole blocks, by metric."""
    return score_blocks(Decoder.of(model), batches, metrics, **how)["drop"]
