"""Training what healing changes: a short loop with a budget, that goes on where it was killed and keeps what was best.

Which sequences a step takes follows from the seed and its number alone, and so does what dropout drops: a run that was
interrupted ends with the weights of one that was not.
"""

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, own_part
from shortcut.common.progress import gauge, say
from shortcut.healing.losses import Judged, Student
from shortcut.healing.saved import SavedTraining
from shortcut.live.batch import Batch
from shortcut.material.examples import Material

LOOKS = 10  # how often a run looks at the text set aside
WARM_UP = 0.05  # of the budget, in which the learning rate rises; then it falls as a cosine, to nothing
CLIP = 1.0  # the largest norm of a step's gradient
SAVE_AFTER = 300  # seconds without a look, after which the state is kept all the same


@dataclass(frozen=True)
class Pace:
    """How long is trained, and how fast. Of tokens and minutes, what is used up first ends it; None: no limit.

    batch_size: sequences of a forward pass, of each process; accumulate: passes of a step; patience: looks without gain
    after which training ends.
    """

    tokens: int | None
    minutes: float | None
    learning_rate: float
    batch_size: int
    accumulate: int
    patience: int
    seed: int


@dataclass(frozen=True)
class State:
    """How far training is, the same for all processes. Losses are means over the tokens set aside.

    judged: what they say, of which the loss is the logarithm where it is perplexity. first: before training; best: the
    lowest, and best_at the step after which; least: the lowest of those after it.
    """

    step: int = 0
    sequences: int = 0
    tokens: int = 0
    seconds: float = 0.0
    looks: int = 0
    waited: int = 0
    first: float = math.inf
    best: float = math.inf
    least: float = math.inf
    best_at: int = 0
    judged: Judged = "perplexity"

    def told(self, loss: float) -> str:
        """A loss for people."""
        return f"{math.exp(min(loss, 700.0)):.2f}" if self.judged == "perplexity" else f"{loss:.4f}"

    def __str__(self) -> str:
        best = "" if self.best_at == self.step else f", the best after step {self.best_at}"
        return (
            f"{self.step} steps, {self.tokens} tokens, {self.seconds / 60:.1f} minutes{best}:"
            f" {self.judged} {self.told(self.first)} -> {self.told(self.best)} on the text set aside"
        )

    def fraction(self, pace: Pace) -> float:
        """The part of the budget that is used up."""
        used = 0.0 if pace.tokens is None else self.tokens / pace.tokens
        if pace.minutes is not None:
            used = max(used, self.seconds / 60 / pace.minutes)
        return used


def train(
    student: Student,
    trained: dict[str, nn.Parameter],
    material: Material,
    aside: Sequence[Batch],
    pace: Pace,
    saved: SavedTraining,
    *,
    quiet: bool,
) -> State:
    """Train the weights until the budget is used up, or looks at the text set aside show no gain; the best ones stay.

    Raises ShortcutError where the loss is not finite, and where nothing was gained.
    """
    from accelerate import Accelerator

    accelerator: Any = Accelerator(device_placement=False, mixed_precision="no")  # all is where it is to be
    adam = torch.optim.AdamW(weights := list(trained.values()), lr=pace.learning_rate, weight_decay=0.0)
    called, optimizer = accelerator.prepare(student, adam)
    state = State(**saved.restore(trained, optimizer))
    if state.step:
        say(f"going on from step {state.step}", quiet=quiet)
    else:
        state = _look_on(student, aside, replace(state, judged=student.judged), pace, saved, trained, quiet=True)
    last_saved = state.seconds
    with gauge("training", quiet=quiet) as show:
        while (used := state.fraction(pace)) < 1 and state.waited < pace.patience:
            began = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = pace.learning_rate * _rate(used)
            loss, tokens = _step(called, accelerator, optimizer, weights, material, state, pace)
            _check_loss(loss, state, saved)
            state = _count(state, pace, tokens, began)
            show(min(1.0, state.fraction(pace)), f"loss {loss:.3f}")
            due = state.fraction(pace) * LOOKS >= state.looks + 1
            if due:
                state = _look_on(student, aside, state, pace, saved, trained, quiet=quiet)
            if due or state.seconds - last_saved > SAVE_AFTER:
                saved.save(trained, optimizer, asdict(state))
                last_saved = state.seconds
    if not state.best_at:
        saved.forget()  # whoever tries again starts anew
        raise ShortcutError(_no_gain(state))
    saved.put_best(trained)
    return state


def _check_loss(loss: float, state: State, saved: SavedTraining) -> None:
    """Raise ShortcutError where training has gone astray."""
    if not math.isfinite(loss):
        step = state.step + 1
        raise ShortcutError(f"the loss is {loss} at step {step}: use a lower --learning-rate; {saved.holds}")


