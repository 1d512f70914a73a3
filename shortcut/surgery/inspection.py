"""What a checkpoint is made of, from its headers and its config alone."""

import re
from dataclasses import asdict, dataclass, field
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.common.stacks import Stack
from shortcut.common.text import format_count, format_size, format_table
from shortcut.family.anatomy import attends_to_encoder, other_stacks, part_of, stack_config
from shortcut.family.fields import is_per_block, refusal
from shortcut.records.block_lists import format_blocks
from shortcut.surgery.savings import CONTEXT, Prefill, Saving, savings

PARTS = ("attention", "cross", "mlp", "norms", "other")
_EMBEDDING = re.compile("emb|wte|wpe|lm_head|^shared")
_WRITES = re.compile("CausalLM|LMHead|ConditionalGeneration")  # what is said of a prompt and of new tokens is for these


@dataclass(frozen=True)
class Amount:
    """Parameters, as stored, and their bytes."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Block:
    """One block: its kind, as far as the config names kinds, and what its parts hold."""

    number: int
    kind: str
    parts: dict[str, Amount]

    @property
    def total(self) -> Amount:
        return Amount(
            sum(part.parameters for part in self.parts.values()), sum(part.bytes for part in self.parts.values())
        )


@dataclass(frozen=True)
class Inspection:
    """The blocks of a checkpoint and the rest of it, and what can be done to the family.

    stack: whose blocks they are; others: the other stacks, and how many blocks each has.
    """

    model: str
    family: str
    dtypes: tuple[str, ...]
    files: int
    total: Amount
    embeddings: Amount
    rest: Amount
    blocks: tuple[Block, ...]
    savings: tuple[tuple[Saving, ...], ...]
    refusal: str | None
    prefill: Prefill | None = None
    stack: Stack = "decoder"
    others: dict[Stack, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    def __str__(self) -> str:
        rows, crosses = [], any("cross" in block.parts for block in self.blocks)
        shown = [part for part in PARTS if crosses or part != "cross"]
        of = f"{self.stack} " if self.others else ""
        others = [f"also {_count(count, f'{name} ')}: --stack {name}" for name, count in self.others.items()]
        for kind in dict.fromkeys((block.kind, block.total) for block in self.blocks):
            alike = [block for block in self.blocks if (block.kind, block.total) == kind]
            parts = alike[0].parts
            rows.append(
                [
                    format_blocks(block.number for block in alike),
                    kind[0],
                    *(format_count(parts[part].parameters) if part in parts else "-" for part in shown),
                    format_count(kind[1].parameters),
                    format_size(kind[1].bytes),
                    f"{kind[1].parameters / self.total.parameters:.2%}",
                ]
            )
        head = ["blocks", "kind", *shown, "each", "bytes", "of model"]
        todo = ["", f"refused: {self.refusal}"] if self.refusal else self._saved() if self.savings else []
        return "\n".join(
            [
                f"{self.model}",
                f"{self.family}: {_count(len(self.blocks), of)}, {format_count(self.total.parameters)} parameters, "
                f"{format_size(self.total.bytes)} of {'/'.join(self.dtypes)} in {self.files} file(s)",
                *others,
                "",
                format_table(head, rows, left=2),
                "",
                f"embeddings {format_count(self.embeddings.parameters)}, the rest {format_count(self.rest.parameters)}",
                *todo,
                *([] if self.prefill is None else ["", str(self.prefill)]),
            ]
        )

    def _saved(self) -> list[str]:
        """A table of what every move saves, for the first block of each kind."""
        rows = []
        for saved in dict.fromkeys(self.savings):
            alike = format_blocks(number for number, other in enumerate(self.savings) if other == saved)
            for saving in saved:
                cache = "-" if saving.cache is None else format_size(saving.cache)
                work = ["-" if w is None else format_count(w) for w in (saving.prefill, saving.decode)]
                rows.append([alike, saving.action, format_count(saving.parameters), cache, *work])
        head = ["each of", "action", "parameters", "cache/token", "FLOPs/token of a prompt", "of a new token"]
        note = f"cache in half precision; prompts of {CONTEXT} tokens, a new token behind as many"
        return ["", "what a move saves", format_table(head, rows, left=2), "", note]


def _count(blocks: int, of: str) -> str:
    return f"{blocks} {of}block{'s' * (blocks != 1)}"


def inspect_checkpoint(checkpoint: Checkpoint, prompt: Prefill | None = None) -> Inspection:
    """Count parameters and bytes, block by block and part by part; no weight is read."""
    _, text = stack_config(checkpoint.config, checkpoint.stack)
    depth = checkpoint.anatomy.depth
    kinds = [value for field, value in text.items() if is_per_block(field, value, depth) and field.endswith("_types")]
    blocks = []
    for number, tensors in enumerate(checkpoint.blocks):
        parts: dict[str, Amount] = {}
        for rest, tensor in tensors:
            part = "cross" if attends_to_encoder(rest) and part_of(rest) != "norms" else part_of(rest)
            held = parts.get(part, Amount(0, 0))
            parts[part] = Amount(held.parameters + tensor.parameters, held.bytes + tensor.size)
        blocks.append(Block(number, ", ".join(str(kind[number]) for kind in kinds) or "block", parts))
    outside = [tensor for name, tensor in checkpoint.tensors.items() if checkpoint.anatomy.split(name) is None]
    embedding = [t for t in outside if _EMBEDDING.search(t.name)]
    embeddings = Amount(sum(t.parameters for t in embedding), sum(t.size for t in embedding))
    named, reads = str(checkpoint.config.get("architectures") or "LMHead"), checkpoint.config.get("is_encoder_decoder")
    writes = _WRITES.search(named) and checkpoint.stack == "decoder" and not reads
    return Inspection(
        model=checkpoint.name,
        family=str(checkpoint.config.get("model_type", "unknown")),
        dtypes=tuple(sorted({tensor.dtype for tensor in checkpoint.tensors.values()})),
        files=len(checkpoint.files),
        total=Amount(checkpoint.parameters, checkpoint.size),
        embeddings=embeddings,
        rest=Amount(
            sum(t.parameters for t in outside) - embeddings.parameters, sum(t.size for t in outside) - embeddings.bytes
        ),
        blocks=tuple(blocks),
        savings=tuple(savings(checkpoint, number) for number in range(len(blocks) if writes else 0)),
        refusal=refusal(checkpoint.config),
        prefill=prompt,
        stack=checkpoint.stack,
        others=other_stacks(checkpoint.tensors, checkpoint.config, checkpoint.stack),
    )
