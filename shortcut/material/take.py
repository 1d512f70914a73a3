"""Text for a checkpoint, or questions about images: taken from where the user says."""

from dataclasses import replace
from typing import TYPE_CHECKING

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.family.anatomy import sees_images, visual_tokens
from shortcut.family.tasks import find_task
from shortcut.material.documents import Source
from shortcut.options.groups import Text

if TYPE_CHECKING:
    from shortcut.material.examples import Examples, Material

# When a result is checked: sequences of text, or questions about images; and tokens of a sequence at most.
HELDOUT_SAMPLES = {"text": 16, "images": 64}
HELDOUT_LENGTH = 512


def take_text(
    checkpoint: Checkpoint,
    text: Text,
    samples: int,
    *,
    trust_remote_code: bool,
    images: bool = False,
    fewer: bool = False,
) -> "Material":
    """Tokenise text for a checkpoint, or questions about images, where the source has images and the model sees them.

    images: whether there have to be any; fewer: whether fewer samples will do, where there are no more. Of models that
    read other things than plain text, examples of what they read. Raises ShortcutError as `make_calibration`,
    `make_pictures` and `make_examples` do.
    """
    from shortcut.live.load import load_processor, load_tokenizer
    from shortcut.material.calibration import make_calibration
    from shortcut.material.pictures import holds_images, make_pictures

    source = Source(text.data, text.split, text.column, text.chat_template)
    if examples := _take_examples(checkpoint, source, text, samples, trust_remote_code=trust_remote_code, fewer=fewer):
        return examples
    if images or checkpoint.stack == "vision" or (sees_images(checkpoint.config) and holds_images(source)):
        visual = visual_tokens(checkpoint.config)
        processor = load_processor(checkpoint.folder, trust_remote_code=trust_remote_code)
        return make_pictures(processor, visual, source, samples=samples, seed=text.seed, fewer=fewer)
    return make_calibration(
        load_tokenizer(checkpoint.folder, trust_remote_code=trust_remote_code),
        source,
        samples=samples,
        length=text.length,
        seed=text.seed,
        by_document=text.by_document,
        fewer=fewer,
        framed=find_task(checkpoint.config).gives != "next tokens",
    )


def _take_examples(
    checkpoint: Checkpoint, source: Source, text: Text, samples: int, *, trust_remote_code: bool, fewer: bool
) -> "Examples | None":
    """Examples of what a model reads; None for those that do with plain text, or see images beside it."""
    from shortcut.live.load import load_config, load_reader, modalities, start_token
    from shortcut.material.examples import make_examples

    if "auto_map" in checkpoint.config or sees_images(checkpoint.config):
        return None
    config = load_config(checkpoint.config)
    read = modalities(config)
    towers = find_task(checkpoint.config).gives == "states" and hasattr(config, "text_config")
    if "text" in read and not config.is_encoder_decoder and not towers:
        return None
    reader = load_reader(checkpoint.folder, read, trust_remote_code=trust_remote_code)
    start = start_token(checkpoint.folder, config)
    return make_examples(reader, read, start, source, samples=samples, length=text.length, seed=text.seed, fewer=fewer)


def take_unseen(
    checkpoint: Checkpoint, text: Text, heldout: str, *, images: bool, trust_remote_code: bool
) -> "Material":
    """The text, or the questions about images, that a result is compared with its base on: always the same."""
    text = replace(text, data=heldout, seed=0, length=min(text.length, HELDOUT_LENGTH), by_document=False)
    samples = HELDOUT_SAMPLES["images" if images else "text"]
    return take_text(checkpoint, text, samples, images=images, trust_remote_code=trust_remote_code)
