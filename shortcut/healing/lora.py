"""Which weights of a live model are trained: the projections of its blocks, by low-rank changes beside them or whole.

No embeddings and no norms are: whatever is trained can be put into the base again, and compared with it.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.live.blocks import blocks_path
from shortcut.live.decoder import Decoder
from shortcut.live.load import build_empty
from shortcut.records.actions import Action
from shortcut.records.methods import Tune

_ALONE: dict[Tune, Action] = {"attention": "mlp-only", "mlp": "attention-only"}  # by which action that half goes


@dataclass(frozen=True)
class Adapter:
    """What is trained of a live model: low-rank changes (LoRA, arXiv:2106.09685), W + alpha / rank B A, or all of W.

    projections: by number of the block and name inside it; trained: by name, what has gradients; settings: PEFT's, None
    where projections are trained whole.
    """

    decoder: Decoder
    projections: tuple[tuple[int, str], ...]
    trained: dict[str, nn.Parameter]
    settings: Any

    @property
    def shapes(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """Of all weights that change, by block and name of the projection."""
        return {where: tuple(self._weight(*where).shape) for where in self.projections}

    @torch.no_grad()
    def new_weight(self, number: int, name: str, old: Tensor) -> Tensor:
        """What the weight of a projection has become, on the CPU. old: what it was, as it is stored."""
        if self.settings is None:
            return self._weight(number, name).float().cpu()
        module: Any = self.decoder.blocks[number].get_submodule(name)
        return old.float() + module.get_delta_weight("default").float().cpu()

    def _weight(self, number: int, name: str) -> nn.Parameter:
        module: Any = self.decoder.blocks[number].get_submodule(name)
        return (module if self.settings is None else module.base_layer).weight

    def save(self, folder: Path) -> None:
        """Write the changes as PEFT reads them, on top of the model."""
        path = blocks_path(self.decoder.model)
        self.settings.save_pretrained(str(folder))
        named = {name.replace(".default.", "."): weight for name, weight in self.trained.items()}
        stored = {f"base_model.model.{path}.{name}": w.detach().float().cpu() for name, w in named.items()}
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def projections(decoder: Decoder, tune: Tune) -> Iterator[tuple[int, str]]:
    """The projections of every block, by number and name: of both halves, or of one. Experts in one tensor are none."""
    for number, block in enumerate(decoder.blocks):
        wanted = None if tune == "all" else {id(weight) for weight in decoder.weights(number, _ALONE[tune])}
        for name, module in block.named_modules():
            weight = getattr(module, "weight", None)
            fits = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if fits and (wanted is None or id(weight) in wanted):
                yield number, name


def adapt(decoder: Decoder, *, rank: int, alpha: float, dropout: float, tune: Tune, seed: int) -> Adapter:
    """Make projections of a live model trainable, and nothing else. rank 0: as they are, whole.

    Raises ShortcutError where there is nothing to train, and without the package peft.
    """
    decoder.model.requires_grad_(False)
    names = tuple(projections(decoder, tune))
    if not names:
        raise ShortcutError(f"no projections to train in {decoder.model.config.model_type} with --tune {tune}")
    settings = None
    if rank == 0:
        for number, name in names:
            decoder.blocks[number].get_submodule(name).get_parameter("weight").requires_grad_()
    else:
        settings = _inject(decoder, names, seed, r=rank, lora_alpha=alpha, lora_dropout=dropout)
    trained = {name: weight for name, weight in decoder.blocks.named_parameters() if weight.requires_grad}
    return Adapter(decoder, names, trained, settings)


def _inject(decoder: Decoder, names: Sequence[tuple[int, str]], seed: int, **how: Any) -> Any:
    """Put low-rank changes beside projections; gives PEFT's settings for them.

    Into the list of blocks: in whole models PEFT takes some names for those that experts had in older checkpoints.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # PEFT imports it, and it misses what is not needed
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ShortcutError('training low-rank changes needs the package peft: pip install "shortcut[heal]"') from None
    targets = [f"{number}.{name}" for number, name in names]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that projections lie sideways, as it finds out itself
        inject_adapter_in_model(LoraConfig(target_modules=targets, **how), decoder.blocks)
    for weight in decoder.blocks.parameters():
        if weight.requires_grad:  # in bfloat16, as PEFT makes them beside weights in it, small steps would be lost
            weight.data = weight.data.float()
    path = blocks_path(decoder.model)
    return LoraConfig(target_modules=[f"{path}.{each}" for each in targets], task_type="CAUSAL_LM", **how)


def check_kept(adapter: Adapter, config: Mapping[str, Any], code: Path | None) -> None:
    """Raise ShortcutError where PEFT would put the changes elsewhere in a model of this config.json; code: as there."""
    from peft import get_peft_model

    empty = build_empty(config, code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        get_peft_model(empty, copy.deepcopy(adapter.settings))
    path = blocks_path(adapter.decoder.model)
    there = {name.replace(".default.", ".") for name, _ in empty.named_parameters() if ".lora_" in name}
    if there != {f"{path}.{name}".replace(".default.", ".") for name in adapter.trained}:
        family = adapter.decoder.model.config.model_type
        raise ShortcutError(f"PEFT would put the changes elsewhere in {family}: leave out --keep-adapter")
