"""What training a shortened model minimises: the loss of its next tokens, or the distance from what the base gives.

Logits are large: those of a few rows are made, give their share of the loss and of its gradient, and go again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shortcut.healing.saved import write_whole
from shortcut.live.batch import Batch
from shortcut.live.blocks import run_model
from shortcut.live.decoder import LOGITS_AT_ONCE, Decoder
from shortcut.live.outcomes import are_logs, masked, outcome
from shortcut.records.plan import Plan

# The loss of some rows, summed, given their log probabilities, (rows, vocabulary), and which of all rows they are.
Price = Callable[[Tensor, slice], Tensor]
Judged = Literal["perplexity", "distance from the base"]


def final_states(decoder: Decoder, batch: Batch) -> Tensor:
    """What `Decoder.predict` takes, for every token: (batch, tokens, width)."""
    if decoder.fault is not None:
        return run_model(decoder.model, batch.inputs)
    return decoder.states(batch)[-1]


def mean_over_rows(decoder: Decoder, rows: Tensor, price: Price) -> Tensor:
    """The mean price of rows of final states, (rows, width), in float32; gradients go back to the rows alone."""
    gradient, total = torch.zeros_like(rows), torch.zeros((), device=rows.device)
    room = max(1, LOGITS_AT_ONCE // decoder.vocabulary)
    for start in range(0, len(rows), room):
        chunk = slice(start, start + room)
        own = rows[chunk].detach().requires_grad_(torch.is_grad_enabled())
        part = price(decoder.predict(own), chunk) / len(rows)
        if own.requires_grad:
            (gradient[chunk],) = torch.autograd.grad(part, [own])
        total += part.detach()
    carrier = (rows * gradient).float().sum()  # its value is of no use, its gradient is the one found above
    return total + carrier - carrier.detach()


def next_tokens(batch: Batch) -> Price:
    """The negative log likelihood of the tokens that come next."""
    targets = batch.ids[:, 1:][batch.predicted]
    return lambda logs, chunk: -logs.gather(-1, targets[chunk, None]).sum()


def divergence(logs: Tensor, own: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ own) of rows of log probabilities, summed; both softened, and times the temperature's square.

    Hinton et al., arXiv:1503.02531.
    """
    softened = torch.log_softmax(logs / temperature, dim=-1)
    other = torch.log_softmax(own / temperature, dim=-1)
    return nn.functional.kl_div(other, softened, log_target=True, reduction="sum") * temperature**2


def divergence_of_few(values: Tensor, ids: Tensor, own: Tensor, temperature: float) -> Tensor:
    """The same where of the teacher only the likeliest tokens are known: all others count as one.

    values: their softened log probabilities, ids: which they are, both (rows, tokens known).
    """
    other = torch.log_softmax(own / temperature, dim=-1).gather(-1, ids)
    tiny = torch.finfo(torch.float32).eps
    rest, other_rest = ((-logs.exp().sum(dim=-1).sub(1)).clamp(min=tiny) for logs in (values, other))
    known = (values.exp() * (values - other)).sum()
    return (known + (rest * (rest.log() - other_rest.log())).sum()) * temperature**2


