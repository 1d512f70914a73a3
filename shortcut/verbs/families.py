"""`families`: what can be cut exactly."""

from shortcut.family.known import Families, read_families
from shortcut.options.groups import Quiet
from shortcut.options.verb import verb


@verb(Quiet, example="--json")
def families(asked: Quiet) -> Families:  # noqa: ARG001  (every command can be told to be quiet)
    """List all families of transformers, and whether their blocks can be deleted exactly.

    The table was written by a sweep that cut a tiny random model of every family, in three ways, and compared its
    logits with those of the model whose blocks are bypassed.
    """
    return read_families()
