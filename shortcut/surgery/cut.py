"""Carry a plan out on the files of a checkpoint: no model class, no tensor library, memory of a few megabytes.

The plan becomes a list of output files (every tensor with its new name), then the files are written, then config.json,
last of all: until it is there, nothing loads the folder.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortcut.checkpoint.checkpoint import INDEX, SINGLE, Checkpoint, read_checkpoint, read_json
from shortcut.checkpoint.modules import copy_modules
from shortcut.checkpoint.remote import fetch_tensors
from shortcut.checkpoint.side_files import copy_side_files, write_json
from shortcut.checkpoint.stage import RECORD, make_durable
from shortcut.checkpoint.tensors import FLOATS, Tensor, select, write_file
from shortcut.common.errors import ShortcutError
from shortcut.common.version import __version__
from shortcut.family.anatomy import fused_axis
from shortcut.family.fields import check_family, is_plain
from shortcut.family.halves import decilm, has_own_code, modeling_of
from shortcut.family.known import is_proven
from shortcut.records.plan import FORMAT, Plan
from shortcut.surgery.config import cut_config
from shortcut.surgery.decilm import check_decilm
from shortcut.surgery.hollow import blanked, gone_by_half, hollow_config, renumber_frozen, write_modeling_file
from shortcut.surgery.numbering import QUANTISATION_FIELDS, QUANTISATION_FILES, renumber_metadata, renumber_settings

PARAMS = "params.json"  # of code that is not transformers'


@dataclass(frozen=True)
class OutputFile:
    """One weight file to be written: tensors of the base, each with its new name."""

    name: str
    tensors: tuple[tuple[str, Tensor], ...]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.size for _, tensor in self.tensors)


def shorten_config(
    checkpoint: Checkpoint, plan: Plan, *, no_guard: bool = False, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The content of the shortened model's config.json, once it is sure to build the kept blocks as they were.

    Families whose config says nothing of single blocks need no more than the rules; for others the static guard builds
    both models without weights, which imports torch. Raises ShortcutError for a plan that cannot be exact.
    """
    family, own_code = str(checkpoint.config.get("model_type")), "auto_map" in checkpoint.config
    if no_guard and (own_code or not is_proven(family)):
        raise ShortcutError(f"--no-guard is for families that were proven exact, and {family} is not one of them")
    if plan.changes and own_code and not trust_remote_code and not has_own_code(checkpoint.folder, checkpoint.config):
        check_family(checkpoint.config)
        raise ShortcutError(f"{checkpoint.name} comes with code of its own: --trust-remote-code lets the guard run it")
    code = checkpoint.folder if own_code else None
    config = cut_config(checkpoint.config, checkpoint.anatomy, plan.kept, code, keeps_heads=plan.keeps_heads)
    config = renumber_frozen(config, plan.kept)
    if plan.dropped:
        for part in (config, *(config[key] for key in checkpoint.anatomy.config_path)):
            for field in QUANTISATION_FIELDS:
                if isinstance(part.get(field), dict):
                    part[field] = renumber_settings(
                        part[field], checkpoint.anatomy, stored(checkpoint, plan), checkpoint.tensors
                    )
        if not is_plain(checkpoint.config) and not no_guard:
            from shortcut.surgery.guard import guard

            guard(checkpoint, config, plan.kept, code)
    config = hollow_config(config, checkpoint, plan)
    if modeling_of(config) is decilm():  # by this plan, or by one before
        check_decilm(config, {name: tensor.shape for name, tensor in carry_over(checkpoint, plan).values()})
    return config


def carry_over(checkpoint: Checkpoint, plan: Plan) -> dict[str, tuple[str, Tensor]]:
    """By its name in the base, every tensor that stays: its new name, and what of it stays.

    Blocks are renumbered in their order. Of tensors that hold a part for every block, the parts of the kept ones stay.
    Heads behind the last block that predict further tokens go, unless the plan keeps them.
    """
    if checkpoint.anatomy.depth != plan.base.blocks:
        here = f"{checkpoint.name} has {checkpoint.anatomy.depth}"
        raise ShortcutError(f"the plan is for {plan.base.blocks} blocks and {here}")
    halves = gone_by_half(checkpoint, plan)
    blank, gone = (halves, set()) if plan.format == "zeroed" else (set(), halves)
    tensors = {name: blanked(tensor) if name in blank else tensor for name, tensor in checkpoint.tensors.items()}
    if not plan.dropped:
        return {name: (name, tensor) for name, tensor in tensors.items() if name not in gone}
    numbers = {old: new for new, old in enumerate(stored(checkpoint, plan))}
    staying = {}
    for name, tensor in tensors.items():
        where = checkpoint.anatomy.split(name)
        if where is None and (plan.keeps_heads or not checkpoint.anatomy.predicts_further(name)):
            staying[name] = (name, _kept_parts(checkpoint, plan, tensor))
        elif where is not None and where[0] in numbers and name not in gone:
            staying[name] = (checkpoint.anatomy.join(numbers[where[0]], where[1]), tensor)
    return staying


def stored(checkpoint: Checkpoint, plan: Plan) -> tuple[int, ...]:
    """What is stored in the result where the blocks are, by the base's numbers: kept blocks, then heads that stay."""
    numbers = {where[0] for name in checkpoint.tensors if (where := checkpoint.anatomy.split(name))}
    heads = sorted(number for number in numbers if number >= plan.base.blocks) if plan.keeps_heads else []
    return (*plan.kept, *heads)


