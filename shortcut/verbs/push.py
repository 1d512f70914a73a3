"""Sharing a shortened checkpoint on the Hugging Face Hub, verified once more and with a card that says what it is."""

from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import open_base, open_folder, read_record
from shortcut.checkpoint.stage import RECORD
from shortcut.common.errors import ShortcutError
from shortcut.common.progress import say
from shortcut.common.text import format_size
from shortcut.common.version import __version__
from shortcut.material.take import take_text
from shortcut.options.groups import CreatePr, ModelBase, Running, SampledText
from shortcut.options.verb import verb
from shortcut.publish.push import Pushed, check_way, files_to_push, hub_errors, records_to_push, upload
from shortcut.records.plan import Plan

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


@dataclass(frozen=True)
class PushOptions(SampledText, Running):
    """On the Hub"""

    checkpoint: Annotated[str | Path, "the folder of a checkpoint"]
    repository: Annotated[str, "the model on the Hub (org/name) to push to, made where it is missing"]
    _: KW_ONLY
    base: ModelBase = None
    private: Annotated[bool, "make it visible to its owners alone"] = False
    revision: Annotated[str | None, "the branch that it goes to, made where it is missing"] = None
    create_pr: CreatePr = False
    data: str = "heldout"


@verb(PushOptions, first="private create_pr", example="shorter org/model-short")
def push(asked: PushOptions) -> PushReport:
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

    folder, repository, quiet = Path(asked.checkpoint), asked.repository, asked.quiet
    short, plan = _open(folder, asked)
    files, left_out = files_to_push(short)
    own, evaluated = read_own_card(folder), read_evaluation(folder)
    exists = check_way(repository, private=asked.private, create_pr=asked.create_pr)
    original = _open_base(plan, asked.base, quiet=quiet)
    images, trust = bool(plan.frozen), asked.trust_remote_code
    heldout = take_text(short, asked, asked.samples, images=images, trust_remote_code=trust)
    say(f"checking {folder} against {original.name}", quiet=quiet)
    checked = check_checkpoint(short, (original, plan), heldout, asked)
    card = complete_card(own, format_card(short, original, plan, checked, repository, evaluated), repository)
    going = {**files, **records_to_push(folder, original), CARD: card.encode()}
    with hub_errors(repository):
        results = None if evaluated is None else results_to_push(evaluated, repository, asked.revision)
    going |= {} if results is None else {RESULTS: results}
    if "\nlicense:" not in card:
        say(f"neither the base's card nor {folder / CARD} names a license: add one, so that others know", quiet=quiet)
    say(f"uploading to {repository}", quiet=quiet)
    message = f"{original.base.title}, {len(plan.kept)} of {plan.base.blocks} blocks, by shortcut {__version__}"
    to = upload(
        repository,
        going,
        message,
        exists=exists,
        private=asked.private,
        revision=asked.revision,
        create_pr=asked.create_pr,
        quiet=quiet,
    )
    sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in going.items()}
    return PushReport(repository, to, tuple(sorted(sizes.items())), left_out, checked)


def _open(folder: Path, asked: PushOptions) -> tuple[Checkpoint, Plan]:
    """The checkpoint and the plan that made it. Raises ShortcutError for what cannot be pushed."""
    if not folder.is_dir():
        raise ShortcutError(f"no folder {folder}")
    if asked.create_pr and asked.revision is not None:
        raise ShortcutError("--create-pr opens a pull request at the main branch: leave out --revision")
    short, plan = open_folder(folder, quiet=asked.quiet), read_record(folder)
    if plan is None:
        raise ShortcutError(f"{folder} has no record ({RECORD}) of what was cut: push is for what shortcut wrote")
    return short, plan


def _open_base(plan: Plan, base: str | None, *, quiet: bool) -> Checkpoint:
    """The base to compare with. A copy in a folder, once it was compared, is as good as the model that a plan names."""
    opened = open_base(plan, base, None, quiet=quiet)
    if plan.base.on_hub and not opened.base.on_hub:
        return replace(opened, name=plan.base.model, revision=plan.base.revision)
    return opened
