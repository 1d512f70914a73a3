"""A rival of `shortcut cut`: load with transformers, delete blocks, save. Arguments: base, out, numbers of blocks."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main() -> None:
    base, out, drop = sys.argv[1:]
    logging.disable_progress_bar()
    dropped = {int(block) for block in drop.split(",")}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in dropped]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = types[: len(kept)]
    model.save_pretrained(Path(out))


if __name__ == "__main__":
    main()
