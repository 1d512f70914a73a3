"""Perplexity of a model on a set of token sequences."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from shortcut.decoder import Batch
from shortcut.errors import ShortcutError
from shortcut.live import Model
from shortcut.scoring.metrics import perplexity_of


@torch.inference_mode()
def perplexity(model: Model, batches: Iterable[Batch]) -> float:
    """exp of the mean negative log likelihood of every token but the first of its sequence.

    Tokens count alike, whatever the length of their sequence; padding does not count. Whether BOS comes first is
    decided where the batches are made. Raises ShortcutError where the result is not finite.
    """
    total, count = 0.0, 0
    for batch in batches:
        logits = model(**batch.inputs, use_cache=False).logits
        for row, targets, real in zip(
            logits, batch.ids, batch.predicted, strict=True
        ):  # a sequence at a time: small copies
            losses = nn.functional.cross_entropy(row[:-1][real].float(), targets[1:][real], reduction="sum")
            total += losses.item()
        count += int(batch.predicted.sum())
    if not math.isfinite(total):
        raise ShortcutError(f"the model gives NaN or infinity in {logits.dtype}: use --dtype float32 or bfloat16")
    return perplexity_of(total / count)
