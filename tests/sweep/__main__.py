"""python -m tests.sweep [model_type ...]: is cutting the files of a checkpoint the same as bypassing its blocks?

For every family and kind of model, and for three sets of blocks, the cut checkpoint has to load whole and give what
the base gives with these blocks bypassed by hooks; of models that write also the greedy continuation, with and without
a cache. Prints a line of JSON for every pair, then a summary. With --out the lines are appended to a file, and pairs
that it holds are not run again.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library is imported

import argparse
import inspect
import json
import logging
import multiprocessing
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import shortcut
from shortcut.common.errors import ShortcutError
from shortcut.common.stacks import Stack
from shortcut.live.blocks import find_blocks
from tests.sweep.tiny import (
    DEPTH,
    FIRST_SPECIAL,
    KINDS,
    SKIPPED,
    VOCABULARY,
    Fields,
    Kind,
    model_types,
    tiny_inputs,
    tiny_model,
)

SETS = ("1,3", "0,4", "5")
SECONDS = 120
TOLERANCE = 1e-4  # of the largest logit, as sums of experts may be reordered
SENSITIVITY = 0.05  # what every block has to change of what the model gives, or a wrong one could pass
GAINS = (None, 0.1, 1.0)  # the spread of weights that is tried, first that which the family is known to need
NEW_TOKENS = 6
SEVERITY = ("exact", "refused", "error", "different")  # a pair is as good as its worst set

# Container paths where more than one list of modules is as long as the decoder.
CONTAINERS = {
    "blt": "model.local_decoder.layers",
    "hrm_text": "model.L_module.layers",
    "vibevoice": "model.language_model.layers",
    "vibevoice_asr": "model.language_model.layers",
    "xlm": "transformer.attentions",
}
# What a block hands to the next one besides the hidden states, by its name among the arguments of the block: what
# comes after the hidden states in a tuple that a bypassed block returns.
CARRIED = {"lilt": ("layout_inputs",), "xlnet": ("output_g",), "zaya": ("prev_router_hidden_states",)}

Record = dict[str, Any]


def main() -> None:
    """Run the pairs that were asked for, one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("model_type", nargs="*", help="families; all without any")
    parser.add_argument("--kind", action="append", help="kinds of models; all without any")
    parser.add_argument("--out", type=Path, help="JSON lines are appended here; pairs already there are left out")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time limit for a pair")
    options = parser.parse_args()
    pairs = [pair for pair in model_types() if not options.model_type or pair[0] in options.model_type]
    pairs = [pair for pair in pairs if not options.kind or pair[1] in options.kind]
    records = []
    for model_type, kind in pairs:
        known = {(record["model_type"], record["kind"]): record for record in read_records(options.out)}
        record = known.get((model_type, kind))
        if record is None:
            record = run_pair(model_type, kind, options.seconds)
            line = json.dumps(record)
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        records.append(record)
    print(summary(records))


def read_records(path: Path | None) -> list[Record]:
    """The lines that earlier runs, or others at the same time, wrote."""
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(records: list[Record]) -> str:
    """Counts by result, and a line for each pair that is not exact."""
    counts = Counter(record["result"] for record in records)
    lines = [f"{len(records)} pairs: " + ", ".join(f"{count} {result}" for result, count in counts.most_common())]
    odd = sorted((r for r in records if r["result"] != "exact"), key=lambda record: record["result"])
    return "\n".join([*lines, *(f"{r['result']:>9} {r['model_type']} ({r['kind']}): {r['why']}" for r in odd)])


def run_pair(model_type: str, kind: Kind, seconds: int) -> Record:
    """The record of one pair, whatever happens in it."""
    start = time.perf_counter()
    record: Record = {"model_type": model_type, "kind": kind, "result": "error", "by_set": {}, "why": ""}
    record |= {"max_abs_diff": None, "sensitivity": None}
    for name in (model_type, f"{model_type} {kind}"):
        if name in SKIPPED:
            return {**record, "result": "skipped", "why": SKIPPED[name], "seconds": 0.0}
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, model_type, kind), daemon=True)
    process.start()
    there.close()
    try:
        record |= here.recv() if here.poll(seconds) else {"why": f"not done after {seconds} s"}
    except EOFError:
        process.join()
        record["why"] = f"the process ended with {process.exitcode}"
    if process.is_alive():
        process.join(5)
        process.kill()
    process.join()
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


