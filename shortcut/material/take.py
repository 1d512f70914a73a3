"""Text for a checkpoint, or questions about images: taken from where the user says."""

from dataclasses import replace
from typing import TYPE_CHECKING

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.family.anatomy import sees_images, visual_tokens
from shortcut.family.tasks import find_task
from shortcut.material.documents import Source
from shortcut.options.groups import Text

if TYPE_CHECKING:
    from shortcut.material.pictures import Material

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

    images: whether there have to be any; fewer: whether fewer samples will do, where there are no more. Raises
    ShortcutError as `make_calibration` and `make_pictures` do.
    """
    from shortcut.live.load import load_processor, load_tokenizer
    from shortcut.material.calibration import make_calibration
    from shortcut.material.pictures import holds_images, make_pictures

    source = Source(text.data, text.split, text.column, text.chat_template)
    if images or (sees_images(checkpoint.config) and holds_images(source)):
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


def take_unseen(
    checkpoint: Checkpoint, text: Text, heldout: str, *, images: bool, trust_remote_code: bool
) -> "Material":
    """The text, or the questions about images, that a result is compared with its base on: always the same."""
    text = replace(text, data=heldout, seed=0, length=min(text.length, HELDOUT_LENGTH), by_document=False)
    samples = HELDOUT_SAMPLES["images" if images else "text"]
    return take_text(checkpoint, text, samples, images=images, trust_remote_code=trust_remote_code)
