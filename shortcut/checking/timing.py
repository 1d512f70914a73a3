"""How fast a model is, and what memory it takes, beside its base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from shortcut.common.text import format_size, format_table
from shortcut.common.version import __version__

if TYPE_CHECKING:
    from shortcut.checking.speed import Run, Work

MEMORY = {  # how it is measured
    "cuda": "what torch's allocator held at most in a run, without the other model",
    "cpu": "resident at most while a process of its own runs it once, beyond what it held without weights",
}


@dataclass(frozen=True)
class Spread:
    """The median over the runs that count, and the lowest and the highest of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Kind:
    """How a figure is called and printed, and whether more of it is better; ideal: the arithmetic that it follows."""

    name: str
    form: Callable[[float], str]
    more_is_better: bool | None = False
    ideal: str | None = None


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.4g}"


KINDS: dict[str, Kind] = {
    "prompt_seconds": Kind("prompt, ms", _milliseconds, ideal="prompt"),
    "prompt_tokens_per_second": Kind("prompt tokens/s", "{:.4g}".format, True, "prompt"),
    "first_token_seconds": Kind("first token, ms", _milliseconds, ideal="prompt"),
    "new_token_seconds": Kind("each token behind it, ms", _milliseconds, ideal="new tokens"),
    "new_tokens_per_second": Kind("new tokens/s behind it", "{:.4g}".format, True, "new tokens"),
    "throughput": Kind("new tokens/s of whole runs", "{:.4g}".format, True),
    "memory_bytes": Kind("memory", format_size),
    "cache_bytes_per_token": Kind("cache per token", format_size),
    "gpu_busy": Kind("GPU busy", "{:.0%}".format, None),
}


@dataclass(frozen=True)
class Timing:
    """What was measured of a model, and behind it of its base where there is one.

    figures: by the keys of `KINDS`, one dict per model; operations: floating point operations of a run by its parts,
    None where they cannot be counted; settings: all that is needed to repeat it.
    """

    models: tuple[str, ...]
    figures: tuple[Mapping[str, Spread], ...]
    operations: tuple[Mapping[str, int] | None, ...]
    settings: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """The name of the base."""
        return self.models[1] if len(self.models) > 1 else None

    def ratio(self, key: str) -> float | None:
        """How many times as fast as the base the model is, or as small, by the medians; None without a base."""
        more_is_better = KINDS[key].more_is_better
        if self.base is None or more_is_better is None:
            return None
        model, base = (figures[key].median for figures in self.figures)
        return model / base if more_is_better else base / model if model else None

    def ideal(self, key: str) -> float | None:
        """The ratio that is to be expected if time went by floating point operations alone."""
        part = KINDS[key].ideal
        if self.base is None or part is None or self.operations[0] is None or self.operations[1] is None:
            return None
        return self.operations[1][part] / self.operations[0][part]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json and --out."""
        rows: dict[str, dict[str, Any]] = {}
        for key in self.figures[0]:
            rows[key] = {"model": asdict(self.figures[0][key])}
            if self.base is not None:
                rows[key] |= {"base": asdict(self.figures[1][key])}
                rows[key] |= {"ratio": self.ratio(key), "ideal": self.ideal(key)}
        operations = dict(zip(("model", "base"), self.operations, strict=False))
        names = {"model": self.models[0], "base": self.base}
        return {**names, "figures": rows, "operations": operations, "settings": dict(self.settings)}

    def __str__(self) -> str:
        order = (1, 0) if self.base is not None else (0,)
        heads, rows = [("model", "base")[place] for place in order], []
        for key in self.figures[0]:
            cells = [cell for place in order for cell in _cells(KINDS[key].form, self.figures[place][key])]
            ratios = [self.ratio(key), self.ideal(key)] if self.base is not None else []
            rows.append([KINDS[key].name, *cells, *("" if each is None else f"{each:.3g}" for each in ratios)])
        titles = [title for head in heads for title in (head, "lowest - highest")]
        table = format_table(["", *titles, *(["ratio", "ideal"] if self.base is not None else [])], rows)
        lines = [f"{head:5} {self.models[place]}" for head, place in zip(heads, order, strict=True)]
        return "\n".join([*lines, "", table, "", *self._notes()])

    def _notes(self) -> list[str]:
        had = self.settings
        much = f"{had['batch_size']} x {had['prompt']} tokens of prompt, {had['new_tokens']} new ones each"
        notes = [f"medians of {had['runs']} runs after {had['warm_up']} that do not count: {much}; {had['device']}"]
        if "memory_bytes" in self.figures[0]:
            notes.append(f"memory: {had['memory']}")
        if self.base is not None:
            notes.append("ratio: how many times as fast, or as small, as the base; ideal: by the arithmetic that runs")
        return notes


def _cells(form: Callable[[float], str], spread: Spread) -> list[str]:
    """The median, and the range where there is one."""
    same = spread.low == spread.high
    return [form(spread.median), "" if same else f"{form(spread.low)} - {form(spread.high)}"]


def figures_of(runs: "Sequence[Run]", work: "Work", footprint: int | None) -> dict[str, Spread]:
    """What is known of a model, by the keys of `KINDS`. footprint: its memory on a CPU, where that was measured."""
    later = work.new_tokens - 1
    found: dict[str, list[float | None]] = {
        "prompt_seconds": [run.prefill for run in runs],
        "prompt_tokens_per_second": [work.batch_size * work.prompt / run.prefill for run in runs],
        "first_token_seconds": [run.first for run in runs],
        "new_token_seconds": [run.decode / later for run in runs],
        "new_tokens_per_second": [work.batch_size * later / run.decode for run in runs],
        "throughput": [work.batch_size * work.new_tokens / (run.first + run.decode) for run in runs],
        "memory_bytes": [footprint if run.memory is None else run.memory for run in runs],
        "cache_bytes_per_token": [run.cache / work.cached for run in runs],
        "gpu_busy": [run.use for run in runs],
    }
    known = {key: [value for value in values if value is not None] for key, values in found.items()}
    return {key: Spread(median(values), min(values), max(values)) for key, values in known.items() if values}


def parts_of(operations: tuple[int, int] | None) -> dict[str, int] | None:
    """Operations by the parts of a run."""
    if operations is None or not all(operations):
        return None
    return dict(zip(("prompt", "new tokens"), operations, strict=True))


def surroundings_of(models: Sequence[Any]) -> dict[str, Any]:
    """What the figures depend on beside the options."""
    import torch
    import transformers

    device = models[0].device
    return {
        "dtypes": [str(model.dtype).removeprefix("torch.") for model in models],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "memory": MEMORY.get(device.type),
        "versions": {"shortcut": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
