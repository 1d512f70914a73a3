"""python -m tests.sweep.halves [architecture ...]: which families can lose halves of blocks, exactly?

For every family that can be walked, the modules of the two halves of its blocks are found by running a tiny model; the
checkpoint is hollowed in three ways, loaded, and compared with the base on which the same plan is carried out live.
Rewrites shortcut/data/halves.json: the architectures that are exact. Prints why others are not.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import json
import sys
import tempfile
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import shortcut
from shortcut.branches import Branches
from shortcut.decoder import Decoder
from shortcut.errors import ShortcutError
from shortcut.live import blocks_path, find_blocks, hidden_input, hidden_output, load_model
from shortcut.modeling import hollowing
from shortcut.modeling.hollowing import Hollowing
from shortcut.records.plan import Plan
from shortcut.surgery.checkpoint import read_checkpoint
from tests.sweep.__main__ import describe, generated, logits
from tests.sweep.tiny import DEPTH, SKIPPED, Fields, Kind, model_types, tiny_inputs, tiny_model

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
    rows: dict[str, Any] = {}
    for family, kind in model_types():
        if family in SKIPPED or (sys.argv[1:] and family not in sys.argv[1:]):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                found = try_family(family, kind, Path(folder))
        except Exception as error:  # noqa: BLE001  (whatever a family does, the next one is tried)
            print(f"{family} {kind}: {describe(error)[:200]}", flush=True)
            continue
        row = asdict(found)
        rows[row.pop("architecture")] = row
    if not sys.argv[1:]:
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
        TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{len(rows)} architectures are exact")


def try_family(family: str, kind: Kind, folder: Path) -> Hollowing:
    """The halves of a family, once its hollow checkpoints were compared; raises where they are not exact."""
    model = tiny_model(family, kind).eval()
    found = find_hollowing(model, kind)
    model.save_pretrained(folder / "base")
    base = read_checkpoint(folder / "base")
    hollowing.read_hollowings = lambda: {found.architecture: found}  # type: ignore[assignment]
    model = load_model(folder / "base")
    inputs = tiny_inputs(model, kind)
    for number, actions in enumerate(MIXTURES):
        plan = Plan.of(base.base, actions)
        try:
            shortcut.cut(folder / "base", folder / f"{number}", plan=plan, verify=True, quiet=True)
        except ShortcutError:  # a block that others depend on; halves may go all the same
            plan = Plan.of(base.base, {block: action for block, action in actions.items() if action != "drop"})
            shortcut.cut(folder / "base", folder / f"{number}", plan=plan, verify=True, quiet=True)
        short = load_model(folder / f"{number}", trust_remote_code=True)
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
    return replace(found, last_token=passes_by(model, find_blocks(model), inputs, folder))


def passes_by(base: Any, blocks: nn.ModuleList, inputs: Fields, folder: Path) -> bool:
    """Whether last-token blocks are what hooks make of them: all tokens but the last get back what went in."""
    plan = Plan.of(read_checkpoint(folder / "base").base, {1: "last-token", 4: "last-token"})

    def restore(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        before, after = hidden_input(args, kwargs), hidden_output(output)
        after = torch.cat([before[:, :-1], after[:, -1:]], dim=1)
        return (after, *output[1:]) if isinstance(output, tuple) else after

    try:
        shortcut.cut(folder / "base", folder / "last", plan=plan, quiet=True)
        short = load_model(folder / "last")
        got, continued = logits(short, inputs)[:, -1], generated(short, inputs)["cache"]
        handles = [blocks[number].register_forward_hook(restore, with_kwargs=True) for number in (1, 4)]
        expected, longer = logits(base, inputs)[:, -1], generated(base, inputs)["cache"]
        for handle in handles:
            handle.remove()
    except Exception as error:  # noqa: BLE001  (whatever a family does, it cannot)
        print(f"{base.config.model_type}: last-token: {describe(error)[:150]}", flush=True)
        return False
    close = (got - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()
    return close and continued == longer and isinstance(longer, list)


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
