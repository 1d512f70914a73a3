"""Text that a model writes itself, for what was cut from it to learn from: in all the styles that it knows.

A text starts as documents start for the model, and goes on as likely as it says, past their ends (after LLM-QAT,
arXiv:2305.17888, which starts with any token). Where there is a chat template, every fourth one starts as a user's turn
(Magpie, arXiv:2406.08464). Text is written once for a base, and kept in the cache.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, cycle, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shortcut.checkpoint.checkpoint import Checkpoint
from shortcut.checkpoint.open import identify
from shortcut.common.cache import place_for
from shortcut.common.errors import ShortcutError
from shortcut.common.processes import add_up, share
from shortcut.common.progress import say, track
from shortcut.healing.saved import write_whole
from shortcut.live.blocks import device_of
from shortcut.live.load import LOADING_ERRORS, Model, load_tokenizer
from shortcut.live.offload import is_offloaded
from shortcut.material.calibration import Calibration, chat_template_of, leading_bos, tokenise
from shortcut.options.groups import Loading

if TYPE_CHECKING:
    from shortcut.material.examples import Material

TOKENS_AT_ONCE = 1 << 14  # of several sequences together: their keys and values take memory
SEQUENCES = 32  # at most, where their number is not given
SHORT = 128  # tokens of a text, of which several make a sequence: short ones are written faster, as more go at once


def count_own(material: "Material", asked: int | None, live: Model | None = None, *, quiet: bool = True) -> int:
    """How many sequences the base is to write: as many as there are, and no more than `SEQUENCES`, if not asked for.

    live: the base, where it is loaded; if its blocks are on the disk, which each token would take all of, none are
    written if not asked for. Raises ShortcutError for a negative number, and where text is asked for beside images, of
    which none is written.
    """
    if asked is not None and asked < 0:
        raise ShortcutError("--own cannot be negative")
    if not isinstance(material, Calibration):
        if asked:
            raise ShortcutError("--own is text, and this model learns from questions about images")
        return 0
    if asked is None and live is not None and is_offloaded(live):
        say("no text is written to learn from, as blocks are on the disk: see --own", quiet=quiet)
        return 0
    return min(len(material.sequences), SEQUENCES) if asked is None else asked


def with_own_text(
    material: "Material",
    count: int,
    base: Checkpoint,
    load: Callable[[], Model],
    how: Loading,
    *,
    seed: int,
    quiet: bool,
) -> "Material":
    """The same, with one text more that the base wrote: so many sequences of the length of the others.

    load: gives the base's model, and is called only if something is to be written. Raises as `write_sequences` does.
    """
    if not count:
        return material
    tokenizer = load_tokenizer(base.folder, trust_remote_code=how.trust_remote_code)
    folder = place_for("own", [identify(base), how.dtype, how.device, seed])
    folder.mkdir(parents=True, exist_ok=True)
    assert isinstance(material, Calibration)
    return with_text(material, write_sequences(load, tokenizer, count, material.length, folder, seed=seed, quiet=quiet))


def with_text(material: "Material", sequences: Sequence[tuple[int, ...]]) -> "Material":
    """The same with one text more."""
    if not sequences:
        return material
    assert isinstance(material, Calibration)
    domains = (*material.domains, *[max(material.domains) + 1] * len(sequences))
    return replace(material, sequences=(*material.sequences, *sequences), domains=domains)


def write_sequences(
    load: Callable[[], Model], tokenizer: Any, count: int, length: int, folder: Path, *, seed: int, quiet: bool
) -> tuple[tuple[int, ...], ...]:
    """So many sequences of so many tokens, as ids, each of several short texts; kept in a folder, and read from it.

    Several processes share the work. Raises ShortcutError for a model that cannot write, and for a full disk.
    """
    size = min(length, SHORT)
    each = math.ceil(length / size)
    turns = list(islice(cycle(starts_of(tokenizer)), count * each))
    files, room = dict[Path, tuple[tuple[int, ...], int]](), max(1, TOKENS_AT_ONCE // size)
    for kind, (start, rows) in enumerate(Counter(turns).items()):
        for first in range(0, rows, room):
            some = min(room, rows - first)
            files[folder / f"own-{size}-{kind}-{first:07}-{some}.safetensors"] = (start, some)
    for file in track(share(list(files)), "writing text to learn from", quiet=quiet):
        if not _is_whole(file):
            drawn = _draw(load(), *files[file], size, seed=hash((seed, *map(int, file.stem.split("-")[2:]))))
            write_whole(file, partial(save_file, {"ids": drawn.int().cpu()}), "what was written before is kept")
    add_up(torch.zeros(1))  # until all have written theirs
    written: dict[tuple[int, ...], list[list[int]]] = {start: [] for start in turns}
    for file, (start, _) in files.items():
        written[start] += load_file(file)["ids"].tolist()
    texts = [written[start].pop() for start in turns]
    return tuple(tuple(chain(*texts[first : first + each]))[:length] for first in range(0, len(texts), each))


def _is_whole(file: Path) -> bool:
    """Whether texts are there, and not damaged."""
    try:
        return "ids" in load_file(file)
    except (OSError, SafetensorError):
        return False


def starts_of(tokenizer: Any) -> list[tuple[int, ...]]:
    """What sequences start with in turn: three as documents do, and where there is a chat template, one with a chat.

    Documents start with BOS where the tokenizer puts it there, else with the token that ends them, which chats have no
    use for. Raises ShortcutError for a tokenizer that names none.
    """
    chat, turn = _user_turn(tokenizer)
    named = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    ends = [token for token in named if token is not None]
    if not ends:
        raise ShortcutError("the tokenizer names no token that starts or ends a text: use --own 0")
    document = leading_bos(tokenizer) or (next((token for token in ends if token not in turn), ends[0]),)
    return [document] * 3 + ([chat] if chat else [])


def _user_turn(tokenizer: Any) -> tuple[tuple[int, ...], set[int]]:
    """The tokens in front of what a user says first, and all those of such a turn; none without a chat template."""
    try:
        template = chat_template_of(tokenizer)
        one, other = (tokenise(tokenizer, text, template) for text in ("Whales", "3 + 4"))
    except ShortcutError:
        return (), set()
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(token for token, _ in same), {*one, *other}


@torch.inference_mode()
def _draw(model: Model, start: Sequence[int], count: int, length: int, *, seed: int) -> Tensor:
    """Sequences drawn from what the model predicts: (count, length)."""
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    ids = torch.tensor(start, dtype=torch.long, device=device_of(model)).expand(count, -1)[:, :length]
    if ids.shape[1] == length:
        return ids
    # In the place of the model's own, which may say how to decode, and where to stop.
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - ids.shape[1])
    try:
        return model.generate(ids, attention_mask=torch.ones_like(ids))
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ShortcutError(f"the base cannot write text to learn from: {reason}; use --own 0") from None
