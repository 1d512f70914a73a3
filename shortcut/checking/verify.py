"""Is this checkpoint what its plan says, and does it load?

Three checks, each against the base: the keys when transformers loads it, the bytes of every tensor, and the logits
against the base with its dropped blocks bypassed, and its frozen tokens put back behind the blocks that freeze them.
The last is independent of how the files were cut, and of the modeling file.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from shortcut.checking.agreement import Given, what_it_gives
from shortcut.checking.answers import Answers, answer, compare_answers
from shortcut.checking.perplexity import perplexity
from shortcut.checking.samples import Sample, pair_samples, write_on
from shortcut.checkpoint.checkpoint import Checkpoint, read_json
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import track
from shortcut.common.stacks import Stack
from shortcut.common.text import format_size
from shortcut.live.batch import Batch
from shortcut.live.blocks import find_blocks, hidden_input, hidden_output, run_model
from shortcut.live.load import Model, load_model, load_tokenizer, task_of
from shortcut.material.examples import Material
from shortcut.material.pictures import Pictures
from shortcut.options.groups import Running
from shortcut.records.plan import Plan
from shortcut.surgery.diff import compare_tensors
from shortcut.surgery.preview import preview

LOGIT_TOLERANCE = 1e-4  # of the largest logit: far above what reordered sums do, far below what a wrong block does


@dataclass(frozen=True)
class CheckReport:
    """What was compared and what came out. The base's entries are None where no base was compared.

    text: the held-out text of the perplexities, with the BOS policy, or the questions about images that were answered
    instead. agreement: of models that do not predict the next token, what they give, and how far it is the base's.
    passed_by: whether there are last-token blocks. healed: tensors that are not the base's. samples: what both wrote,
    where that was asked for.
    """

    checkpoint: str
    base: str | None
    text: str
    perplexity: float | None
    perplexity_base: float | None
    answers: Answers | None
    bytes_compared: int | None
    logit_difference: float | None
    agreement: tuple[str, float] | None = None
    passed_by: bool = False
    healed: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json; images of samples are left out."""
        samples = [{"prompt": each.prompt, "written": dict(each.written), "right": each.right} for each in self.samples]
        return {**asdict(replace(self, samples=())), "samples": samples}

    @property
    def rows(self) -> list[list[object]]:
        """What was measured, for people: its name, the base's value where there is a base, and the checkpoint's own."""
        found: list[tuple[str, str, float | None, float | None]] = []
        if self.agreement is not None:
            found.append((self.agreement[0], ".3f", None, self.agreement[1]))
        elif self.answers is None:
            found.append(("perplexity", ".2f", self.perplexity_base, self.perplexity))
        else:
            found.append(("right answers", ".1%", self.answers.right_base, self.answers.right))
            found.append(("answers like the base's", ".1%", None, self.answers.same))
        return [
            [name, "" if before is None else format(before, form), format(after, form)]
            for name, form, before, after in found
            if after is not None
        ]

    def __str__(self) -> str:
        lines = [f"{self.checkpoint} loads whole: no key missing, unexpected or mismatched"]
        if self.base is not None:
            lines += [
                f"tensors: {f'all but {len(self.healed)} healed ones,' if self.healed else 'all'} "
                f"{format_size(self.bytes_compared or 0)} equal to the base's",
                f"logits differ from the base's with its dropped blocks bypassed{self._meanwhile} by "
                f"{self.logit_difference:.3g}",
            ]
        for name, before, after in self.rows:
            values = f": {before} base, {after} shortened" if before else f" {after}"
            lines.append(f"{name}{values} ({self.text})")
        if self.passed_by:
            lines.append("the text counts as a prompt there: it says nothing of generation")
        return "\n".join(lines)

    @property
    def _meanwhile(self) -> str:
        images = "" if self.answers is None else " and images put back behind its frozen ones"
        return images + (" and the healed weights in it" if self.healed else "")


def check_checkpoint(
    short: Checkpoint,
    base: tuple[Checkpoint, Plan] | None,
    heldout: Material,
    how: Running,
    *,
    samples: bool = False,
) -> CheckReport:
    """Load a checkpoint with plain `from_pretrained` and compare it with the base that a plan was carried out on.

    heldout: text for the perplexity of both, or questions about images for both to answer. samples: whether both write
    on behind a few prompts, for people to read. One model is in memory at a time. Raises
    ShortcutError at the first thing that is not as it should be.
    """
    healed = read_healed(short.folder)
    if astray := sorted(set(healed) - set(short.tensors)):
        raise ShortcutError(f"the record of {short.name} calls {astray[0]} healed, which it does not have")
    compared = None if base is None else compare_tensors(short, *base, healed)
    model = load_model(short.folder, how)
    batches = heldout.batches(how.batch_size, model.device)
    after = _measure(model, short, heldout, batches, how)
    written = {"healed" if healed else "shortened": _write(model, short.folder, after, how) if samples else []}
    logits = logits_of(model, first_tokens(batches), short.stack)
    del model
    difference, before = None, None
    if base is not None:
        original = load_model(base[0].folder, how)
        before = _measure(original, base[0], heldout, batches, how)
        written = {"base": _write(original, base[0].folder, before, how) if samples else [], **written}
        put_healed(original, short, base[1], healed)
        difference = compare_logits(logits, original, base[1], first_tokens(batches))
    return CheckReport(
        checkpoint=short.name,
        base=base[0].name if base else None,
        text=heldout.described,
        perplexity=after if isinstance(after, float) else None,
        perplexity_base=before if isinstance(before, float) else None,
        answers=compare_answers(heldout, after, before) if isinstance(heldout, Pictures) else None,
        agreement=(after.what, after.like(before)) if isinstance(after, Given) and before else None,
        bytes_compared=compared,
        logit_difference=difference,
        passed_by=base is not None and bool(base[1].blocks("last-token")),
        healed=healed,
        samples=pair_samples(heldout, written) if samples else (),
    )


