"""Text that a model writes itself, for what was cut from it to learn from: in all the styles that it knows.

A sequence starts with a token at random and goes on as likely as the model says, past the ends of texts (after LLM-QAT,
arXiv:2305.17888).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import track
from shortcut.healing.saved import write_whole
from shortcut.live.blocks import device_of
from shortcut.live.load import LOADING_ERRORS, Model
from shortcut.material.calibration import leading_bos

TOKENS_AT_ONCE = 1 << 14  # of several sequences together: their keys and values take memory


def write_sequences(
    load: Callable[[], Model], tokenizer: Any, count: int, length: int, folder: Path, *, seed: int, quiet: bool
) -> tuple[tuple[int, ...], ...]:
    """So many sequences of so many tokens, as ids; kept in a folder as they are written, and read from it.

    load: gives the model, and is called only if something is to be written. Several processes share the work. Raises
    ShortcutError for a model that cannot write, and for a full disk.
    """
    room = max(1, TOKENS_AT_ONCE // length)
    files = {folder / f"own-{length}-{start:07}.safetensors": start for start in range(0, count, room)}
    for file in track(share(list(files)), "writing text to learn from", quiet=quiet):
        if not file.exists():
            start = files[file]
            ids = _draw(load(), tokenizer, min(room, count - start), length, seed=hash((seed, start)))
            write_whole(file, partial(save_file, {"ids": ids.int().cpu()}), "what was written before is kept")
    add_up(torch.zeros(1))  # until all have written theirs
    return tuple(tuple(row) for file in files for row in load_file(file)["ids"].tolist())


@torch.inference_mode()
def _draw(model: Model, tokenizer: Any, count: int, length: int, *, seed: int) -> Tensor:
    """Sequences drawn from what the model predicts: (count, length)."""
    from transformers import GenerationConfig

    bos, special = leading_bos(tokenizer), set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    torch.manual_seed(seed)
    first = words[torch.randint(len(words), (count, 1))]
    ids = torch.cat([torch.tensor(bos, dtype=torch.long).expand(count, -1), first], dim=1).to(device_of(model))
    if ids.shape[1] >= length:
        return ids[:, :length]
    # In the place of the model's own, which may say how to decode, and where to stop.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - ids.shape[1])
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids))
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ShortcutError(f"the base cannot write text to learn from: {reason}; leave out --own") from None
