"""Models larger than memory: the weights of a block are read from its files when it runs, and released after.

transformers loads everything but blocks and embeddings, and accelerate knows where each of their weights is; from then
on each fetches its own weights before it is called and drops them when it returns. Where many calls follow each other,
`resident` keeps them in between.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from ctypes.util import find_library
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.common.processes import are_several
from shortcut.common.progress import say
from shortcut.common.text import format_size
from shortcut.live.blocks import blocks_path
from shortcut.live.load import Model, build_empty, load_model, pick_device, pick_dtype, trusts
from shortcut.options.groups import Loading

READ_AT_ONCE = 1 << 24  # bytes of a weight


def load_offloaded(checkpoint: Checkpoint, how: Loading, scratch: Path) -> Model:
    """Load a checkpoint as `load_model` does, but for its blocks and embeddings, which stay on the disk.

    scratch: a folder for weights that have to be converted. Raises
    ShortcutError as `load_model` and `blocks_path` do.
    """
    folder, config = checkpoint.folder, checkpoint.config
    own_code = "auto_map" in config and trusts(folder, trust_remote_code=how.trust_remote_code)
    empty = build_empty(config, folder if own_code else None)
    path = blocks_path(empty, checkpoint.stack)
    places: dict[str, Any] = {f"{path}.{number}": "disk" for number in range(len(empty.get_submodule(path)))}
    places |= dict.fromkeys(_outside(empty, path), str(pick_device(how.device)))
    tables = _vocabulary_tables(empty)
    places |= dict.fromkeys(tables, "disk")
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what is meant
    model = load_model(folder, how, places=places, scratch=scratch)
    pool: dict[Any, list[Tensor]] = {}
    for module in (*model.get_submodule(path), *map(model.get_submodule, tables)):
        _Resident(module, pool)
    return model


def _vocabulary_tables(model: Model) -> list[str]:
    """The names of embedding and vocabulary projection, where each has weights of its own."""
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if first is None or last is None or first.weight is last.weight:
        return []
    return [name for name, module in model.named_modules() if module in (first, last)]


def _outside(model: nn.Module, path: str) -> list[str]:
    """The names of the largest parts of a model that hold no block."""
    names, prefix = [], ""
    for step in path.split("."):
        parent = model.get_submodule(prefix.removesuffix("."))
        children = [name for name, _ in parent.named_children() if name != step]
        own = [name for name, _ in (*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False))]
        names += [prefix + name for name in (*children, *own)]
        prefix += f"{step}."
    return names


class _Resident:
    """The weights of one module: on the disk, or in memory while it is held or runs.

    pool: memory that modules hand on to each other. Freed instead, it would stay with the process in pieces.
    """

    def __init__(self, block: Any, pool: dict[Any, list[Tensor]]) -> None:
        from accelerate.hooks import AlignDevicesHook

        self.pool, self.holders = pool, 0
        hooks = ((module, getattr(module, "_hf_hook", None)) for module in block.modules())
        self.hooks = [(module, hook) for module, hook in hooks if isinstance(hook, AlignDevicesHook) and hook.offload]
        for _, hook in self.hooks:
            hook.offload = False  # it still moves inputs to the right device
        block._shortcut_resident = self
        forward = block.forward

        @functools.wraps(forward)
        def held(*args: Any, **kwargs: Any) -> Any:  # no hook: what stands in for a block needs none of its weights
            self.hold()
            try:
                return forward(*args, **kwargs)
            finally:
                self.release()

        block.forward = held

    @torch.inference_mode(False)  # what is made in that mode could not have gradients later
    def hold(self) -> None:
        from accelerate.utils import set_module_tensor_to_device

        self.holders += 1
        for module, hook, name, tensor in self._tensors() if self.holders == 1 else ():
            free = self.pool.setdefault((tensor.shape, tensor.dtype), [])
            memory = free.pop() if free else torch.empty_like(tensor, device=hook.execution_device)
            _fill(memory, hook.weights_map, name)
            set_module_tensor_to_device(module, name, hook.execution_device, value=memory)

    @torch.inference_mode(False)
    def release(self) -> None:
        from accelerate.utils import set_module_tensor_to_device

        self.holders -= 1
        for module, _, name, tensor in self._tensors() if self.holders == 0 else ():
            self.pool[tensor.shape, tensor.dtype].append(tensor.detach())
            set_module_tensor_to_device(module, name, "meta")
        if self.holders == 0:
            _trim()

    def _tensors(self) -> list[tuple[nn.Module, Any, str, Tensor]]:
        from accelerate.utils import named_module_tensors

        return [
            (module, hook, name, tensor)
            for module, hook in self.hooks
            for name, tensor in named_module_tensors(module, recurse=False, remove_non_persistent=True)
        ]


def _fill(memory: Tensor, weights: Any, name: str) -> None:
    """Read a weight into memory, some rows at a time: never twice in memory as a whole.

    weights: accelerate's `PrefixedDataset` over its `OffloadedWeightsLoader`.
    """
    from safetensors import safe_open

    place = weights.dataset.index.get(f"{weights.prefix}{name}") or {}
    if "safetensors_file" not in place or memory.dim() < 2:
        memory.copy_(weights[name])
        return
    rows = max(1, READ_AT_ONCE // memory[0].nbytes)
    for start in range(0, len(memory), rows):
        with safe_open(place["safetensors_file"], framework="pt", device="cpu") as file:  # what is read stays mapped
            stored = file.get_slice(place.get("weight_name", f"{weights.prefix}{name}"))
            memory[start : start + rows].copy_(stored[start : start + rows])


def _trim() -> None:
    """Give freed memory back to the system: with states of many sizes coming and going, glibc keeps hundreds of MB."""
    library = find_library("c")
    trim = getattr(CDLL(library), "malloc_trim", None) if library else None
    if trim is not None:
        trim(0)


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module in memory for the length of a `with` block, where they are not always there."""
    keeper = getattr(module, "_shortcut_resident", None)
    if keeper is None:
        yield
        return
    keeper.hold()
    try:
        yield
    finally:
        keeper.release()