@dataclass(frozen=True)
class Teacher:
    """The model that was cut, whose predictions are to be met.

    match: the weight of the distance between both models' states behind every cut, as the share of the teacher's that
    is missing (an auxiliary loss that Deeper Layers proposes, arXiv:2403.17887, section 5).
    """

    decoder: Decoder
    plan: Plan
    temperature: float = 1.0
    match: float = 0.0

    @torch.no_grad()
    def price(self, places: Sequence[int], batch: Batch) -> Price:  # noqa: ARG002  (`Notes` need them)
        """How far predictions are from the teacher's."""
        return self._price(final_states(self.decoder, batch), batch)

    @torch.no_grad()
    def price_and_aims(self, batch: Batch) -> tuple[Price, list[Tensor]]:
        """The same, and the teacher's states behind every cut: (batch, tokens, width) each."""
        states = self.decoder.states(batch)
        return self._price(states[-1], batch), [states[block] for block in cuts(self.plan)]

    @torch.no_grad()
    def outcome_and_aims(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What a teacher gives that does not predict the next token, as `outcome` has it, and its states as above."""
        if not self.match:
            return outcome(self.decoder, batch, final_states(self.decoder, batch)), []
        states = self.decoder.states(batch)
        return outcome(self.decoder, batch, states[-1]), [states[block] for block in cuts(self.plan)]

    def _price(self, states: Tensor, batch: Batch) -> Price:
        rows = states[:, :-1][batch.predicted]

        def price(logs: Tensor, chunk: slice) -> Tensor:
            with torch.no_grad():
                aims = self.decoder.predict(rows[chunk]).to(logs.device)
            return divergence(aims, logs, self.temperature)

        return price


@dataclass(frozen=True)
class Notes:
    """The likeliest tokens of a teacher's predictions, in a file for each sequence; all other tokens count as one.

    known: how many tokens of each prediction; temperature: by which they are softened.
    """

    folder: Path
    known: int
    temperature: float = 1.0

    @torch.no_grad()
    def take(self, decoder: Decoder, places: Sequence[int], batch: Batch) -> None:
        """Note the predictions for these sequences, where it has not been done."""
        if all(self._file(place).exists() for place in places):
            return
        states = final_states(decoder, batch)[:, :-1]
        for row, place in enumerate(places):
            logs = decoder.predict(states[row][batch.predicted[row]]) / self.temperature
            values, ids = torch.log_softmax(logs, dim=-1).topk(min(self.known, logs.shape[-1]), dim=-1)
            kept = {"values": values.cpu(), "ids": ids.int().cpu()}
            write_whole(self._file(place), partial(save_file, kept), "what was noted before is kept")

    def _file(self, place: int) -> Path:
        return self.folder / f"{place:07}.safetensors"

    def price(self, places: Sequence[int], batch: Batch) -> Price:
        """How far predictions are from what was noted."""
        parts = [load_file(self._file(place), device=str(batch.ids.device)) for place in places]
        values, ids = (torch.cat([part[name] for part in parts]) for name in ("values", "ids"))
        return lambda logs, chunk: divergence_of_few(values[chunk], ids[chunk].long(), logs, self.temperature)


def distances(base: Tensor, own: Tensor, *, logs: bool) -> Tensor:
    """How far rows of `outcome` are from the base's: KL(base ‖ own) of log probabilities, the square of the distance
    between embeddings of length 1, or between numbers: (rows,)."""
    return (base.exp() * (base - own)).sum(-1) if logs else (base - own).square().sum(-1)


def cuts(plan: Plan) -> tuple[int, ...]:
    """The places behind every span that was deleted and every block that lost a half: the number of the next block."""
    depth = len(plan.actions)
    ends = [block + 1 for block in range(depth) if plan.actions[block] != "keep"]
    return tuple(end for end in ends if end == depth or plan.actions[end] != "drop")


class Student(nn.Module):
    """A shortened model with what it is trained by; called with sequences, it gives the loss.

    teacher: None for the loss of next tokens. recompute: less memory for more time; bf16: products in bfloat16; mask:
    the token that hides others, of a model that predicts these. judged: what looks at text set aside measure.
    """

    def __init__(
        self,
        decoder: Decoder,
        teacher: Teacher | Notes | None,
        *,
        recompute: bool = False,
        bf16: bool = False,
        mask: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.decoder, self.teacher, self.recompute = decoder.model, decoder, teacher, recompute
        self.bf16, self.mask = bf16, mask
        self.judged: Judged = "perplexity" if decoder.predicts else "distance from the base"

    def train(self, mode: bool = True) -> "Student":
        """Dropout of low-rank changes goes on or off; the model's own stays off."""
        self.training = mode
        for module in self.model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout.train(mode)
        return self

    def forward(self, places: Sequence[int], batch: Batch) -> Tensor:
        """The mean loss over the predicted tokens. places: which sequences of the material they are."""
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.bf16):
            return self._loss(places, batch) if self.decoder.predicts else self._distance(batch)

    @torch.no_grad()
    def look(self, batches: Sequence[Batch]) -> float:
        """The mean loss of next tokens, whatever it is trained by; or how far it is from the base."""
        self.eval()
        total, count = 0.0, 0
        for batch in batches:
            with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.bf16):
                if not self.decoder.predicts:
                    total, count = total + self._distance(batch).item() * len(batch.ids), count + len(batch.ids)
                    continue
                rows = final_states(self.decoder, batch)[:, :-1][batch.predicted]
                total += mean_over_rows(self.decoder, rows, next_tokens(batch)).item() * len(rows)
            count += len(rows)
        return total / count

    def _loss(self, places: Sequence[int], batch: Batch) -> Tensor:
        teacher, aims, extra = self.teacher, list[Tensor](), torch.zeros(())
        # The teacher goes first: what its pass takes of memory is free again when the student keeps all of its own.
        if isinstance(teacher, Teacher) and teacher.match:
            price, aims = teacher.price_and_aims(batch)
        else:
            price = next_tokens(batch) if teacher is None else teacher.price(places, batch)
        if self.decoder.fault is not None:
            states = [final_states(self.decoder, batch)]
        else:
            states = self.decoder.states(batch, recompute=self.recompute)
        rows = states[-1][:, :-1][batch.predicted]
        if isinstance(teacher, Teacher) and aims:
            extra = self._mismatch(teacher, states, aims, batch)
        return mean_over_rows(self.decoder, rows, price) + extra.to(rows.device)

    def _distance(self, batch: Batch) -> Tensor:
        """How far what it gives is from what its teacher does, where that is not the next token."""
        teacher, batch = self.teacher, batch if self.mask is None else masked(batch, self.mask)
        assert isinstance(teacher, Teacher)
        base, aims = teacher.outcome_and_aims(batch)
        if self.decoder.fault is not None:
            states = [final_states(self.decoder, batch)]
        else:
            states = self.decoder.states(batch, recompute=self.recompute)
        loss = distances(base, outcome(self.decoder, batch, states[-1]), logs=are_logs(self.decoder, base)).mean()
        return loss + self._mismatch(teacher, states, aims, batch) if aims and self.training else loss

    @staticmethod
    def _mismatch(teacher: Teacher, states: Sequence[Tensor], aims: Sequence[Tensor], batch: Batch) -> Tensor:
        """How far states behind every cut are from the teacher's, times its weight."""
        own = [states[_number_in_short(teacher.plan, block)] for block in cuts(teacher.plan)]
        return (
            teacher.match * torch.stack([_distance(*pair, batch.mask) for pair in zip(own, aims, strict=True)]).mean()
        )


def _number_in_short(plan: Plan, block: int) -> int:
    """How many blocks in front of this one of the base are still there."""
    return sum(action != "drop" for action in plan.actions[:block])


def _distance(states: Tensor, aims: Tensor, mask: Tensor) -> Tensor:
    """‖states - aims‖² / ‖aims‖², mean over the real tokens."""
    own, aim = (each[mask].float() for each in (states, aims.to(states.device)))
    return ((own - aim).square().sum(-1) / aim.square().sum(-1)).mean()
