"""Whether a block computes something else under another number: asked by running it, not by how it calls its number.

A model that was built without weights runs on a few random states, every block with random weights that are there while
it runs alone; its successor in the shortened model is called as it is, with the same weights.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shortcut.live.blocks import forwards_replaced, hidden_output
from shortcut.live.load import Model

TOKENS = 8
SPREAD = 0.1  # of random weights


def tracking(blocks: Sequence[Mapping[str, Any]]) -> set[str]:
    """What counts with the blocks, of all that describes each of them: their number, or that and a constant."""
    return {name for name in set.intersection(*map(set, blocks)) if _counts([block[name] for block in blocks])}


def _counts(values: Sequence[Any]) -> bool:
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
    return whole and all(value - values[0] == number for number, value in enumerate(values))


@torch.no_grad()
def first_unlike(base: Model, stacks: tuple[nn.ModuleList, nn.ModuleList], kept: Sequence[int]) -> int | None:
    """The first of the kept blocks that computes something else as its successor in the short model; None for none.

    base: built on the meta device, and of no use afterwards; stacks: its blocks, and those of the short model. Raises
    whatever code of the model raises where it does not run.
    """
    unlike: list[int] = []

    def compare(number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = _with_weights(stacks[0][number])(*args, **kwargs)
            if number in kept:
                other = _with_weights(stacks[1][kept.index(number)])(*args, **kwargs)
                if not torch.equal(hidden_output(output), hidden_output(other)):
                    unlike.append(number)
            return output

        return forward

    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    states = torch.randn(1, TOKENS, first.weight.shape[1], generator=torch.Generator().manual_seed(1))
    stand_ins = {block: compare(number) for number, block in enumerate(stacks[0])} | {first: lambda _: states}
    stand_ins |= {} if last is None else {last: lambda hidden: hidden}
    base.float()
    _give_weights(base, {id(each) for module in stand_ins for each in (*module.parameters(), *module.buffers())})
    with forwards_replaced(stand_ins):
        base(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    return min(unlike, default=None)


def _with_weights(block: nn.Module) -> nn.Module:
    copied = copy.deepcopy(block).float().eval()
    vars(copied).pop("forward", None)  # the stand-in's
    _give_weights(copied, set())
    return copied


def _give_weights(module: nn.Module, spared: set[int]) -> None:
    """Random values for all tensors of the meta device but those that are spared, by id; always the same."""
    rng = torch.Generator().manual_seed(0)
    for part in module.modules():
        kinds: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for held in kinds:
            for name, tensor in held.items():
                if tensor is None or id(tensor) in spared or not tensor.is_meta:
                    continue
                values = torch.zeros(tensor.shape, dtype=tensor.dtype)
                if tensor.is_floating_point():
                    values = SPREAD * torch.randn(tensor.shape, generator=rng)
                held[name] = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
