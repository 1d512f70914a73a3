"""Take neurons out of the MLPs of a model, until it is as large as one with fewer blocks: width against depth.

    python recipes/prune_width.py MODEL OUT --like SHORT

Every block loses the same number of neurons: those with the smallest product of norms, of their rows in gate_proj and
up_proj and their column in down_proj. So OUT is of MODEL's architecture with a smaller intermediate_size, and loads as
it does; its parameters are those of SHORT to half a neuron per block.
"""

from typing import Any

import fire
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def prune_width(model: str, out: str, *, like: str) -> None:
    """Narrow the MLPs of MODEL to the parameters of LIKE, and save model and tokenizer to OUT."""
    narrow = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    with torch.device("meta"):
        aim = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(like)).num_parameters()
    before = narrow.num_parameters()
    count = count_neurons(narrow, before - aim)
    for mlp in mlps_of(narrow):
        keep_neurons(mlp, choose_neurons(mlp, count))
    narrow.config.intermediate_size -= count
    narrow.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    left = f"{narrow.num_parameters():,} parameters, {like} has {aim:,} and {model} {before:,}"
    print(f"{out}: {count} neurons of every MLP went; {left}")


def mlps_of(model: Any) -> list[Any]:
    """The MLPs of all blocks. Raises SystemExit for those that are not three plain projections of one width."""
    mlps = [getattr(block, "mlp", None) for block in getattr(model.base_model, "layers", [None])]
    for name in ("gate_proj", "up_proj", "down_proj"):
        if not all(isinstance(getattr(mlp, name, None), nn.Linear) for mlp in mlps):
            raise SystemExit(f"not every block has an MLP with a plain {name}: there is nothing to narrow")
    return mlps


def count_neurons(model: Any, parameters: int) -> int:
    """How many neurons of every block hold about so many parameters together. Raises SystemExit for too many."""
    mlps = mlps_of(model)
    width = mlps[0].gate_proj.out_features
    whole = sum(p.numel() for mlp in mlps for n, p in mlp.named_parameters() if n != "down_proj.bias")
    count = round(parameters / (whole // width))
    if not 0 <= count < width:
        raise SystemExit(f"{parameters:,} parameters cannot go from MLPs that hold {whole:,}")
    return count


@torch.no_grad()
def choose_neurons(mlp: Any, count: int) -> Tensor:
    """The neurons that stay when so many of the smallest go, in their order: (neurons,)."""
    gate, up, down = (part.weight.float() for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    return sizes.argsort(stable=True)[count:].sort().values


@torch.no_grad()
def keep_neurons(mlp: Any, kept: Tensor) -> None:
    """Make an MLP of these of its neurons."""
    for part in (mlp.gate_proj, mlp.up_proj):
        part.weight, part.out_features = nn.Parameter(part.weight[kept]), len(kept)
        if part.bias is not None:
            part.bias = nn.Parameter(part.bias[kept])
    mlp.down_proj.weight, mlp.down_proj.in_features = nn.Parameter(mlp.down_proj.weight[:, kept]), len(kept)


if __name__ == "__main__":
    fire.Fire(prune_width)
