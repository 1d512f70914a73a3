"""What one batch adds to the sums of every metric, while it walks through the blocks."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.live.decoder import LOGITS_AT_ONCE, Decoder, check_finite
from shortcut.live.offload import resident
from shortcut.live.outcomes import apart, are_logs, outcome
from shortcut.records.actions import FREEZING, Action, Move
from shortcut.scoring.metrics import Metric, cosine, pairwise_cosines
from shortcut.scoring.spill import Budget, SpillDict
from shortcut.scoring.walk import AS_IT_IS, UNSCALED, Step, walk

TOKENS_AT_ONCE = 64  # for pairwise cosines: the stack of their states fits a processor's cache

Sums = dict[str, Tensor]


def key(metric: Metric, action: Action) -> str:
    """Under what name the sums of a metric are kept, for what may be done to a block; "keep" is for the whole model."""
    return f"{metric.name} {action}"


def add_batch(
    decoder: Decoder,
    batch: Batch,
    metrics: Sequence[Metric],
    allow: Sequence[Action],
    done: Mapping[int, Action],
    sums: Sums,
    budget: Budget,
    scales: Mapping[int, float] = UNSCALED,
) -> Iterator[None]:
    """Walk with one batch, a block at a time, and add what the metrics measure. The rest is as for `walk`."""
    of_steps, of_spans, of_logits = (
        [metric for metric in metrics if metric.needs == needs] for needs in ("states", "spans", "logits")
    )
    ablated: SpillDict[Move] | None = SpillDict(budget) if of_logits else None
    points: SpillDict[int] = SpillDict(budget)  # between the blocks
    for step in walk(decoder, batch, ablated=ablated, allow=allow, done=done, scales=scales):
        if of_steps or of_spans or decoder.fault is None:
            _check_states(step, batch)
        here = batch.to(step.after.device)
        _add_step(step, here, of_steps, allow, sums)
        if of_spans:
            rows = _union(of_spans, here)
            _add_halves(step, here, of_spans, allow, sums)
            points.setdefault(0, step.before[rows])
            points[len(points)] = step.after[rows]
        yield
    if of_spans:
        kept = [point.to(batch.ids.device) for point in points.values()]
        counts = {metric.name: weights(metric, batch)[_union(of_spans, batch)] for metric in of_spans}
        _add_spans(kept, counts, of_spans, sums)
    if ablated is not None:
        untouched: dict[Move, Tensor] = {}
        if done:
            list(walk(decoder, batch, ablated=untouched, allow=()))
        whole = untouched.get(AS_IT_IS, ablated[AS_IT_IS])
        add = _add_ablations if decoder.predicts else _add_outcomes
        with resident(decoder.head):
            add(decoder, batch, whole, ablated, of_logits, sums)


def rows_key(metric: Metric) -> str:
    """Under what name it is kept how many rows the sums of a metric are over, of what is no prediction of tokens."""
    return f"{metric.name} rows"


def chosen(metric: Metric, batch: Batch) -> Tensor:
    """Which tokens a metric's mean runs over: (batch, tokens)."""
    if metric.tokens == "last":
        positions = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        return positions == (positions * batch.mask).amax(1, keepdim=True)
    if metric.tokens == "followed":
        real = batch.mask if batch.visual is None else batch.mask & ~batch.visual
        return torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=1)
    return batch.mask


def weights(metric: Metric, batch: Batch, action: Action = "drop") -> Tensor:
    """How much every token counts in a metric's mean: (batch, tokens), float64, 0 where it does not.

    Of what goes into blocks and comes out, only tokens count that an action freezes, where it freezes any.
    """
    counted = chosen(metric, batch).double()
    if action in FREEZING and metric.needs in ("states", "spans"):
        counted = counted * batch.frozen(action)
    return counted if metric.average == "tokens" else counted / counted.sum(1, keepdim=True).clamp_min(1)


def _union(metrics: Sequence[Metric], batch: Batch) -> Tensor:
    """The tokens that any of these metrics looks at: (batch, tokens)."""
    return torch.stack([torch.zeros_like(batch.mask), *(chosen(metric, batch) for metric in metrics)]).any(0)


def _parts(step: Step, allow: Sequence[Action]) -> dict[Action, tuple[Tensor, Tensor]]:
    """The states before and after what goes by every action: the block whole, its MLP, its attention."""
    parts: dict[Action, tuple[Tensor, Tensor]] = {"drop": (step.before, step.after)}
    if step.between is not None:
        parts |= {"attention-only": (step.between, step.after), "mlp-only": (step.before, step.between)}
    return parts | {action: (step.before, step.after) for action in FREEZING if action in allow}


