"""Sharing a shortened checkpoint on the Hugging Face Hub, verified once more and with a card that says what it is."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut import __version__, runs
from shortcut.commands import read_record
from shortcut.errors import ShortcutError
from shortcut.progress import say
from shortcut.publish.push import Pushed, check_way, files_to_push, hub_errors, records_to_push, upload
from shortcut.records.plan import Plan
from shortcut.scoring.documents import Source
from shortcut.sources import open_folder
from shortcut.surgery.checkpoint import Checkpoint
from shortcut.surgery.stage import RECORD
from shortcut.text import format_size

if TYPE_CHECKING:
    from shortcut.checking.verify import CheckReport


@dataclass(frozen=True)
class PushReport:
    """Where a checkpoint went, the files with their bytes, those that stayed, and what its verification found."""

    repository: str
    to: Pushed
    files: tuple[tuple[str, int], ...]
    left_out: tuple[str, ...]
    check: "CheckReport"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for --json."""
        return {**vars(self), "to": vars(self.to), "check": self.check.to_dict()}

    def __str__(self) -> str:
        total = format_size(sum(size for _, size in self.files))
        return "\n".join(
            [
                str(self.check),
                "",
                f"pushed {len(self.files)} files, {total}, to {self.to.url}",
                f"commit {self.to.commit}",
                *([f"pull request {self.to.pull_request}"] if self.to.pull_request else []),
                *([f"left out, as no part of the checkpoint: {', '.join(self.left_out)}"] if self.left_out else []),
            ]
        )


def push(
    checkpoint: str | Path,
    repository: str,
    *,
    base: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    data: str = "heldout",
    split: str = "train",
    column: str | None = None,
    chat_template: bool = False,
    samples: int = 16,
    length: int = 512,
    batch_size: int = 4,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> PushReport:
    """Verify a shortened checkpoint, complete its model card, and upload it to the Hugging Face Hub.

    It is compared with its base as by `check`, and nothing is uploaded unless it is what its record says. The card then
    names base, licence and languages, what was cut, what was just measured, what `eval` found where it wrote eval.json
    into CHECKPOINT, and the command that cuts it again; what was written into README.md by hand stays. The folder
    itself is not changed. Who pushes is whoever is logged in, by `hf auth login` or HF_TOKEN. A push that was
    interrupted goes on when it is started again.
    """
    from shortcut.checking.verify import check_checkpoint
    from shortcut.publish.card import CARD, complete_card, format_card, read_own_card
    from shortcut.publish.results import RESULTS, read_evaluation, results_to_push

    folder = Path(checkpoint)
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    if create_pr and revision is not None:
        raise ShortcutError("--create-pr opens a pull request at the main branch: leave out --revision")
    short, plan = open_folder(folder, quiet=quiet), read_record(folder)
    if plan is None:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what was cut: push is for what shortcut wrote")
    files, left_out = files_to_push(short)
    own, evaluated = read_own_card(folder), read_evaluation(folder)
    exists = check_way(repository, private=private, create_pr=create_pr)
    original = _open_base(plan, base, quiet=quiet)
    text: dict[str, Any] = {"length": length, "seed": 0, "images": bool(plan.frozen)}
    source = Source(data, split, column, chat_template)
    heldout = runs.take_text(short, source, samples, trust_remote_code=trust_remote_code, **text)
    say(f"checking {folder} against {original.name}", quiet=quiet)
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    checked = check_checkpoint(short, (original, plan), heldout, batch_size=batch_size, quiet=quiet, **loading)
    card = complete_card(own, format_card(short, original, plan, checked, repository, evaluated), repository)
    going: dict[str, Path | bytes] = {**files, **records_to_push(folder, original), CARD: card.encode()}
    with hub_errors(repository):
        results = None if evaluated is None else results_to_push(evaluated, repository, revision)
    going |= {} if results is None else {RESULTS: results}
    if "\nlicense:" not in card:
        say(f"neither the base's card nor {folder / CARD} names a license: add one, so that others know", quiet=quiet)
    say(f"uploading to {repository}", quiet=quiet)
    where: dict[str, Any] = {"private": private, "revision": revision, "create_pr": create_pr}
    message = f"{original.base.title}, {len(plan.kept)} of {plan.base.blocks} blocks, by shortcut {__version__}"
    to = upload(repository, going, message, exists=exists, quiet=quiet, **where)
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in going.items()}
    return PushReport(repository, to, tuple(sorted(sizes.items())), left_out, checked)


def _open_base(plan: Plan, base: str | None, *, quiet: bool) -> Checkpoint:
    """The base to compare with. A copy in a folder, once it was compared, is as good as the model that a plan names."""
    opened = runs.open_base(plan, base, None, quiet=quiet)
    if plan.base.on_hub and not opened.base.on_hub:
        return replace(opened, name=plan.base.model, revision=plan.base.revision)
    return opened