@contextmanager
def open_live(checkpoint: Checkpoint, how: Loading, *, offload: bool = False, quiet: bool = False) -> Iterator[Model]:
    """Load a checkpoint for the length of a `with` block.

    Where one GPU is too small it is spread over all of them, and where they are too, its blocks stay on the disk.
    offload: leave them there in any case. Raises ShortcutError as `load_model` does.
    """
    device = pick_device(how.device)
    dtype = pick_dtype(how.dtype, device)
    size = checkpoint.parameters * (dtype.itemsize if isinstance(dtype, torch.dtype) else 2)
    several = how.device == "auto" and device.type == "cuda" and not are_several()
    gpus = [torch.device("cuda", number) for number in range(torch.cuda.device_count())] if several else [device]
    room = sum(map(free_memory, gpus))
    with TemporaryDirectory(prefix="shortcut-") as scratch:
        if offload or size > room:
            sizes = f"{format_size(size)} of weights, {format_size(room)} free"
            say(f"blocks stay on the disk until they run ({sizes})", quiet=quiet)
            yield load_offloaded(checkpoint, how, Path(scratch))
        elif size > free_memory(device):
            say(f"{format_size(size)} of weights are spread over {len(gpus)} GPUs", quiet=quiet)
            yield load_model(checkpoint.folder, how, places="auto")
        else:
            yield load_model(checkpoint.folder, how)


def is_offloaded(model: Model) -> bool:
    """Whether blocks of this model are on the disk."""
    return any(map(is_on_disk, model.modules()))


def is_on_disk(module: nn.Module) -> bool:
    """Whether the weights of a module are on the disk while it does not run."""
    return hasattr(module, "_shortcut_resident")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = [line for line in lines if line.startswith("MemAvailable")]
    if available:
        return int(available[0].split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
