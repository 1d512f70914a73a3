"""`compare`: models asked side by side, on a local page."""

from contextlib import suppress
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

from shortcut.checkpoint.open import open_model
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.options.groups import Loading, Model, Quiet, Revision
from shortcut.options.verb import verb
from shortcut.talk.page import check_port, serving

if TYPE_CHECKING:
    from shortcut.talk.side_by_side import Column


@dataclass(frozen=True)
class Served:
    """Which models were compared, and where."""

    url: str
    models: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return asdict(self)

    def __str__(self) -> str:
        return ""  # it was seen in the browser


@dataclass(frozen=True)
class CompareOptions(Loading, Revision, Quiet):
    """The page"""

    model: Model
    short: Annotated[str | Path | None, "a shortened checkpoint, or any model that MODEL may be"] = None
    other: Annotated[str | Path | None, "another one"] = None
    _: KW_ONLY
    port: Annotated[int, "where the page is served"] = 7860
    host: Annotated[str, "the address that serves the page; 0.0.0.0 for anybody in the network"] = "127.0.0.1"
    open: Annotated[bool, "open the page in the browser"] = False


@verb(CompareOptions, first="port open", example="org/model shorter --open")
def compare(asked: CompareOptions) -> Served:
    """Ask up to three models the same side by side, on a local page, with parameters, memory and tokens per second.

    Blocks of MODEL can be left out there by a click, which previews a plan before anything is cut. Models that see
    answer about an image as well. Needs the extra demo; ends with Ctrl-C. Fails where the port is taken.
    """
    if find_spec("gradio") is None:
        raise ShortcutError('compare needs gradio: pip install "shortcut[demo]"')
    check_port(asked.host, asked.port)
    checkpoints = [open_model(asked.model, asked.revision, quiet=asked.quiet)]
    checkpoints += [open_model(each, quiet=asked.quiet) for each in (asked.short, asked.other) if each is not None]
    from shortcut.talk.side_by_side import load_column

    titles = [checkpoint.base.title for checkpoint in checkpoints]
    names = titles if len(set(titles)) == len(titles) else [checkpoint.name for checkpoint in checkpoints]
    columns: dict[str, Column] = {}
    for name, checkpoint in zip(names, checkpoints, strict=True):
        say(f"loading {name}", quiet=asked.quiet)
        columns[name] = load_column(checkpoint, asked)
    with serving(columns, asked.host, asked.port, browser=asked.open) as url, suppress(KeyboardInterrupt):
        say(f"{url} compares {', '.join(names)}; Ctrl-C ends it", quiet=asked.quiet)
        Event().wait()
    return Served(url, tuple(names))
