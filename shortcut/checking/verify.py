"""Is this checkpoint what its plan says, and does it load?

Three checks, each against the base: the keys when transformers loads it, the bytes of every tensor, and the logits
against the base with its dropped blocks bypassed. The last is independent of how the files were cut.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from shortcut.checking.perplexity import perplexity
from shortcut.decoder import Batch
from shortcut.errors import ShortcutError
from shortcut.live import Model, load_model
from shortcut.progress import track
from shortcut.records.plan import Plan
from shortcut.scoring.calibration import Calibration, make_batches
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.compare import compare_tensors
from shortcut.surgery.preview import preview
from shortcut.text import format_size

TOLERANCE = 1e-4  # of the largest logit: far above what reordered sums do, far below what a wrong block does


@dataclass(frozen=True)
class CheckReport:
    """What was compared and what came out. The base's entries are None where no base was compared.

    text: the held-out text of the perplexities, with the BOS policy. passed_by: whether there are last-token blocks.
    """

    checkpoint: str
    base: str | None
    text: str
    perplexity: float
    perplexity_base: float | None
    bytes_compared: int | None
    logit_difference: float | None
    passed_by: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.checkpoint} loads whole: no key missing, unexpected or mismatched"]
        if self.base is None:
            return "\n".join([*lines, f"perplexity {self.perplexity:.2f} ({self.text})"])
        return "\n".join(
            [
                *lines,
                f"tensors: all {format_size(self.bytes_compared or 0)} equal to the base's",
                f"logits differ from the base's with its dropped blocks bypassed by {self.logit_difference:.3g}",
                f"perplexity: {self.perplexity_base:.2f} base, {self.perplexity:.2f} shortened ({self.text})",
                *(["the text counts as a prompt there: it says nothing of generation"] if self.passed_by else []),
            ]
        )


def check_checkpoint(
    short: Checkpoint,
    base: tuple[Checkpoint, Plan] | None,
    heldout: Calibration,
    *,
    batch_size: int,
    quiet: bool = False,
    **loading: Any,
) -> CheckReport:
    """Load a checkpoint with plain `from_pretrained` and compare it with the base that a plan was carried out on.

    heldout: text for the perplexity of both. loading: as for `load_model`. One model is in memory at a time. Raises
    ShortcutError at the first thing that is not as it should be.
    """
    compared = None if base is None else compare_tensors(short, *base)
    model = load_model(short.folder, **loading)
    batches = make_batches(heldout, batch_size, model.device)
    after = perplexity(model, track(batches, "perplexity, shortened", quiet=quiet))
    logits = logits_of(model, first_tokens(batches))
    del model
    difference, before = None, None
    if base is not None:
        original = load_model(base[0].folder, **loading)
        difference = compare_logits(logits, original, base[1], first_tokens(batches))
        before = perplexity(original, track(batches, "perplexity, base", quiet=quiet))
    return CheckReport(
        checkpoint=short.name,
        base=base[0].name if base else None,
        text=heldout.described,
        perplexity=after,
        perplexity_base=before,
        bytes_compared=compared,
        logit_difference=difference,
        passed_by=base is not None and bool(base[1].blocks("last-token")),
    )


@torch.inference_mode()
def logits_of(model: Model, batch: Batch) -> torch.Tensor:
    """Logits of one batch on the CPU: (batch, tokens, vocabulary)."""
    mask = None if batch.mask.all() else batch.mask.long()
    return model(input_ids=batch.ids, attention_mask=mask, use_cache=False).logits.cpu()


def compare_logits(short: torch.Tensor, base: Model, plan: Plan, batch: Batch) -> float:
    """Largest difference between the shortened model's logits and those of the base with its dropped blocks bypassed.

    Raises ShortcutError where it is more than rounding.
    """
    with preview(base, plan):
        expected = logits_of(base, batch)
    difference, scale = (short - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= TOLERANCE * scale:
        raise ShortcutError(
            f"the logits differ from the base with its blocks bypassed by {difference:.3g} (of {scale:.3g}):"
            " this family cannot be cut exactly"
        )
    return difference


def first_tokens(batches: Sequence[Batch], tokens: int = 64) -> Batch:
    """The beginning of the first sequence, as a batch of one: enough to tell a wrong model from a right one."""
    return Batch(batches[0].ids[:1, :tokens], batches[0].mask[:1, :tokens])
