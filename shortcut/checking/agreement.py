"""How far a shortened model that does not predict the next token gives the same as its base."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortcut.common.stacks import Stack
from shortcut.family.tasks import Gives
from shortcut.live.batch import Batch
from shortcut.live.blocks import run_model
from shortcut.live.load import Model
from shortcut.live.outcomes import check_mask, masked, pooled, rows_of

EMBEDDINGS = "embeddings like the base's (mean cosine)"
NUMBERS = "numbers like the base's (rank correlation)"
CLASSES = "the same class as the base"
TOKENS = "the same masked token as the base"


@dataclass(frozen=True)
class Given:
    """What a model gives for some text: embeddings, (sequences, width), or numbers, classes or tokens, (rows,).

    what: which of these, and how they are compared.
    """

    what: str
    values: Tensor

    def like(self, other: "Given") -> float:
        """The mean cosine of embeddings, the rank correlation of numbers, or the share of rows that are the same."""
        if self.what == EMBEDDINGS:
            return torch.cosine_similarity(self.values, other.values, dim=-1).mean().item()
        if self.what == NUMBERS:
            ranks = torch.stack([each.values.argsort().argsort().double() for each in (self, other)])
            return torch.corrcoef(ranks)[0, 1].item()
        return (self.values == other.values).double().mean().item()


@torch.inference_mode()
def what_it_gives(
    model: Model, gives: Gives, batches: Iterable[Batch], tokenizer: Any, stack: Stack = "decoder"
) -> Given:
    """Run a live model over batches. tokenizer: needed where tokens are masked.

    Raises ShortcutError where tokens are to be masked, and there is none for that.
    """
    rows, what = list[Tensor](), EMBEDDINGS
    for batch in batches:
        if gives == "masked tokens":
            what, batch = TOKENS, masked(batch, check_mask(tokenizer.mask_token_id))
        result = run_model(model, batch.inputs, stack).float()
        if gives == "states":
            rows.append(pooled(result, batch.mask))
            continue
        result = rows_of(result, batch)
        if what != TOKENS:
            what = CLASSES if result.shape[-1] > 1 else NUMBERS
        rows.append(result[:, 0] if what == NUMBERS else result.argmax(-1))
    return Given(what, torch.cat(rows).cpu())
