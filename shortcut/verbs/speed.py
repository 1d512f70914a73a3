"""`speed`: how fast a model is, and what memory it takes, beside its base."""

import json
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Annotated

from shortcut.checking.timing import Timing, figures_of, parts_of, surroundings_of
from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_model
from shortcut.checkpoint.stage import write_text
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.family.anatomy import text_config
from shortcut.family.tasks import check_writes
from shortcut.options.groups import Loading, Model, OutFile, Revision, Running
from shortcut.options.presets import SPEED_PRESETS, SpeedPresetName
from shortcut.options.verb import verb
from shortcut.publish.plots import check_files

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class SpeedOptions(Running, Revision, OutFile):
    """What is timed"""

    model: Model
    _: KW_ONLY
    base: Annotated[str | None, "a model to be timed in turn with MODEL, such as the one that was cut"] = None
    preset: Annotated[SpeedPresetName | None, "how published figures were timed; what is given beside it wins"] = None
    prompt: Annotated[int, "how many tokens a prompt has"] = 256
    new_tokens: Annotated[int, "so many are made, whatever they say"] = 32
    batch_size: int = 1
    runs: Annotated[int, "how many runs of every model count"] = 10
    warm_up: Annotated[int, "how many runs of every model come first and do not count"] = 2
    seed: Annotated[int, "which tokens a prompt is made of"] = 0


@verb(SpeedOptions, first="base prompt new_tokens", example="shorter --base org/model", presets=SPEED_PRESETS)
def speed(asked: SpeedOptions) -> Timing:
    """Time a model: prompts, the first token and those behind it, alone or in batches, and the memory it takes.

    Prompts are random tokens, and as many new tokens come as asked for. With --base both models are in memory and run
    in turn; beside the measured ratio stands the one that the arithmetic of both would give. --out keeps all figures
    and settings as JSON. Fails where a run is longer than the positions that a model has.
    """
    from shortcut.checking.footprint import measure_footprint
    from shortcut.checking.operations import count_operations
    from shortcut.checking.speed import Work, time_runs
    from shortcut.live.load import load_model, pick_device, pick_dtype

    where = pick_device(asked.device)
    pick_dtype(asked.dtype, where)
    how = Loading(device=str(where), dtype=asked.dtype, trust_remote_code=asked.trust_remote_code)
    check_files(asked.out, None)
    _check_numbers(asked)
    checkpoints = [open_model(asked.model, asked.revision, quiet=asked.quiet)]
    checkpoints += [open_model(asked.base, quiet=asked.quiet)] if asked.base else []
    for each in checkpoints:
        check_writes(each.config, "speed")
        _check_positions(each, asked.prompt, asked.new_tokens)
    work = Work(asked.prompt, asked.new_tokens, asked.batch_size, asked.seed)
    footprints: list[int | None] = [None for _ in checkpoints]
    if where.type == "cpu":  # before any of them is in memory here
        say("measuring memory, each model in a process of its own", quiet=asked.quiet)
        footprints = [measure_footprint(each.folder, work, how) for each in checkpoints]
    say("loading", quiet=asked.quiet)
    models = [load_model(each.folder, how) for each in checkpoints]
    operations = [count_operations(each, work) for each in models]
    timed = time_runs(models, work, runs=asked.runs, warm_up=asked.warm_up, quiet=asked.quiet)
    names, revisions = tuple(each.name for each in checkpoints), [each.revision for each in checkpoints]
    figures = tuple(figures_of(own, work, held) for own, held in zip(timed, footprints, strict=True))
    settings = {"preset": asked.preset, "revisions": revisions, **asdict(work), "runs": asked.runs}
    settings |= {"warm_up": asked.warm_up, **asdict(how), **surroundings_of(models)}
    result = Timing(names, figures, tuple(map(parts_of, operations)), settings)
    if asked.out is not None:
        write_text(asked.out, json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return result


def _check_numbers(asked: SpeedOptions) -> None:
    """Raise ShortcutError for a number that is too small."""
    given = (asked.prompt, asked.new_tokens, asked.batch_size, asked.runs, asked.warm_up)
    for name, number in zip(("prompt", "new_tokens", "batch_size", "runs", "warm_up"), given, strict=True):
        least = {"warm_up": 0, "new_tokens": 2}.get(name, 1)
        if number < least:
            why = ", the first of which comes with the prompt" if name == "new_tokens" else ""
            raise ShortcutError(f"--{name.replace('_', '-')} {number} is too few: at least {least}{why}")


def _check_positions(checkpoint: Checkpoint, prompt: int, new_tokens: int) -> None:
    """Raise ShortcutError where a run is longer than what a model was made for."""
    _, text = text_config(checkpoint.config)
    limit = next((text[name] for name in POSITIONS if isinstance(text.get(name), int)), None)
    if limit is not None and prompt + new_tokens > limit:
        asked = f"--prompt {prompt} and --new-tokens {new_tokens}"
        raise ShortcutError(f"{asked} are {prompt + new_tokens} tokens: {checkpoint.name} has {limit} positions")
