"""A batch: what a model is called with, and which tokens of it count."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.records.actions import Action


@dataclass(frozen=True)
class Batch:
    """Token ids and their mask, both (batch, tokens); the mask is False on padding, which is on the right.

    visual: which tokens stand for parts of images, (batch, tokens); extra: what else the model is called with;
    answers: which tokens are of the answers, where these are there. name: as what the model is given the ids; empty
    where they only count what blocks see of the rest, such as parts of images. hidden: of tokens that are masked the
    ids, (batch, tokens), and -1 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    visual: Tensor | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    answers: Tensor | None = None
    name: Literal["input_ids", "decoder_input_ids", ""] = "input_ids"
    hidden: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        extra = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.extra.items()}
        ids, mask = self.ids.to(device), self.mask.to(device)
        visual, answers, hidden = (
            None if each is None else each.to(device) for each in (self.visual, self.answers, self.hidden)
        )
        return Batch(ids, mask, visual, extra, answers, self.name, hidden)

    def repeat(self, copies: int) -> "Batch":
        """So many copies of a batch of text, one behind the other."""
        return Batch(self.ids.repeat(copies, 1), self.mask.repeat(copies, 1))

    @property
    def inputs(self) -> dict[str, Any]:
        """What a model is called with. A full mask is left out: attention then takes its fastest path."""
        if not self.name:
            return dict(self.extra)
        mask = {} if self.mask.all() else {self.name.replace("input_ids", "attention_mask"): self.mask.long()}
        return {self.name: self.ids, **mask, **self.extra}

    @property
    def predicted(self) -> Tensor:
        """Which tokens count when predictions are judged, all but the first of a row: (batch, tokens - 1).

        Those of answers where they are there, else those that are text.
        """
        text = self.mask if self.visual is None else self.mask & ~self.visual
        return (text if self.answers is None else self.answers)[:, 1:]

    def frozen(self, action: Action) -> Tensor:
        """Which tokens an action freezes: (batch, tokens). Raises ShortcutError where there are no images."""
        if self.visual is None:
            raise ShortcutError(f"{action} needs images with questions: see --data")
        return self.visual if action == "freeze-visual" else self.mask & ~self.visual
