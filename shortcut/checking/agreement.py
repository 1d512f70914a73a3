"""What models give that do not predict the next token, and how far a shortened one gives the same as its base.

Of encoders without a head that is the mean of the last states, as embeddings mostly are; of those that predict masked
tokens the likeliest one where every seventh is masked; of classifiers the likeliest class, or one number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.family.tasks import Gives
from shortcut.live.batch import Batch
from shortcut.live.blocks import run_model
from shortcut.live.load import Model

FIRST, STEP = 3, 7  # the tokens that are masked
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
            what, batch, hidden = TOKENS, *masked(batch, tokenizer)
            rows.append(run_model(model, batch.inputs)[hidden].argmax(-1))
            continue
        result = run_model(model, batch.inputs, stack).float()
        if gives == "states":
            rows.append(pooled(result, batch.mask))
        else:
            result = result[batch.mask] if result.shape[:2] == batch.ids.shape else result
            what = CLASSES if result.shape[-1] > 1 else NUMBERS
            rows.append(result.argmax(-1).flatten() if what == CLASSES else result[:, 0])
    return Given(what, torch.cat(rows).cpu())


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, (batch, tokens, width) -> (batch, width); what is pooled already stays as it is.

    Where states are not of these tokens, but of parts of images or sound, all count.
    """
    if states.dim() == 2:
        return states
    kept = (mask if mask.shape == states.shape[:2] else torch.ones(states.shape[:2])).to(states)[..., None]
    return (states * kept).sum(1) / kept.sum(1)


def masked(batch: Batch, tokenizer: Any) -> tuple[Batch, Tensor]:
    """A batch with some of its tokens masked, and which: (batch, tokens)."""
    if tokenizer.mask_token_id is None:
        raise ShortcutError("the model predicts masked tokens, and its tokenizer has no mask token")
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    hidden = batch.mask & (places % STEP == FIRST)
    return Batch(batch.ids.masked_fill(hidden, tokenizer.mask_token_id), batch.mask), hidden
