"""`inspect`: what a model is made of."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from shortcut.checkpoint.open import open_model
from shortcut.common.errors import ShortcutError
from shortcut.family.anatomy import text_config, visual_tokens
from shortcut.options.groups import Model, Quiet, Stacked
from shortcut.options.verb import verb
from shortcut.records.block_lists import parse_blocks
from shortcut.surgery.inspection import Inspection, inspect_checkpoint
from shortcut.surgery.savings import prefill


@dataclass(frozen=True)
class InspectOptions(Stacked, Quiet):
    """A prompt with images"""

    model: Model
    _: KW_ONLY
    frozen: Annotated[
        str | None, "blocks that would leave the tokens of images as they are, to see what that saves"
    ] = None
    text_tokens: Annotated[int, "tokens of a prompt that are text"] = 64
    visual_tokens: Annotated[int, "tokens of a prompt that stand for parts of images"] = 576


@verb(InspectOptions, example="org/model")
def inspect(asked: InspectOptions) -> Inspection:
    """Show the blocks of a model, their parameters and bytes, and what can be done to it.

    Reads headers and config only; of a model on the Hub nothing else is fetched. --frozen says what a prompt with
    images takes with these blocks frozen. Fails where the weights and the config do not tell which blocks there are.
    """
    checkpoint = open_model(asked.model, asked.revision, stack=asked.stack, weights=False, quiet=asked.quiet)
    if asked.frozen is None:
        return inspect_checkpoint(checkpoint)
    if asked.text_tokens < 1 or asked.visual_tokens < 1:
        raise ShortcutError("--text-tokens and --visual-tokens have to be positive")
    visual_tokens(checkpoint.config)
    blocks, (_, text) = parse_blocks(asked.frozen, checkpoint.base.blocks), text_config(checkpoint.config)
    return inspect_checkpoint(checkpoint, prefill(text, blocks, asked.text_tokens, asked.visual_tokens))