def _kept_parts(checkpoint: Checkpoint, plan: Plan, tensor: Tensor) -> Tensor:
    """A tensor outside the blocks, without the parts that it holds for dropped ones."""
    axis = fused_axis(tensor.name)
    if axis is None:
        return tensor
    module = tensor.name.rpartition(".")[0]
    if tensor.dtype not in FLOATS or sum(name.startswith(f"{module}.") for name in checkpoint.tensors) > 1:
        raise ShortcutError(f"cannot cut {module} of {checkpoint.name}: it is quantised and has a part for every block")
    return select(tensor, axis, plan.base.blocks, plan.kept)


def plan_files(checkpoint: Checkpoint, plan: Plan, max_shard_size: int | None = None) -> tuple[OutputFile, ...]:
    """What the weight files of the result will be: the base's sharding, or shards of at most this many bytes."""
    staying = carry_over(checkpoint, plan)
    groups = [[staying[t.name] for t in file.tensors if t.name in staying] for file in checkpoint.files]
    metadata = [file.metadata for file in checkpoint.files]
    if max_shard_size is not None:
        groups = _pack([tensor for group in groups for tensor in group], max_shard_size)
        metadata = [{key: value for file in metadata for key, value in file.items()}] * len(groups)
    if plan.dropped:
        kept = stored(checkpoint, plan)
        metadata = [renumber_metadata(meta, checkpoint.anatomy, kept, checkpoint.tensors) for meta in metadata]
    filled = [(group, meta) for group, meta in zip(groups, metadata, strict=True) if group]
    count = len(filled)
    return tuple(
        OutputFile(
            SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors",
            tuple(group),
            meta,
        )
        for number, (group, meta) in enumerate(filled, 1)
    )


def needed(files: Iterable[OutputFile]) -> Iterator[Tensor]:
    """The tensors of the base whose bytes go into these files."""
    return (tensor for file in files for _, tensor in file.tensors if not tensor.blank)


def _pack(tensors: list[tuple[str, Tensor]], limit: int) -> list[list[tuple[str, Tensor]]]:
    groups: list[list[tuple[str, Tensor]]] = [[]]
    room = limit
    for name, tensor in tensors:
        if tensor.size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append((name, tensor))
        room -= tensor.size
    return groups


def write_checkpoint(
    checkpoint: Checkpoint,
    plan: Plan,
    config: Mapping[str, Any],
    folder: Path,
    *,
    max_shard_size: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Checkpoint:
    """Write the shortened checkpoint into an empty folder and read it back, header by header.

    config: from `shorten_config`. `advance` is told the bytes copied. Raises ShortcutError for a plan of another depth.
    """
    files = plan_files(checkpoint, plan, max_shard_size)
    fetch_tensors(checkpoint.mirrors, needed(files), advance)
    with ThreadPoolExecutor(1) as background:  # a file goes to the disk while the next one is copied
        synced = []
        for file in files:
            write_file(folder / file.name, file.tensors, file.metadata, advance)
            synced.append(background.submit(make_durable, folder / file.name))
        for job in synced:
            job.result()
    if len(files) > 1:
        write_json(folder / INDEX, _index(files))
    copy_side_files(checkpoint.folder, folder)
    copy_modules(checkpoint.folder, folder)
    for path in (folder / name for name in QUANTISATION_FILES if plan.dropped and (folder / name).exists()):
        settings = read_json(path)
        write_json(path, renumber_settings(settings, checkpoint.anatomy, stored(checkpoint, plan), checkpoint.tensors))
    if plan.dropped and (folder / PARAMS).exists():
        write_json(folder / PARAMS, _with_depth(read_json(folder / PARAMS), checkpoint, len(plan.kept)))
    if plan.needs_code or has_own_code(checkpoint.folder, checkpoint.config):
        write_modeling_file(folder, config)
    write_json(folder / RECORD, _record(checkpoint, plan))
    write_json(folder / "config.json", config)
    result = replace(read_checkpoint(folder), stack=checkpoint.stack)
    planned = {name: (tensor.dtype, tensor.shape) for file in files for name, tensor in file.tensors}
    if {name: (tensor.dtype, tensor.shape) for name, tensor in result.tensors.items()} != planned:
        raise ShortcutError(f"{folder} does not hold what was written to it: check the disk")
    return result


def _with_depth(params: dict[str, Any], checkpoint: Checkpoint, depth: int) -> dict[str, Any]:
    """The parameters that other code reads, with the number of blocks that are left."""
    return {**params, "n_layers": depth} if params.get("n_layers") == checkpoint.anatomy.depth else params


def _record(checkpoint: Checkpoint, plan: Plan) -> dict[str, object]:
    """How this checkpoint came about: its plan, and before it the plans that made its base, oldest first."""
    before = read_json(checkpoint.folder / RECORD) if (checkpoint.folder / RECORD).exists() else {}
    lineage = before.get("lineage", [])
    if not isinstance(lineage, list):
        raise ShortcutError(f"{checkpoint.folder / RECORD} is damaged: its lineage is no list")
    lineage = [*lineage, before["plan"]] if "plan" in before else []
    return {"shortcut": FORMAT, "version": __version__, "plan": plan.to_dict(), "lineage": lineage}


def _index(files: tuple[OutputFile, ...]) -> dict[str, object]:
    tensors = [tensor for file in files for _, tensor in file.tensors]
    totals = {
        "total_parameters": sum(tensor.parameters for tensor in tensors),
        "total_size": sum(tensor.size for tensor in tensors),
    }
    weight_map = {name: file.name for file in files for name, _ in file.tensors}
    return {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}