def _work(pipe: Connection, model_type: str, kind: Kind) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.utils.logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            pipe.send(compare_pair(model_type, kind, Path(folder)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this pair has to report
        pipe.send({"result": "error", "why": describe(error)})


def describe(error: BaseException) -> str:
    """The last line of a traceback and where it happened, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = "/".join(Path(frame.filename).parts[-2:])
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({where}:{frame.lineno})"


def compare_pair(model_type: str, kind: Kind, folder: Path) -> Record:
    """As `compare`, with weights of another spread where a block changes too little of what the model gives."""
    for number, gain in enumerate(GAINS):
        record = compare(model_type, kind, folder / str(number), gain)
        if record.get("sensitivity") is None or record["sensitivity"] > SENSITIVITY:
            return record
    why = f"a block changes what the model gives by no more than {record['sensitivity']:.2g}"
    return {**record, "result": "error", "why": why}


def compare(model_type: str, kind: Kind, folder: Path, gain: float | None) -> Record:
    """Build, save, cut, reload and compare one family; what is returned goes into its record."""
    model = tiny_model(model_type, kind, gain=gain)
    inputs = tiny_inputs(model, kind)
    model.save_pretrained(folder / "base")
    stack = KINDS[kind][2]
    by_set = {drop: cut_files(folder / "base", folder / drop, drop, stack) for drop in SETS}
    if all(outcome["result"] != "cut" for outcome in by_set.values()):
        return conclude(by_set)
    del model
    base, keys = load(folder / "base", kind)
    if keys is not None:
        return {"result": "error", "by_set": by_set, "why": f"the base itself does not load whole: {keys}"}
    blocks = blocks_of(base, model_type, kind)
    notes: Record = {}
    try:
        found = find_blocks(base, stack)
    except ShortcutError as error:
        notes["find_blocks"] = str(error)
    else:
        if list(found) != list(blocks):
            notes["find_blocks"] = "it takes another list of modules for the blocks"
    carried = CARRIED.get(model_type, ())
    whole = logits(base, inputs, stack)
    changes = []
    for block in range(len(blocks)):
        with bypassed(blocks, [block], carried):
            changes.append((logits(base, inputs, stack) - whole).abs().max().item())
    notes["sensitivity"] = min(changes) / min(1.0, whole.abs().max().item())
    plain = generated(base, inputs)
    for drop, outcome in by_set.items():
        if outcome["result"] == "cut":
            with bypassed(blocks, map(int, drop.split(",")), carried):
                expected = logits(base, inputs, stack)
                continued = generated(base, inputs)
            outcome |= compare_cut(folder / drop, kind, inputs, expected, continued)
    if plain:
        notes["generate"] = "as without a cache" if plain["cache"] == plain["no cache"] else "not as without a cache"
        if isinstance(plain["cache"], str):
            notes["generate"] = plain["cache"]
    return {**conclude(by_set), **notes}


def conclude(by_set: dict[str, Record]) -> Record:
    """The result of a pair from those of its sets."""
    worst = max(by_set.values(), key=lambda outcome: SEVERITY.index(outcome["result"]))
    differences = [outcome["max_abs_diff"] for outcome in by_set.values() if "max_abs_diff" in outcome]
    return {
        "result": worst["result"],
        "by_set": by_set,
        "why": worst.get("why", ""),
        "max_abs_diff": max(differences, default=None),
    }


def cut_files(base: Path, out: Path, drop: str, stack: Stack) -> Record:
    """Cut a checkpoint; the result is "cut" where that worked."""
    try:
        shortcut.cut(base, out, drop=drop, stack=stack, quiet=True)
    except ShortcutError as error:
        return {"result": "refused", "why": str(error)}
    except Exception as error:  # noqa: BLE001 - a defect, which is what the sweep looks for
        return {"result": "error", "why": f"cut: {describe(error)}"}
    return {"result": "cut"}


def compare_cut(folder: Path, kind: Kind, inputs: Fields, expected: Tensor, continued: dict[str, Any]) -> Record:
    """Load a cut checkpoint and compare it with what the base gives with its blocks bypassed."""
    try:
        short, wrong = load(folder, kind)
        actual = logits(short, inputs, KINDS[kind][2])
    except Exception as error:  # noqa: BLE001 - a checkpoint that nothing can load or run is a result
        return {"result": "error", "why": f"cut model: {describe(error)}"}
    difference = (actual - expected).abs().max().item()
    outcome = {"result": "exact", "max_abs_diff": difference}
    if wrong is not None:
        return {**outcome, "result": "different", "why": f"keys: {wrong}"}
    if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
        return {**outcome, "result": "different", "why": f"logits differ by {difference:.3g}"}
    for way, tokens in generated(short, inputs).items():
        if tokens != continued[way]:
            broken = isinstance(tokens, str)
            why = f"generate, {way}: {tokens if broken else 'other tokens than the reference'}"
            return {**outcome, "result": "error" if broken else "different", "why": why}
    return outcome


def load(folder: Path, kind: Kind) -> tuple[Any, str | None]:
    """A model from its files with plain from_pretrained, and what was wrong with its keys."""
    auto = getattr(transformers, KINDS[kind][0])
    options = {"dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = auto.from_pretrained(folder, attn_implementation="eager", **options)
    except (ValueError, TypeError, KeyError):  # families with an attention of their own
        model, info = auto.from_pretrained(folder, **options)
    wrong = {name: len(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    first = next((str(sorted(map(str, info[name]))[0]) for name in wrong), "")
    return model.eval(), f"{wrong}, such as {first}" if wrong else None


def blocks_of(model: Any, model_type: str, kind: Kind) -> nn.ModuleList:
    """The list of blocks, found without shortcut: no other list of modules is as long."""
    if model_type in CONTAINERS:
        return model.get_submodule(CONTAINERS[model_type])
    lists: list[nn.ModuleList] = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    depths = (DEPTH + 1, DEPTH) if KINDS[kind][2] == "encoder" else (DEPTH, DEPTH + 1)  # encoders are deeper
    deep = next(found for depth in depths if (found := [each for each in lists if len(each) == depth]))
    if len(deep) != 1:
        raise LookupError(f"{len(deep)} lists of {len(deep[0])} modules")
    return deep[0]


@contextmanager
def bypassed(blocks: nn.ModuleList, dropped: Iterable[int], carried: tuple[str, ...]) -> Iterator[None]:
    """Blocks run, and what they return is thrown away for what they were given."""

    def hand_on(block: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, tuple | list):
            return hidden
        given = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        passed = [given.get(name) for name in carried]
        return (hidden, *passed, *output[1 + len(passed) :])

    handles = [blocks[i].register_forward_hook(hand_on, with_kwargs=True) for i in dropped]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any, inputs: Fields, stack: Stack) -> Tensor:
    """What a model gives, without a cache: logits, the last states, or the embeddings of one of two towers."""
    torch.manual_seed(3)  # some forwards are random
    cache = {"use_cache": False} if model.can_generate() else {}
    found = model(**inputs, **cache)
    names = ("logits", "last_hidden_state", "image_embeds" if stack == "vision" else "text_embeds")
    return next(found[name] for name in names if found.get(name) is not None)


@torch.no_grad()
def generated(model: Any, inputs: Fields) -> dict[str, Any]:
    """Greedy continuations with and without a cache, where the model writes; instead of each, what was raised."""
    if not model.can_generate():
        return {}

    def attempt(run: Callable[[], Tensor]) -> Any:
        try:
            return run().tolist()
        except Exception as error:  # noqa: BLE001 - many families cannot continue text alone
            return describe(error)

    def run(cache: bool) -> Tensor:
        torch.manual_seed(3)
        return model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            use_cache=cache,
            pad_token_id=0,
            suppress_tokens=[*range(5), *range(FIRST_SPECIAL, VOCABULARY)],
        )

    return {"cache": attempt(lambda: run(True)), "no cache": attempt(lambda: run(False))}


if __name__ == "__main__":
    main()
