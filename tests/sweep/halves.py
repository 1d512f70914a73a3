"""python -m tests.sweep.halves [family ...]: which families can lose halves of blocks, exactly?

For every family that can be walked, the modules of the two halves of its blocks are found by running a tiny model; the
checkpoint is hollowed in three ways, loaded, and compared with the base on which the same plan is carried out live.
Rewrites shortcut/data/halves.json, or the rows of these families: the architectures that are exact. Prints why others
are not.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import shortcut
from shortcut.checkpoint.checkpoint import read_checkpoint
from shortcut.common.errors import ShortcutError
from shortcut.family import halves
from shortcut.family.anatomy import visual_tokens
from shortcut.family.halves import Hollowing
from shortcut.live.blocks import blocks_path, find_blocks, hidden_input, hidden_output
from shortcut.live.branches import Branches
from shortcut.live.decoder import Decoder
from shortcut.live.load import load_model
from shortcut.options.groups import Loading
from shortcut.records.plan import Plan
from shortcut.surgery.hollow import WITHOUT_KEYS
from tests.sweep.__main__ import describe, generated, logits
from tests.sweep.tiny import DEPTH, SKIPPED, WRITING, Fields, Kind, model_types, tiny_inputs, tiny_model

TRUSTING = Loading(trust_remote_code=True)
TABLE = Path(shortcut.__file__).parent / "data" / "halves.json"
MIXTURES: tuple[dict[int, Any], ...] = (
    {0: "mlp-only", 2: "attention-only", 4: "drop"},
    {1: "attention-only", 3: "mlp-only", 5: "mlp-only"},
    {0: "attention-only", 5: "attention-only"},
)
TOLERANCE = 1e-4  # of the largest logit, as sums of experts may be reordered
TASKS = {"causal": "AutoModelForCausalLM", "image-text": "AutoModelForImageTextToText"}


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    known = json.loads(TABLE.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    for family, kind in (pair for pair in model_types() if pair[1] in WRITING):
        if sys.argv[1:] and family not in sys.argv[1:]:
            continue
        if {family, f"{family} {kind}"} & SKIPPED.keys():  # what an earlier release showed of it stands
            rows += [row for row in known if (row["family"], row["auto"]) == (family, TASKS[kind])]
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = try_family(family, kind, Path(folder))
        except Exception as error:  # noqa: BLE001  (whatever a family does, the next one is tried)
            print(f"{family} {kind}: {describe(error)[:200]}", flush=True)
            continue
        rows.append(asdict(found))
    if sys.argv[1:]:
        rows += [row for row in known if row["family"] not in sys.argv[1:]]
    own = {(row["architecture"], row["family"]): json.dumps(row) for row in rows}  # of two kinds, the one that sees
    TABLE.write_text("[\n" + ",\n".join(line for _, line in sorted(own.items())) + "\n]\n", encoding="utf-8")
    print(f"{len(own)} architectures are exact")


def try_family(family: str, kind: Kind, folder: Path) -> Hollowing:
    """The halves of a family, once its hollow checkpoints were compared; raises where they are not exact."""
    model = tiny_model(family, kind).eval()
    found = find_hollowing(model, kind)
    model.save_pretrained(folder / "base")
    base = read_checkpoint(folder / "base")
    halves.read_hollowings = lambda: {(found.family, found.architecture): found}  # type: ignore[assignment]
    model = load_model(folder / "base")
    inputs = tiny_inputs(model, kind)
    writes = {way for way, tokens in generated(model, inputs).items() if isinstance(tokens, list)}
    for number, actions in enumerate(MIXTURES):
        plan = Plan.of(base.base, actions)
        try:
            shortcut.cut(folder / "base", folder / f"{number}", plan=plan, verify=True, quiet=True)
        except ShortcutError:  # a block that others depend on; halves may go all the same
            plan = Plan.of(base.base, {block: action for block, action in actions.items() if action != "drop"})
            shortcut.cut(folder / "base", folder / f"{number}", plan=plan, verify=True, quiet=True)
        short = load_model(folder / f"{number}", TRUSTING)
        before = logits(model, inputs)
        with shortcut.preview(model, plan):
            expected, continued = logits(model, inputs), generated(model, inputs)
        got = logits(short, inputs)
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE * expected.abs().max().item():
            raise ValueError(f"mixture {number}: logits differ by {difference:.3g}")
        if not (before - expected).abs().max().item() > 0.01 * before.abs().max().item():
            raise ValueError(f"mixture {number}: what goes does not matter")
        if generated(short, inputs) != continued:
            raise ValueError(f"mixture {number}: another continuation")
        if broken := [tokens for way, tokens in continued.items() if way in writes and isinstance(tokens, str)]:
            raise ValueError(f"mixture {number}: it no longer writes: {broken[0]}")
    last_token, freezes = (
        passes_by(model, inputs, folder),
        kind == "image-text" and leaves_images(model, inputs, folder),
    )
    return replace(found, last_token=last_token, freezes=freezes)


def passes_by(base: Any, inputs: Fields, folder: Path) -> bool:
    """Whether last-token blocks are what hooks make of them: all tokens but the last get back what went in."""
    actions = dict.fromkeys((1, 4), "last-token")
    return _is_defined(base, inputs, folder / "last", actions, lambda ids: torch.arange(ids.shape[1], 0, -1)[None] > 1)


def leaves_images(base: Any, inputs: Fields, folder: Path) -> bool:
    """Whether frozen blocks are what hooks make of them: the tokens of images get back what went in."""
    kinds = getattr(base.config.get_text_config(decoder=True), "layer_types", None) or [""] * DEPTH
    blocks = [block for block in (1, 2, 4) if kinds[block] not in WITHOUT_KEYS]
    try:
        seen = torch.tensor(visual_tokens(base.config.to_dict()))
    except ShortcutError as error:
        print(f"{base.config.model_type}: freeze-visual: {error}", flush=True)
        return False
    ids = inputs["input_ids"].clone()
    ids[0, 2:6] = ids[1, 5:7] = seen[0]
    actions = dict.fromkeys(blocks, "freeze-visual")
    return _is_defined(
        base, {**inputs, "input_ids": ids}, folder / "frozen", actions, lambda ids: torch.isin(ids, seen)
    )


def _is_defined(
    base: Any, inputs: Fields, folder: Path, actions: dict[int, Any], frozen: Callable[[torch.Tensor], torch.Tensor]
) -> bool:
    """Whether a checkpoint is its base in which these blocks give frozen tokens of a prompt back what went in."""
    plan, now = Plan.of(read_checkpoint(folder.parent / "base").base, actions), {}

    def look(_: Any, args: Any, kwargs: Any) -> None:
        now["ids"] = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    def restore(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if now["ids"].shape[1] == 1:
            return output
        after = torch.where(frozen(now["ids"])[..., None], hidden_input(args, kwargs), hidden_output(output))
        return (after, *output[1:]) if isinstance(output, tuple) else after

    name = f"{base.config.model_type}: {folder.name}"
    try:
        shortcut.cut(folder.parent / "base", folder, plan=plan, quiet=True)
        short = load_model(folder, TRUSTING)  # its file is not on record yet
        got, continued = logits(short, inputs), generated(short, inputs)["cache"]
        handles = [base.register_forward_pre_hook(look, with_kwargs=True)]
        handles += [find_blocks(base)[block].register_forward_hook(restore, with_kwargs=True) for block in actions]
        try:
            expected, longer = logits(base, inputs), generated(base, inputs)["cache"]
        finally:
            for handle in handles:
                handle.remove()
    except Exception as error:  # noqa: BLE001  (whatever a family does, it cannot)
        print(f"{name}: {describe(error)[:150]}", flush=True)
        return False
    running = ~frozen(inputs["input_ids"]).expand(expected.shape[:2])
    difference = (got - expected).abs()[running].max().item()
    exact = difference <= TOLERANCE * expected.abs().max().item() and continued == longer and isinstance(longer, list)
    if not exact:
        print(f"{name}: logits differ by {difference:.3g}; continued as {str(continued)[:80]}", flush=True)
    return exact


def find_hollowing(model: Any, kind: Kind) -> Hollowing:
    """Which modules of the blocks of a live model belong to which half."""
    decoder = Decoder.of(model)
    branches = [decoder.branches(number) for number in range(DEPTH)]
    kept = {name for own in branches for name, _ in own.block.named_children()}
    attention, mlp = (_values(branches, half) for half in ("attention", "mlp"))
    return Hollowing(
        architecture=type(model).__name__,
        family=model.config.model_type,
        config=type(model.config).__name__,
        auto=TASKS[kind],
        blocks=blocks_path(model),
        attention=attention,
        mlp=mlp,
        kept=tuple(sorted(kept - attention.keys() - mlp.keys())),
        last_token=True,
        freezes=True,
    )


def _values(branches: list[Branches], half: Any) -> dict[str, Any]:
    found: dict[str, dict[str, int]] = {}
    for own in branches:
        for name in own.modules[half]:
            kind = type(own.block.get_submodule(name)).__name__
            if found.setdefault(name, {}).setdefault(kind, own.forms[name] or 0) != (own.forms[name] or 0):
                raise ValueError(f"{name} returns now one value and now several")
    return {
        name: kinds if len(set(kinds.values())) > 1 else next(iter(kinds.values())) for name, kinds in found.items()
    }


if __name__ == "__main__":
    main()
