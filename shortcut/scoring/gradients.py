"""Scores from the weights of a block, and from the loss's gradient with respect to them, one block at a time.

The loss is the mean over all next tokens of the calibration set. A walk keeps the states in front of every block; from
the last block to the first, each is then run once more with a graph, so that only the weights of one block have
gradients at any time.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, are_several, share
from shortcut.common.progress import track
from shortcut.live.batch import Batch
from shortcut.live.decoder import Call, Decoder
from shortcut.live.offload import resident
from shortcut.records.actions import Action
from shortcut.records.scores import Measured
from shortcut.scoring.accumulate import key
from shortcut.scoring.metrics import Metric
from shortcut.scoring.partial_sums import Partial, Partials
from shortcut.scoring.walk import NOTHING, run_together, walk

ROWS_AT_ONCE = 256  # whose logits, and their gradients, are in memory together


def score_weights(
    decoder: Decoder,
    batches: Sequence[Batch],
    metrics: Sequence[Metric],
    allow: Sequence[Action],
    *,
    partials: Partials | None,
    quiet: bool,
) -> Measured:
    """Score every block by metrics of weights and gradients: sums over all its weights that go, in float64.

    What needs gradients goes on from `partials`, block by block, in one process. Raises ShortcutError where the model's
    blocks cannot be run one by one, and where a gradient is not finite.
    """
    names = [(action, metric) for action in allow for metric in metrics]
    sums = {key(metric, action): torch.zeros(len(decoder.blocks), dtype=torch.float64) for action, metric in names}

    def add(metric: Metric, number: int, weights: Sequence[nn.Parameter], *gradients: Sequence[Tensor]) -> None:
        values = zip((weight.detach().float() for weight in weights), *gradients, strict=True)
        totals = {id(w): metric.measure(*given).double().sum().item() for w, given in zip(weights, values, strict=True)}
        for action in allow:
            going = {id(weight) for weight in decoder.weights(number, action)}
            sums[key(metric, action)][number] = math.fsum(totals[each] for each in totals if each in going)

    of_gradients = [metric for metric in metrics if metric.needs == "gradients"]
    for metric in (metric for metric in metrics if metric.needs == "weights"):
        for number, block in enumerate(decoder.blocks):
            with resident(block):
                add(metric, number, _weights(block))
    if of_gradients:
        decoder.check_alone(of_gradients[0].name)
        kept = partials.of(of_gradients, allow, NOTHING) if partials and not are_several() else None
        for number, weights, gradients in _gradients(decoder, batches, sums, kept, quiet=quiet):
            for metric in of_gradients:
                add(metric, number, weights, gradients)
    return {action: {m.name: tuple(map(m.finish, sums[key(m, action)].tolist())) for m in metrics} for action in allow}


def _weights(block: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in block.parameters() if weight.is_floating_point()]


def _gradients(
    decoder: Decoder, batches: Sequence[Batch], sums: dict[str, Tensor], partial: Partial | None, *, quiet: bool
) -> Iterator[tuple[int, list[nn.Parameter], list[Tensor]]]:
    """Yield every block's number, weights, and the gradients of the loss in float32; from the last to the first.

    sums: what whoever takes them adds to; they are kept in `partial`, with what the next block needs.
    """
    with torch.no_grad(), _only_asked_for(decoder):
        total = sum(int(batch.mask[:, 1:].sum()) for batch in batches)
        batches = share(batches)
        kept: list[list[Tensor]] = [[] for _ in batches]
        run_together(decoder, [_keep_states(decoder, *pair) for pair in zip(batches, kept, strict=True)])
        calls = [decoder.calls(batch) for batch in batches]
        pairs = zip(batches, kept, strict=True)
        with resident(decoder.head):
            upstream = [_loss_gradient(decoder, batch, states.pop(), total) for batch, states in pairs]

        def state() -> dict[str, Tensor]:
            return sums | {f"upstream {place}": gradient for place, gradient in enumerate(upstream)}

        found_before = state()
        done = partial.restore(found_before) if partial else 0
        sums |= {name: found_before[name] for name in sums}
        upstream = [found_before[f"upstream {place}"].to(u.device) for place, u in enumerate(upstream)]
        for own in kept:
            del own[len(own) - done :]
        for number in track(range(len(decoder.blocks) - 1 - done, -1, -1), "gradients", quiet=quiet):
            with resident(decoder.blocks[number]):
                weights = _weights(decoder.blocks[number])
                gradients = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
                for place in range(len(batches)):
                    states, call = kept[place].pop(), calls[place][number]
                    upstream[place], found = _backward(decoder, number, states, call, upstream[place])
                    for gradient, part in zip(gradients, found, strict=True):
                        if part is not None:  # an expert that no token of this batch went to has none
                            gradient += part
                gradients = [add_up(gradient) for gradient in gradients]
                _check_gradients(gradients, number)
                yield number, weights, gradients
            if partial:
                partial.save(state(), len(decoder.blocks) - number)


def _keep_states(decoder: Decoder, batch: Batch, kept: list[Tensor]) -> Iterator[None]:
    """Keep the states in front of every block, and those behind the last."""
    for step in walk(decoder, batch):
        kept += [step.before] if step.block + 1 < len(decoder.blocks) else [step.before, step.after]
        yield


def _check_gradients(gradients: Sequence[Tensor], number: int) -> None:
    if not all(gradient.sum().isfinite() for gradient in gradients):
        raise ShortcutError(f"the gradients of block {number} are not finite: use --dtype float32 or bfloat16")


@contextmanager
def _only_asked_for(decoder: Decoder) -> Iterator[None]:
    """No weight records a graph but where a gradient is asked for; afterwards all do what they did."""
    before = [(weight, weight.requires_grad) for weight in decoder.model.parameters()]
    try:
        for weight, _ in before:
            weight.requires_grad_(False)
        yield
    finally:
        for weight, records in before:
            weight.requires_grad_(records)


def _loss_gradient(decoder: Decoder, batch: Batch, final: Tensor, total: int) -> Tensor:
    """Gradient of the loss with respect to the states behind the last block: (batch, tokens, width)."""
    gradient, batch = torch.zeros_like(final), batch.to(final.device)
    all_rows, all_places = batch.mask[:, 1:].nonzero(as_tuple=True)
    for start in range(0, len(all_rows), ROWS_AT_ONCE):
        rows, places = all_rows[start : start + ROWS_AT_ONCE], all_places[start : start + ROWS_AT_ONCE]
        with torch.enable_grad():
            states = final[rows, places].requires_grad_()
            loss = -decoder.predict(states).to(final.device).gather(1, batch.ids[rows, places + 1, None]).sum() / total
            (gradient[rows, places],) = torch.autograd.grad(loss, [states])
    return gradient


def _backward(
    decoder: Decoder, number: int, before: Tensor, call: Call, upstream: Tensor
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradients of a block's input and weights, given that of its output."""
    weights = _weights(decoder.blocks[number])
    with torch.enable_grad():
        for weight in weights:
            weight.requires_grad_()
        before = before.detach().requires_grad_()
        after = decoder.run(number, before, call)
        upstream = upstream.to(after.device)
        own, *gradients = torch.autograd.grad(after, [before, *weights], upstream, allow_unused=True)
        for weight in weights:
            weight.requires_grad_(False)
    return own, gradients
