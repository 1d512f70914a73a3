"""The current edition of a modeling file, put into a checkpoint that was written with an older one."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from shortcut.checkpoint.checkpoint import read_config
from shortcut.checkpoint.open import fetch_small
from shortcut.checkpoint.stage import write_text
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.common.version import __version__
from shortcut.family.halves import Modeling, modeling_of
from shortcut.modeling.editions import EDITION, edition_of
from shortcut.options.groups import CreatePr, Quiet
from shortcut.options.verb import verb
from shortcut.publish.push import Pushed, check_way, upload_file


@dataclass(frozen=True)
class RefreshReport:
    """What became of a modeling file: its name, its edition before (None: it was missing) and now, and its way.

    renewed: whether there was anything to do; built_with: the release of transformers that built the model by it.
    """

    checkpoint: str
    file: str
    before: int | None
    now: int
    renewed: bool
    built_with: str
    to: Pushed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**vars(self), "to": vars(self.to) if self.to else None}

    def __str__(self) -> str:
        if not self.renewed:
            return f"{self.file} of {self.checkpoint} is edition {self.now}, the current one: nothing to do"
        before = "it was missing" if self.before is None else f"edition {self.before}"
        lines = [
            f"{self.file} of {self.checkpoint}: {before} -> edition {self.now}",
            f"transformers {self.built_with} builds the model by it; all other files stay as they were",
        ]
        if self.to is not None:
            lines.append(f"commit {self.to.commit}")
            lines += [f"pull request {self.to.pull_request}"] if self.to.pull_request else []
        return "\n".join(lines)


@dataclass(frozen=True)
class RefreshOptions(Quiet):
    """On the Hub"""

    checkpoint: Annotated[str | Path, "the folder of a checkpoint, or a Hub id (org/name)"]
    _: KW_ONLY
    revision: Annotated[str | None, "the branch that it goes to"] = None
    create_pr: CreatePr = False


@verb(RefreshOptions, example="shorter")
def refresh(asked: RefreshOptions) -> RefreshReport:
    """Put the current edition of the modeling file into a checkpoint that was written with an older one.

    That file is all that changes, in a folder or on the Hub (org/name; --create-pr proposes it to whom it belongs), and
    only once the installed transformers has built the model by it, without weights. A file that shortcut never wrote,
    or that was changed by hand, is left alone. `shortcut check` compares the result with its base.
    """
    checkpoint, revision, create_pr = asked.checkpoint, asked.revision, asked.create_pr
    local = Path(checkpoint).expanduser().is_dir()
    if local and (create_pr or revision is not None):
        raise ShortcutError(f"{checkpoint} is a folder: --create-pr and --revision are for models of the Hub")
    if create_pr and revision is not None:
        raise ShortcutError("--create-pr opens a pull request at the main branch: leave out --revision")
    if not local and str(checkpoint).count("/") != 1:
        raise ShortcutError(f"no checkpoint at {checkpoint}: neither a folder nor a Hub id (org/name)")
    folder = Path(checkpoint).expanduser() if local else fetch_small(str(checkpoint), revision)
    config = read_config(folder)
    modeling, text = _carried(folder, config, str(checkpoint))
    before, renewed = edition_of(text or ""), text != modeling.code
    report = RefreshReport(str(checkpoint), modeling.file, before, EDITION, renewed, _build(config, modeling))
    if renewed and local:
        write_text(folder / modeling.file, modeling.code)
    elif renewed:
        say(f"uploading {modeling.file} to {checkpoint}", quiet=asked.quiet)
        check_way(str(checkpoint), private=False, create_pr=create_pr)
        message = f"Edition {EDITION} of {modeling.file}, by shortcut {__version__}"
        to = upload_file(str(checkpoint), modeling.file, modeling.code, message, revision=revision, create_pr=create_pr)
        report = replace(report, to=to)
    return report


def _carried(folder: Path, config: Mapping[str, Any], name: str) -> tuple[Modeling, str | None]:
    """The modeling file that belongs into a checkpoint, and the text of the one that is there."""
    modeling = modeling_of(config)
    if modeling is None:
        raise ShortcutError(f"{name} needs no modeling file of shortcut's: there is nothing to refresh")
    path = folder / modeling.file
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if text is not None and edition_of(text) is None:
        raise ShortcutError(f"{modeling.file} of {name} is not as shortcut wrote it: remove it to have it written anew")
    return modeling, text


def _build(config: Mapping[str, Any], modeling: Modeling) -> str:
    """Build the model of a checkpoint by the current file, without weights; gives the release that did."""
    import transformers

    from shortcut.live.load import build_empty

    with TemporaryDirectory() as scratch:
        (Path(scratch) / modeling.file).write_text(modeling.code, encoding="utf-8")
        build_empty(config, Path(scratch))
    return transformers.__version__
