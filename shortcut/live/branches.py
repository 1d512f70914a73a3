"""The two halves of a live block, its attention and its MLP: which of its modules belong to each, and silencing them.

A branch is silent when its modules return zeros, so that it adds nothing to the stream. Names say which modules attend
and which are MLPs; whose a norm is follows from the tensors that go in and come out while the block runs: it belongs to
the half that it feeds, or whose output it takes. Nothing is taken on trust: the block has to be the identity when both
halves are silent, and has to be the chain of its halves, or their sum, on random states.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import part_of
from shortcut.live.blocks import call_block, forwards_replaced, hidden_input, hidden_output
from shortcut.live.load import LOADING_ERRORS
from shortcut.records.actions import GONE, Half

STATE_TOLERANCE = 0.01  # of the largest state: above rounding in bfloat16, far below what a wrong module does


@dataclass(frozen=True)
class Branches:
    """The names of a block's modules that only its attention uses, or only its MLP, and how many values each returns.

    forms: by name, the length of the row of values it returns; None for a tensor alone.
    """

    block: nn.Module
    modules: Mapping[Half, tuple[str, ...]]
    forms: Mapping[str, int | None]

    def of(self, block: nn.Module) -> "Branches":
        """The branches of another block of the same build."""
        return replace(self, block=block)

    def silent(self, halves: Collection[Half]) -> dict[nn.Module, Callable[..., Any]]:
        """The modules of these halves, each with the forward that makes it silent."""
        names = [name for half in halves for name in self.modules[half]]
        modules = {name: self.block.get_submodule(name) for name in names}
        return {module: _nothing(module.forward, self.forms[name]) for name, module in modules.items()}

    def parameters(self, half: Half) -> list[nn.Parameter]:
        """The weights of one half."""
        return [weight for name in self.modules[half] for weight in self.block.get_submodule(name).parameters()]


def _nothing(forward: Callable[..., Any], values: int | None) -> Callable[..., Any]:
    """Zeros like the states that go in; or the stream itself, where a module is given it to add to."""
    signature = inspect.signature(forward)

    def silent(*args: Any, **kwargs: Any) -> Any:
        states = hidden_input(args, kwargs)
        stream = signature.bind(*args, **kwargs).arguments.get("residual")
        output = torch.zeros_like(states) if stream is None else stream
        return output if values is None else (output, *[None] * (values - 1))

    return silent


def find_branches(
    name: str, block: nn.Module, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Branches:
    """Tell the halves of a block apart by running it. name: of the block, for errors.

    states: random ones, (batch, tokens, width); args, kwargs: what else it is called with. Raises ShortcutError where
    the block does not consist of two halves.
    """

    def run(hidden: Tensor, silent: Collection[Half] = ()) -> Tensor:
        with forwards_replaced(found.silent(silent)):
            return call_block(block, hidden, args, kwargs)

    found = Branches(block, {}, {})
    try:
        ran = _watch(block, lambda: run(states))
        found = Branches(block, _sort(ran), {name: ran[name].values for name in ran})
        whole, neither = run(states), run(states, GONE["drop"])
        attention, mlp = run(states, GONE["attention-only"]), run(states, GONE["mlp-only"])
        chain = run(attention, GONE["mlp-only"])
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ShortcutError(f"{name} has no attention and MLP that can be told apart: {reason}") from None
    if not all(found.modules.values()):
        missing = next(half for half, modules in found.modules.items() if not modules)
        raise ShortcutError(f"{name} has no {missing} beside the rest of it")
    if not _close(neither, states):
        raise ShortcutError(f"{name} is not only attention and MLP: it does something without both")
    if not _close(chain, whole) and not _close(attention + mlp - states, whole):
        raise ShortcutError(f"{name} is neither the chain nor the sum of its attention and its MLP")
    return found


def _close(one: Tensor, other: Tensor) -> bool:
    scale = other.float().abs().max().item()
    return one.shape == other.shape and (one.float() - other.float()).abs().max().item() <= STATE_TOLERANCE * scale


@dataclass(frozen=True)
class _Ran:
    """One run of a module: the tensors that went in, the one that came out, and of how many values it was the first."""

    inputs: tuple[Tensor, ...]
    output: Tensor
    values: int | None


def _watch(block: nn.Module, run: Callable[[], Any]) -> dict[str, _Ran]:
    """What the direct parts of a block are given and return while it runs."""
    ran: dict[str, _Ran] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values = len(output) if isinstance(output, tuple | list) else None
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            ran[name] = _Ran(inputs, hidden_output(output), values)

        return hook

    with ExitStack() as stack:
        for name, module in block.named_children():
            stack.callback(module.register_forward_hook(note(name), with_kwargs=True).remove)
        run()
    return ran


def _sort(ran: Mapping[str, _Ran]) -> dict[Half, tuple[str, ...]]:
    """Which modules belong to which half alone; those of both, and of neither, to none."""
    parts = {name: part_of(f"{name}.weight") for name in ran}
    halves: dict[Half, list[str]] = {half: [name for name in ran if parts[name] == half] for half in get_args(Half)}
    for norm in (name for name in ran if parts[name] == "norms"):
        fed = [half for half, names in halves.items() if any(_flows(ran[norm].output, ran[n].inputs) for n in names)]
        behind = [half for half, names in halves.items() if any(_flows(ran[n].output, ran[norm].inputs) for n in names)]
        for half in fed or behind:
            if len(fed or behind) == 1:
                halves[half].append(norm)
    return {half: tuple(names) for half, names in halves.items()}


def _flows(output: Tensor, inputs: Collection[Tensor]) -> bool:
    """Whether a tensor, or a view of it, is among what a module was given."""
    place = output.untyped_storage().data_ptr()
    return any(tensor.untyped_storage().data_ptr() == place for tensor in inputs)
