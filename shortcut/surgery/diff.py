"""Two checkpoints side by side, byte for byte, without loading either."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.tensors import Tensor, digest, same_bytes
from shortcut.common.errors import ShortcutError
from shortcut.common.text import format_table
from shortcut.records.block_lists import format_blocks
from shortcut.records.plan import Plan
from shortcut.surgery.cut import carry_over


def compare_tensors(short: Checkpoint, base: Checkpoint, plan: Plan, healed: Collection[str] = ()) -> int:
    """Compare all tensors, byte for byte, with those of the base that the plan keeps; gives the bytes compared.

    healed: names of those that may have other values. Raises ShortcutError naming the first tensor that is missing,
    left over or different.
    """
    expected = dict(carry_over(base, plan).values())
    if astray := sorted(expected.keys() ^ short.tensors.keys()):
        fault = "lacks" if astray[0] in expected else "should not have"
        raise ShortcutError(f"{short.name} {fault} the tensor {astray[0]} ({len(astray)} such tensors)")
    for name, original in expected.items():
        tensor = short.tensors[name]
        alike = (tensor.dtype, tensor.shape) == (original.dtype, original.shape)
        if not alike or (name not in healed and not same_bytes(tensor, original)):
            raise ShortcutError(f"{short.name}: the tensor {name} differs from the base's {original.name}")
    return short.size - sum(short.tensors[name].size for name in healed)


@dataclass(frozen=True)
class Difference:
    """What two checkpoints share. matches: for every block of `other`, the block of `one` with the same bytes, or None.

    only_one: blocks of `one` that `other` does not have. differing: tensors outside the blocks that are not the same.
    """

    one: str
    other: str
    matches: tuple[int | None, ...]
    only_one: tuple[int, ...]
    differing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    def __str__(self) -> str:
        runs: list[list[int]] = []
        for block, match in enumerate(self.matches):
            before = self.matches[block - 1] if block else None
            joins = match == before if match is None or before is None else match == before + 1
            if runs and joins:
                runs[-1].append(block)
            else:
                runs.append([block])
        rows = [
            [format_blocks(run), format_blocks(m for i in run if (m := self.matches[i]) is not None)] for run in runs
        ]
        rows = [[blocks, "changed" if same == "none" else same] for blocks, same in rows]
        return "\n".join(
            [
                f"A  {self.one}",
                f"B  {self.other}",
                "",
                format_table(["blocks of B", "are A's"], rows),
                "",
                f"only in A: {format_blocks(self.only_one)}",
                f"outside the blocks: {', '.join(self.differing) or 'all equal'}"
                + (" differ" if self.differing else ""),
            ]
        )


def compare_checkpoints(one: Checkpoint, other: Checkpoint) -> Difference:
    """Find, by the bytes of its tensors, which block of `one` every block of `other` is."""
    known = {_digest(block): number for number, block in reversed(list(enumerate(one.blocks)))}
    matches = tuple(known.get(_digest(block)) for block in other.blocks)
    outside = [{name: t for name, t in c.tensors.items() if c.anatomy.split(name) is None} for c in (one, other)]
    shared = outside[0].keys() & outside[1].keys()
    differing = (outside[0].keys() ^ outside[1].keys()) | {
        name for name in shared if not same_bytes(outside[0][name], outside[1][name])
    }
    only_one = tuple(number for number in range(one.anatomy.depth) if number not in matches)
    return Difference(one.name, other.name, matches, only_one, tuple(sorted(differing)))


def _digest(block: Iterable[tuple[str, Tensor]]) -> tuple[object, ...]:
    """What tells one block from another: names, types and shapes of its tensors, and their bytes."""
    tensors = sorted(block, key=lambda named: named[0])
    return (*((name, tensor.dtype, tensor.shape) for name, tensor in tensors), digest(tensor for _, tensor in tensors))