_MEASURED: dict[str, float] = {}  # perplexities, by all that they depend on: of several checks, most share a model


def _measure(model: Model, checkpoint: Checkpoint, heldout: Material, batches: Sequence[Batch], how: Running) -> Any:
    """The perplexity of a model on text, measured once, its answers to questions about images, or what it gives."""
    if isinstance(heldout, Pictures):
        return answer(model, heldout, how.batch_size, f"answers, {checkpoint.name}", quiet=how.quiet)
    if (gives := task_of(model).gives) != "next tokens":
        shown = track(batches, f"outputs, {checkpoint.name}", quiet=how.quiet)
        masks = gives == "masked tokens"
        tokenizer = load_tokenizer(checkpoint.folder, trust_remote_code=how.trust_remote_code) if masks else None
        return what_it_gives(model, gives, shown, tokenizer, checkpoint.stack)
    files = [(file.path.name, file.path.stat().st_size, file.path.stat().st_mtime_ns) for file in checkpoint.files]
    depends_on = [files, dict(checkpoint.config), heldout.hash, str(model.dtype), str(model.device), how.batch_size]
    key = json.dumps(depends_on)
    if key not in _MEASURED:
        _MEASURED[key] = perplexity(model, track(batches, f"perplexity, {checkpoint.name}", quiet=how.quiet))
    return _MEASURED[key]


def _write(model: Model, folder: Path, measured: Any, how: Running) -> Any:
    """What a live model writes behind the prompts of samples; the answers that it was measured by, where it was."""
    if isinstance(measured, Given) or model.config.is_encoder_decoder:
        return []
    return measured if isinstance(measured, list) else write_on(model, folder, trust_remote_code=how.trust_remote_code)


def read_healed(folder: Path) -> tuple[str, ...]:
    """The tensors that healing changed in a checkpoint, by its record."""
    healed = read_json(folder / RECORD).get("healed") if (folder / RECORD).exists() else None
    if healed is None:
        return ()
    names = healed.get("tensors") if isinstance(healed, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ShortcutError(f"{folder / RECORD} is damaged: it does not say which tensors were healed")
    return tuple(names)


def put_healed(base: Model, short: Checkpoint, plan: Plan, healed: Sequence[str]) -> None:
    """Give a live base the values that healing gave the shortened checkpoint."""
    for name in healed:
        where = short.anatomy.split(name)
        if where is None:
            raise ShortcutError(f"the record of {short.name} calls {name} healed, which is in no block")
        block, rest = where
        with safe_open(short.tensors[name].file, framework="pt") as file:
            weight = find_blocks(base, plan.base.stack)[plan.kept[block]].get_parameter(rest)
            weight.data.copy_(file.get_tensor(name))


@torch.inference_mode()
def logits_of(model: Model, batch: Batch, stack: Stack = "decoder") -> torch.Tensor:
    """What a model gives for one batch, on the CPU: of its real tokens, (tokens, values), or (sequences, classes)."""
    result = run_model(model, batch.inputs, stack)
    return (result[batch.mask] if result.shape[:2] == batch.ids.shape else result).cpu()


def compare_logits(short: torch.Tensor, base: Model, plan: Plan, batch: Batch) -> float:
    """Largest difference between the shortened model's logits and those of the base carrying the plan out in memory.

    Raises ShortcutError where it is more than rounding.
    """
    frozen, rest = plan.frozen, ["keep" if action == "freeze-visual" else action for action in plan.actions]
    with preview(base, replace(plan, actions=tuple(rest)), batch), images_put_back(base, frozen, batch):
        expected = logits_of(base, batch, plan.base.stack)
    difference, scale = (short - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= LOGIT_TOLERANCE * scale:
        raise ShortcutError(
            f"the logits differ from the base with its blocks bypassed by {difference:.3g} (of {scale:.3g}):"
            " this family cannot be cut exactly"
        )
    return difference


@contextmanager
def images_put_back(model: Model, blocks: Sequence[int], batch: Batch) -> Iterator[None]:
    """These blocks run for all tokens, and those of images get back what went in: slow, and plainly right."""

    def put_back(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = hidden_input(args, kwargs), hidden_output(output)
        after = torch.where(batch.frozen("freeze-visual").to(after.device)[..., None], before.to(after.device), after)
        return after if isinstance(output, torch.Tensor) else (after, *output[1:])

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(find_blocks(model)[block].register_forward_hook(put_back, with_kwargs=True).remove)
        yield


def first_tokens(batches: Sequence[Batch], tokens: int = 64) -> Batch:
    """The beginning of the first sequence, as a batch of one: enough to tell a wrong model from a right one.

    Where a model is given more than text, all of the first batch.
    """
    first = batches[0]
    return first if first.extra else Batch(first.ids[:1, :tokens], first.mask[:1, :tokens])
