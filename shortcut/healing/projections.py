"""The projections of a block whose output goes into the stream: found by trying, never taken from a family's name."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.healing.streams import Streams, noting, output_of
from shortcut.live.decoder import Decoder
from shortcut.records.actions import GONE, Action

OUTPUT_TOLERANCE = 1e-3  # of what is added to a projection's output, and has to come out of its block


def find_projection(decoder: Decoder, number: int, streams: Streams, action: Action = "keep") -> str:
    """The last projection in what an action leaves of a block whose output goes straight into the stream, by its name.

    Tried by adding something to it, which has to come out of the block as it went in. Raises ShortcutError where there
    is none, as where a norm follows the MLP, or experts share it.
    """
    name = _last_straight(decoder, number, streams, action, 2)
    if name is None:
        family = decoder.model.config.model_type
        raise ShortcutError(
            f"cannot heal in block {number} of {family}: no projection in it adds straight to the stream"
        )
    return name


def find_normed(decoder: Decoder, number: int, streams: Streams, action: Action = "keep") -> tuple[str, str] | None:
    """The last projection in what an action leaves of a block that goes through a norm into the stream, and the norm.

    Both by name; None where there is none, and where the norm does more than to bring states to one length and multiply
    each of their values by a number of its own.
    """
    block, norm = decoder.blocks[number], _last_straight(decoder, number, streams, action, 1)
    if norm is None:
        return None
    projections = [name for name, module in block.named_modules() if _dimensions(module) == 2]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (norm, *projections)}
    with ExitStack() as stack:
        for name, found in seen.items():
            stack.enter_context(output_of(block, name, noting(found)))
        decoder.run(number, streams.short, streams.calls[number], action)
    ((before, after),) = seen.pop(norm)
    scales, gains = scales_of(block.get_submodule(norm), before, after)
    if not torch.allclose(before * scales * gains, after, rtol=0.01, atol=0.01 * after.abs().max().item()):
        return None
    place = before.untyped_storage().data_ptr()
    names = [name for name, found in seen.items() if found and found[0][1].untyped_storage().data_ptr() == place]
    return (names[0], norm) if names else None


def scales_of(norm: nn.Module, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm makes of states is them times a number for each, (..., 1), and times one for each value: (width,)."""
    gains = norm(torch.ones_like(before[..., :1, :])).flatten()[: before.shape[-1]]
    safe = torch.where(gains == 0, 1.0, gains)
    return (after / safe * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True).clamp_min(1e-12), safe


def _last_straight(decoder: Decoder, number: int, streams: Streams, action: Action, dim: int) -> str | None:
    """The last module with weights of so many dimensions whose output goes straight into the stream, by its name."""
    block, call, states = decoder.blocks[number], streams.calls[number], streams.short
    silent = {} if action == "keep" else decoder.branches(number).silent(GONE[action])
    width, called = states.shape[-1], dict[str, int]()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.update({name: called.pop(name, 0) + 1}))
        for name, module in block.named_modules()
        if module not in silent and _dimensions(module) == dim
    ]
    after = decoder.run(number, states, call, action)
    for handle in handles:
        handle.remove()

    def raised(_: Any, output: Any) -> Tensor | None:
        fits = isinstance(output, Tensor) and output.shape[-1] == width and output.numel() == states.numel()
        return output + bump if fits else None

    bump = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(states) * after.float().std()
    sizes = torch.maximum(states.abs(), after.abs()) + bump.abs().max()  # each value is rounded by its own
    tolerance = max(OUTPUT_TOLERANCE, 4 * torch.finfo(states.dtype).eps) * sizes
    for name in [name for name, times in reversed(called.items()) if times == 1]:
        with output_of(block, name, raised):
            change = decoder.run(number, states, call, action) - after
        if ((change - bump).abs() <= tolerance).all():
            return name
    return None


def _dimensions(module: nn.Module) -> int:
    """Of the weights of a module: 2 for projections, 1 for norms, 0 where there are none."""
    weight = getattr(module, "weight", None)
    return weight.dim() if isinstance(weight, Tensor) else 0


def weights_of(decoder: Decoder, block: int, name: str) -> Tensor:
    """The weights of a projection into the stream: (inputs, width), float64, its bias last."""
    projection: Any = decoder.blocks[block].get_submodule(name)
    weight = projection.weight.detach().double()
    rows = weight if is_transposed(projection) else weight.T
    return rows if projection.bias is None else torch.cat([rows, projection.bias.detach().double()[None]])


def is_transposed(projection: Any) -> bool:
    """Whether a projection has its weights as (inputs, outputs), as a few families do: tried on a random input."""
    weight, bias = projection.weight, projection.bias
    states = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        return not torch.allclose(projection(states), nn.functional.linear(states, weight, bias), rtol=0.01, atol=0.01)
    except RuntimeError:  # of another width
        return True
