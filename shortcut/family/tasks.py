"""What a checkpoint is for: which auto class of transformers loads it, and what such a model gives at its end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shortcut.common.errors import ShortcutError

_OF_TEXT = {"text-generation", "fill-mask", "text-classification", "token-classification", "text2text-generation"}
Gives = Literal["next tokens", "masked tokens", "classes", "states"]


@dataclass(frozen=True)
class Task:
    """An auto class, the table of transformers that names its architectures by family, and what its models give.

    pipeline: what the Hub calls it.
    """

    auto: str
    table: str
    gives: Gives
    pipeline: str

    @property
    def reads(self) -> Literal["text", "anything"]:
        """Whether it is text alone that its models read."""
        return "text" if self.pipeline in _OF_TEXT else "anything"


# Where an architecture stands in several tables, the first of these counts.
TASKS = (
    Task("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "next tokens", "text-generation"),
    Task(
        "AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "next tokens", "image-text-to-text"
    ),
    Task("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "masked tokens", "fill-mask"),
    Task(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "classes",
        "text-classification",
    ),
    Task(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "classes",
        "token-classification",
    ),
    Task(
        "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "next tokens", "text2text-generation"
    ),
    Task(
        "AutoModelForSpeechSeq2Seq",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "next tokens",
        "automatic-speech-recognition",
    ),
    Task("AutoModelForCTC", "MODEL_FOR_CTC_MAPPING_NAMES", "classes", "automatic-speech-recognition"),
    Task(
        "AutoModelForAudioClassification",
        "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
        "classes",
        "audio-classification",
    ),
    Task(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "classes",
        "image-classification",
    ),
    Task(
        "AutoModelForZeroShotImageClassification",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "states",
        "zero-shot-image-classification",
    ),
    Task("AutoModel", "MODEL_MAPPING_NAMES", "states", "feature-extraction"),
)
WRITING, SEEING, MASKED = TASKS[:3]
TRANSLATING = next(task for task in TASKS if task.auto == "AutoModelForSeq2SeqLM")


def check_writes(config: Mapping[str, Any], what: str, *, alone: bool = True) -> None:
    """Raise ShortcutError for a model that does not predict the next token, for what needs that.

    alone: whether a decoder behind an encoder will not do either.
    """
    if (gives := find_task(config).gives) != "next tokens":
        name = (config.get("architectures") or [config.get("model_type")])[0]
        raise ShortcutError(f"{what} needs a model that predicts the next token, and {name} gives {gives}")
    if alone and config.get("is_encoder_decoder"):
        raise ShortcutError(f"{what} is for decoders that stand alone, and {config.get('model_type')} has an encoder")


def find_task(config: Mapping[str, Any]) -> Task:
    """What the content of a config.json says: by its architecture, by the code that comes along, or by its family.

    A family whose models may do several things is taken for one that predicts masked tokens if it can, as encoders do,
    then for one that writes, then for one that sees; one with encoder and decoder for one that writes of what it reads.
    """
    from transformers.models.auto import modeling_auto

    family, architecture = config.get("model_type"), (config.get("architectures") or [None])[0]
    tasks = [task for task in TASKS if task is not MASKED or not config.get("is_encoder_decoder")]  # BART is in both
    named = {task: getattr(modeling_auto, task.table).get(family) for task in tasks}
    for task, names in named.items():
        if architecture is not None and architecture in (names if isinstance(names, tuple) else (names,)):
            return task
    own = config.get("auto_map") or {}
    for task in (SEEING, WRITING, *TASKS[2:]):
        code = str(own.get(task.auto, "")).rpartition(".")[2]
        if code and (task in (SEEING, WRITING) or architecture in (None, code)):
            return task
    encodes = architecture is None and not config.get("is_decoder")
    guesses = (MASKED, WRITING, SEEING) if encodes else (WRITING, SEEING)
    guesses = (TRANSLATING, *guesses) if config.get("is_encoder_decoder") else guesses
    return next((task for task in guesses if named.get(task) is not None), WRITING)
