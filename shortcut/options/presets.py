"""Presets: published methods, each a row of values for options that are there anyway.

A row holds the rule; text is never in it. What a publication was scored on is in recipes/.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shortcut.common.errors import ShortcutError

PresetName = Literal[
    "shortgpt",
    "shortx",
    "deeper-layers",
    "shortened-llama",
    "short-transformers",
    "sleb",
    "distilbert",
    "distil-whisper",
]
SuiteName = Literal["shortened-llama", "shortgpt"]


@dataclass(frozen=True)
class Preset:
    """A published method: options by name, where it comes from, and what goes by it."""

    options: Mapping[str, str | float]
    source: str
    why: str


PRESETS: dict[PresetName, Preset] = {
    # Its sums over windows of one length rank blocks as means over tokens do. Sequences: the tool's.
    "shortgpt": Preset(
        {"metric": "block-influence", "select": "lowest", "average": "tokens"},
        "arXiv:2403.03853",
        "the blocks that turn the stream least",
    ),
    # A mean of the means of texts of different lengths (--by-document): of one length it is ShortGPT's. Sequences: the
    # tool's. Its kl is for vision models.
    "shortx": Preset(
        {"metric": "block-influence", "select": "lowest", "average": "sequences"},
        "github.com/icip-cas/ShortX",
        "the same, every text counting the same however short",
    ),
    # Its simple heuristic is --select deepest. Sequences: the tool's.
    "deeper-layers": Preset(
        {"metric": "angular", "select": "span"},
        "arXiv:2403.17887",
        "the span that turns the last token of a sequence least",
    ),
    # 10 sequences of 128 tokens are the defaults of its scripts. Its other criterion is --metric taylor.
    "shortened-llama": Preset(
        {
            "metric": "perplexity",
            "select": "lowest",
            "protect": "plus",
            "average": "tokens",
            "samples": 10,
            "length": 128,
        },
        "arXiv:2402.02834",
        "the blocks without which text is predicted best, but the first four and the last two",
    ),
    # Its averaged metric; by default it looks at the last token only, which is deeper-layers. Its search gives the
    # start of the best span of one block more than asked for, in release 1.0.0: not reproduced. Sequences: the tool's.
    "short-transformers": Preset(
        {"metric": "angular-all", "select": "span", "average": "sequences"},
        "github.com/melisa-writer/short-transformers",
        "the span that turns all tokens least",
    ),
    # Its code also spares the first and the last block: of 32, --protect 0,31. Sequences: the tool's.
    "sleb": Preset(
        {"metric": "perplexity", "select": "greedy", "average": "tokens"},
        "arXiv:2402.09025",
        "one by one, the block without which the rest predicts text best",
    ),
    # Those that a student starts with, which then learns from the whole model.
    "distilbert": Preset({"keep": "every-second"}, "arXiv:1910.01108", "every second block"),
    "distil-whisper": Preset(
        {"keep": "first-and-last"}, "arXiv:2311.00430", "all blocks of the decoder but the first and the last"
    ),
}
# What published figures are of: tasks of lm-evaluation-harness, and the metric that counts of each.
SUITES: dict[SuiteName, Preset] = {
    # Its perplexities are of the test set of WikiText-2, joined by blank lines: a file to be named with --data.
    "shortened-llama": Preset(
        {
            "tasks": "boolq,piqa,hellaswag:acc_norm,winogrande,arc_easy,arc_challenge:acc_norm,openbookqa:acc_norm",
            "length": 128,
        },
        "arXiv:2402.02834",
        "seven tasks without examples, their plain mean, and perplexity in windows of 128 tokens",
    ),
    # The other tasks of its average were run by OpenCompass, with prompts of its own.
    "shortgpt": Preset({"tasks": "mmlu", "shots": 5}, "arXiv:2403.03853", "MMLU with five examples"),
}


HealPresetName = Literal["shortened-llama", "deeper-layers"]
HEAL_PRESETS: dict[HealPresetName, Preset] = {
    # 64 sequences a step; its text is alpaca-cleaned.
    "shortened-llama": Preset(
        {
            "method": "lora",
            "rank": 8,
            "alpha": 16,
            "dropout": 0.05,
            "learning_rate": 1e-4,
            "batch_size": 16,
            "accumulate": 4,
            "samples": 51760,
            "length": 256,
            "by_document": True,
            "epochs": 2,
        },
        "arXiv:2402.02834",
        "low-rank changes to all projections",
    ),
    # 5000 steps of 16 sequences; ranks from 2 to 64 by model; its weights were quantised, and its text is C4.
    "deeper-layers": Preset(
        {
            "method": "lora",
            "tune": "mlp",
            "rank": 64,
            "alpha": 64,
            "dropout": 0.05,
            "learning_rate": 3e-4,
            "batch_size": 4,
            "accumulate": 4,
            "samples": 80000,
            "length": 2048,
            "tokens": 5000 * 16 * 2048,
        },
        "arXiv:2403.17887",
        "low-rank changes to MLPs alone",
    ),
}


SpeedPresetName = Literal["shortened-llama"]
SPEED_PRESETS: dict[SpeedPresetName, Preset] = {
    # Its prompts are one of 12 tokens, repeated; it draws the next token at random, and also writes 512.
    "shortened-llama": Preset(
        {"prompt": 12, "new_tokens": 128, "runs": 20, "warm_up": 10},
        "arXiv:2402.02834",
        "128 new tokens behind a short prompt, 20 runs after 10",
    ),
}


def with_preset(
    given: Mapping[str, Any], known: Collection[str], presets: Mapping[Any, Preset]
) -> Mapping[str, str | float]:
    """The options that the preset among them gives to a verb; none without one.

    given: what the verb is called with; known: the options that it has. Raises ShortcutError for an unknown preset, for
    one that lacks the number of blocks to leave out one by one, and for one that says nothing of what the verb does.
    """
    name = given.get("preset")
    if name is None or not presets:
        return {}
    if name not in presets:
        raise ShortcutError(f"unknown preset {name!r}: there are {', '.join(presets)}")
    options = presets[name].options
    if options.get("select") == "greedy" and "greedy" in known and not given.get("greedy"):
        raise ShortcutError(f"the preset {name} leaves blocks out one by one: say how many with --greedy N")
    found = {option: value for option, value in options.items() if option in known}
    if not found:
        raise ShortcutError(f"the preset {name} is not for this command: all it says is {', '.join(options)}")
    return found