def _no_gain(state: State) -> str:
    """What a training that gained nothing comes to."""
    before, after = (
        f"{math.exp(min(loss, 700.0)) if state.judged == 'perplexity' else loss:.6g}"
        for loss in (state.first, state.least)
    )
    best = f"at best {after}" if math.isfinite(state.least) else f"{state.step} steps are too few to tell"
    what = "perplexity of" if state.judged == "perplexity" else f"{state.judged} on"
    return f"training did not lower the {what} the text set aside ({before}, {best}): nothing is written"


def _rate(used: float) -> float:
    """The learning rate as a part of the highest one, given the part of the budget that is used up."""
    if used < WARM_UP:
        return (used + WARM_UP / 10) / (WARM_UP * 1.1)
    return 0.5 * (1 + math.cos(math.pi * (used - WARM_UP) / (1 - WARM_UP)))


def _step(
    called: Any,
    accelerator: Any,
    optimizer: Any,
    weights: list[nn.Parameter],
    material: Material,
    state: State,
    pace: Pace,
) -> tuple[float, int]:
    """One step; gives its mean loss and its number of tokens, over all processes.

    Where loss or gradients are not finite, no weight changes, and the loss is not finite.
    """
    number, several = own_part()
    torch.manual_seed(hash((pace.seed, state.step, number)))
    called.train()
    device, loss, tokens = weights[0].device, torch.zeros(()), 0
    for turn, places in enumerate(_own_places(len(material.sequences), state.sequences, pace)):
        (batch,) = material.take(places).batches(len(places), device)
        with accelerator.no_sync(called) if turn + 1 < pace.accumulate else nullcontext():
            part = called(places, batch) / pace.accumulate
            accelerator.backward(part)
        loss += part.detach().float().cpu()
        tokens += int(batch.mask.sum())
    loss = add_up(loss) / several
    norm = accelerator.clip_grad_norm_(weights, CLIP)  # of what all processes added up
    if loss.isfinite() and norm.isfinite():
        optimizer.step()
    elif loss.isfinite():
        loss = loss * torch.inf
    optimizer.zero_grad()
    return loss.item(), int(add_up(torch.tensor(tokens)))


def _own_places(count: int, start: int, pace: Pace) -> Iterator[list[int]]:
    """Which of `count` sequences this process takes, pass by pass, once so many have been taken before: in an order of
    its own for every time that all are gone through."""
    number, several = own_part()
    for turn in range(pace.accumulate):
        first = start + (turn * several + number) * pace.batch_size
        chosen = [divmod(place, count) for place in range(first, first + pace.batch_size)]
        yield sorted(order(count, pace.seed, time)[place] for time, place in chosen)


@lru_cache(maxsize=2)
def order(count: int, seed: int, time: int) -> list[int]:
    """In which order sequences come when all are gone through for the first time, 0, or a later one."""
    return random.Random(f"{seed} {time}").sample(range(count), count)


def _count(state: State, pace: Pace, tokens: int, began: float) -> State:
    return replace(
        state,
        step=state.step + 1,
        sequences=state.sequences + pace.batch_size * pace.accumulate * own_part()[1],
        tokens=state.tokens + tokens,
        seconds=state.seconds + _agree(time.monotonic() - began),
    )


def _agree(value: float) -> float:
    """The mean over all processes: whatever they decide by, they decide alike."""
    return add_up(torch.tensor(value, dtype=torch.float64)).item() / own_part()[1]


def _look_on(
    student: Student,
    aside: Sequence[Batch],
    state: State,
    pace: Pace,
    saved: SavedTraining,
    trained: dict[str, nn.Parameter],
    *,
    quiet: bool,
) -> State:
    """Look at the text set aside, and keep the weights if they are the best so far; the first look is to compare."""
    began = time.monotonic()
    loss, used = _agree(student.look(aside)), state.fraction(pace)
    if not state.step:
        state = replace(state, first=loss, best=loss)
    elif loss < state.best:
        saved.keep_best(trained)
        state = replace(state, best=loss, best_at=state.step, waited=0)
    else:
        state = replace(state, waited=state.waited + 1)
    now, before = state.told(loss), state.told(state.first)
    say(f"{min(used, 1):.0%} of the budget: {state.judged} {now} on the text set aside, {before} at first", quiet=quiet)
    least = min(state.least, loss) if state.step else state.least
    seconds = state.seconds + _agree(time.monotonic() - began)
    return replace(state, looks=int(used * LOOKS), least=least, seconds=seconds)
