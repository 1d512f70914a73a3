"""Perplexity of a model on a set of token sequences."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.blocks import run_model
from shortcut.live.load import Model
from shortcut.records.scores import perplexity_of

Loss = tuple[float, int]  # of a sequence: the sum over its tokens, in nats, and how many they are


def perplexity(model: Model, batches: Iterable[Batch]) -> float:
    """exp of the mean negative log likelihood of every token but the first of its sequence.

    Tokens count alike, whatever the length of their sequence; padding does not count. Whether BOS comes first is
    decided where the batches are made. Raises ShortcutError where the result is not finite.
    """
    return mean_perplexity(sequence_losses(model, batches))


@torch.inference_mode()
def sequence_losses(model: Model, batches: Iterable[Batch]) -> list[Loss]:
    """The negative log likelihood of every sequence, without its first token. Raises as `perplexity` does."""
    losses: list[Loss] = []
    for batch in batches:
        logits = run_model(model, batch.inputs)
        for row, targets, real in zip(
            logits, batch.ids, batch.predicted, strict=True
        ):  # a sequence at a time: small copies
            total = nn.functional.cross_entropy(row[:-1][real].float(), targets[1:][real], reduction="sum").item()
            losses.append((total, int(real.sum())))
    if not all(math.isfinite(total) for total, _ in losses):
        raise ShortcutError(f"the model gives NaN or infinity in {logits.dtype}: use --dtype float32 or bfloat16")
    return losses


def mean_perplexity(losses: Sequence[Loss]) -> float:
    """The perplexity over all tokens of these sequences."""
    return perplexity_of(sum(total for total, _ in losses) / sum(count for _, count in losses))


def perplexity_interval(losses: Sequence[Loss], z: float) -> tuple[float, float] | None:
    """The perplexities z standard errors below and above, sequences being drawn at random; None for a single one.

    The standard error is that of a ratio of two sums over sequences, of losses and of tokens.
    """
    n, tokens = len(losses), sum(count for _, count in losses)
    if n < 2:
        return None
    mean = sum(total for total, _ in losses) / tokens
    error = math.sqrt(sum((total - mean * count) ** 2 for total, count in losses) * n / (n - 1)) / tokens
    return perplexity_of(mean - z * error), perplexity_of(mean + z * error)
