"""The options of healing, as `groups.py` has those of the rest."""

from dataclasses import dataclass
from typing import Annotated

from shortcut.records.methods import Tune


@dataclass(frozen=True, kw_only=True)
class Own:
    """Healing"""

    own: Annotated[
        int | None,
        "how many sequences of --length tokens the base writes itself, to learn from beside --data; once for a base; "
        "as many as of --data if not given, but 32 at most",
    ] = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """Training"""

    minutes: Annotated[float | None, "how long to train at most, looks at text set aside included"] = None
    bf16: Annotated[bool, "train in bfloat16 arithmetic, several times as fast where the processor has it"] = False
    learning_rate: Annotated[
        float, "the highest one: it rises in the first twentieth of the budget and falls as a cosine"
    ] = 5e-4
    full: Annotated[bool, "train projections whole, rather than by low-rank changes"] = False


@dataclass(frozen=True, kw_only=True)
class TrainingInDetail(Training):
    """Training"""

    tokens: Annotated[int | None, "how many tokens to train on at most"] = None
    epochs: Annotated[float, "how often to go through the text, where neither minutes nor tokens are given"] = 1.0
    rank: Annotated[int, "of low-rank changes"] = 32
    alpha: Annotated[float | None, "the scale of low-rank changes, over their rank; twice the rank if not given"] = None
    dropout: Annotated[float, "share of what goes into low-rank changes that is dropped while training"] = 0.0
    tune: Annotated[Tune, "the projections to train: all of a block, or those of one half"] = "all"
    temperature: Annotated[float, "by which the predictions of both models are softened before they are compared"] = 1.0
    match: Annotated[
        float, "weight of the distance between both models' states behind every cut, added to the loss"
    ] = 0.0
    top_k: Annotated[
        int,
        "how many likeliest tokens of the base's predictions count, noted on the disk beforehand; 0: all of them, made "
        "anew each time",
    ] = 0
    accumulate: Annotated[int, "forward passes per step"] = 1
    patience: Annotated[int, "looks at the text set aside without gain, of ten in all, after which training ends"] = 3
    gradient_checkpointing: Annotated[
        bool, "less memory for more time: what blocks compute is forgotten and computed again"
    ] = False
    keep_adapter: Annotated[bool, "write the low-rank changes into OUT/adapter as well, for PEFT, on top of SHORT"] = (
        False
    )