def _check_states(step: Step, batch: Batch) -> None:
    shape = tuple(step.after.shape)
    if shape[:2] != batch.ids.shape:
        raise ShortcutError(f"the states between blocks are {shape}, not (batch, tokens, width): use kl or perplexity")
    check_finite(step.after[batch.mask.to(step.after.device)].float(), f"block {step.block}", step.after.dtype)


def _add_step(step: Step, batch: Batch, metrics: Sequence[Metric], allow: Sequence[Action], sums: Sums) -> None:
    for action, pair in _parts(step, allow).items() if metrics else ():
        before, after = (states[batch.mask].float() for states in pair)
        for metric in metrics:
            values = metric.measure(before, after).double()
            count = weights(metric, batch, action)[batch.mask]
            sums[key(metric, action)][step.block] += (values @ count).cpu()


def _add_halves(step: Step, batch: Batch, metrics: Sequence[Metric], allow: Sequence[Action], sums: Sums) -> None:
    """Metrics of spans, of parts of one block."""
    for action, pair in _parts(step, allow).items():
        for metric in metrics if action != "drop" else ():
            count = weights(metric, batch, action)
            before, after = (states[count > 0].float() for states in pair)
            values = metric.measure(cosine(before, after)).double()
            sums[key(metric, action)][step.block] += (values @ count[count > 0]).cpu()


def _add_spans(points: Sequence[Tensor], counts: dict[str, Tensor], metrics: Sequence[Metric], sums: Sums) -> None:
    """points: the states between the blocks, each (tokens, width); counts: per metric, what each token counts."""
    for start in range(0, len(points[0]), TOKENS_AT_ONCE):
        chunk = slice(start, start + TOKENS_AT_ONCE)
        cosines = pairwise_cosines(torch.stack([point[chunk].float() for point in points], dim=1))
        for metric in metrics:
            which = counts[metric.name][chunk]
            values = metric.measure(cosines[which > 0]).double()
            sums[key(metric, "drop")] += torch.tensordot(which[which > 0], values, dims=1).cpu()


def _add_ablations(
    decoder: Decoder,
    batch: Batch,
    whole: Tensor,
    ablated: Mapping[Move, Tensor],
    metrics: Sequence[Metric],
    sums: Sums,
) -> None:
    """whole: states behind the last block of the whole model, (batch, tokens, width); ablated: those after moves."""
    batch = batch.to(whole.device)
    rows = _union(metrics, batch)
    targets = batch.ids.roll(-1, dims=1)[rows]
    counts = {metric.name: weights(metric, batch)[rows] for metric in metrics}
    room = max(1, LOGITS_AT_ONCE // decoder.vocabulary)
    for start in range(0, len(targets), room):
        chunk = slice(start, start + room)
        base = decoder.predict(whole[rows][chunk]).to(whole.device)
        for move in ablated:
            block, action = move
            states = ablated[move]
            without = base if states is whole else decoder.predict(states[rows][chunk]).to(whole.device)
            check_finite(without, f"the model without block {block}", states.dtype)
            for metric in metrics:
                count = counts[metric.name][chunk]
                which = count > 0
                values = metric.measure(base[which], without[which], targets[chunk][which]).double()
                sums[key(metric, action)][block] += (values @ count[which]).cpu()


def _add_outcomes(
    decoder: Decoder,
    batch: Batch,
    whole: Tensor,
    ablated: Mapping[Move, Tensor],
    metrics: Sequence[Metric],
    sums: Sums,
) -> None:
    """As `_add_ablations`, of models that give something else than the next token: every row of that counts."""
    batch = batch.to(whole.device)
    base = outcome(decoder, batch, whole)
    targets = torch.zeros(0) if batch.hidden is None else batch.hidden[batch.hidden >= 0]
    for metric in metrics:
        sums[rows_key(metric)] += len(base)
    for move in ablated:
        states = ablated[move]
        without = base if states is whole else outcome(decoder, batch, states)
        check_finite(without, f"the model without block {move.block}", states.dtype)
        for metric in metrics:
            logs = are_logs(decoder, base)
            values = metric.measure(base, without, targets) if logs else apart(base, without)
            sums[key(metric, move.action)][move.block] += values.double().sum().cpu()
