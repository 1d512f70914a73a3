"""What a model gives that does not predict the next token, as rows that can be compared.

Of encoders without a head that is the mean of the last states, as embeddings mostly are; of those that predict masked
tokens, what they predict where every seventh is masked; of classifiers, the classes, or one number.
"""

from dataclasses import replace

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.decoder import Decoder

FIRST, STEP = 3, 7  # the tokens that are masked


def check_mask(mask_id: int | None) -> int:
    """The token that hides others. Raises ShortcutError where a tokenizer has none."""
    if mask_id is None:
        raise ShortcutError("the model predicts masked tokens, and its tokenizer has no mask token")
    return mask_id


def masked(batch: Batch, mask_id: int) -> Batch:
    """A batch with some of its tokens masked."""
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    hidden = batch.mask & (places % STEP == FIRST)
    return replace(batch, ids=batch.ids.masked_fill(hidden, mask_id), hidden=batch.ids.masked_fill(~hidden, -1))


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, (batch, tokens, width) -> (batch, width); what is pooled already stays as it is.

    Where states are not of these tokens, but of parts of images or sound, all count.
    """
    if states.dim() == 2:
        return states
    kept = (mask if mask.shape == states.shape[:2] else torch.ones(states.shape[:2])).to(states)[..., None]
    return (states * kept).sum(1) / kept.sum(1)


def rows_of(result: Tensor, batch: Batch) -> Tensor:
    """What a model gave, a row for every masked token, every real token, or every sequence: (rows, values)."""
    if batch.hidden is not None:
        return result[batch.hidden >= 0]
    said = batch.extra.get("decoder_attention_mask", batch.mask)  # of an encoder's batch, the decoder's tokens
    if result.shape[:2] == said.shape:
        return result[said.bool()]
    return result.flatten(0, -2)


def outcome(decoder: Decoder, batch: Batch, states: Tensor) -> Tensor:
    """What the model gives where these are the states behind its last block, for `apart`: (rows, values), float32.

    Log probabilities; or embeddings of length 1, or single numbers.
    """
    result = (states if decoder.fault is not None else decoder.finish(batch, states)).float()
    if decoder.gives == "states":
        return torch.nn.functional.normalize(pooled(result, batch.mask), dim=-1)
    rows = rows_of(result, batch)
    return rows if rows.shape[-1] == 1 else torch.log_softmax(rows, dim=-1)


def are_logs(decoder: Decoder, rows: Tensor) -> bool:
    """Whether these rows of `outcome` are log probabilities."""
    return decoder.gives != "states" and rows.shape[-1] > 1


def apart(base: Tensor, other: Tensor) -> Tensor:
    """How far rows are from the base's that are no log probabilities: (rows,).

    The angle between embeddings, as a fraction of a half turn; of single numbers, the square of the difference.
    """
    if base.shape[-1] == 1:
        return (base - other).square()[:, 0]
    return torch.arccos(torch.linalg.vecdot(base, other).clamp(-1, 1)) / torch.pi
