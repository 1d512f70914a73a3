"""The calibration set: the text that scores are computed on, cut into sequences of tokens, and a record of what it was.

By default documents are packed: tokenised, joined and cut into windows of equal length, of which a seed picks some. By
document, every document is one sequence, cut off at the length and padded on the right. Domains are read one by one,
each for its share of the sequences; those of a domain stand together, so that every n-th sequence is of all domains
alike.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch

from shortcut.common.errors import ShortcutError
from shortcut.live.batch import Batch
from shortcut.material.documents import Conversation, Source, parse_domains, read_documents

ENOUGH = 8  # times the tokens asked for: what is tokenised of a larger source before windows are picked
# For templates that write today's date: the text must not change overnight. `+` keeps a line break that follows.
ONE_DAY = (
    "{% macro strftime_now(form) %}{{ form | replace('%d', '26') | replace('%m', '07') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%y', '24') | replace('%Y', '2024') }}{% endmacro +%}"
)


@dataclass(frozen=True)
class Calibration:
    """Sequences of token ids, and everything needed to make them again. `hash` is over the ids themselves.

    domains: for every sequence, which domain of the source it is from, counted from 0; ascending.
    """

    source: Source
    length: int
    seed: int
    by_document: bool
    starts_with_bos: bool
    sequences: tuple[tuple[int, ...], ...]
    domains: tuple[int, ...]

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the token ids."""
        return hashlib.sha256(json.dumps(self.sequences).encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(map(len, self.sequences))

    def take(self, places: Iterable[int]) -> "Calibration":
        """Some of the sequences: those at these places, which ascend."""
        places = list(places)
        sequences = tuple(self.sequences[place] for place in places)
        return replace(self, sequences=sequences, domains=tuple(self.domains[place] for place in places))

    def split(self, samples: int) -> tuple["Calibration", "Calibration"]:
        """All but so many sequences, and these: the last of every domain, in proportion, but never all of one."""
        counts = [self.domains.count(domain) for domain in sorted(set(self.domains))]
        spare = [count - 1 for count in counts]
        if not 0 < samples <= sum(spare):
            raise ShortcutError(
                f"cannot set {samples} of {len(self.sequences)} sequences aside and keep one of every text:"
                " use more --samples"
            )
        shares = zip(accumulate(counts), share_out(samples, spare), strict=True)
        aside = [place for end, share in shares for place in range(end - share, end)]
        return self.take(sorted(set(range(len(self.sequences))) - set(aside))), self.take(aside)

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
        """As `make_batches`."""
        return make_batches(self, batch_size, device)

    @property
    def described(self) -> str:
        """For people: the text, how much of it, and the BOS policy."""
        bos = "each starting with BOS" if self.starts_with_bos else "without BOS"
        text = "text by the chat template" if self.source.chat_template else "text"
        return f"{self.source.data} {text}, {len(self.sequences)} sequences of {self.length} tokens, {bos}"

    def record(self) -> dict[str, Any]:
        """What goes into scores and plans: source, domains, count, length, seed, hash."""
        domains = parse_domains(self.source.data).items()
        return {
            **asdict(self.source),
            "domains": [
                {"data": name, "weight": weight, "samples": self.domains.count(number)}
                for number, (name, weight) in enumerate(domains)
            ],
            "samples": len(self.sequences),
            "length": self.length,
            "tokens": self.tokens,
            "seed": self.seed,
            "by_document": self.by_document,
            "starts_with_bos": self.starts_with_bos,
            "hash": self.hash,
        }


def make_calibration(
    tokenizer: Any,
    source: Source,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    by_document: bool = False,
    fewer: bool = False,
    framed: bool = False,
) -> Calibration:
    """Tokenise a source into `samples` sequences of `length` tokens, the same for the same seed on every machine.

    Every sequence starts with the BOS token, once, if the tokenizer puts one before text. Of several domains each gives
    its share of the sequences. fewer: whether fewer will do where there are no more; framed: whether all that the
    tokenizer puts around a text is around every sequence, as encoders want it, not only BOS before it. Raises
    ShortcutError where the source cannot be read, or holds less text than was asked for, and where a chat template is
    asked for and the tokenizer has none, or it refuses a conversation.
    """
    for name, value in (("samples", samples), ("length", length)):
        if value < 2 - (name == "samples"):
            raise ShortcutError(f"--{name} {value} is too small")
    weights = parse_domains(source.data)
    shares = share_out(samples, list(weights.values()))
    around = frame_of(tokenizer) if framed else (leading_bos(tokenizer), ())
    sequences: list[tuple[int, ...]] = []
    domains: list[int] = []
    for number, (data, share) in enumerate(zip(weights, shares, strict=True)):
        if not share:
            raise ShortcutError(f"--samples {samples} leaves none for {data}: use more, or give it more weight")
        found = _make_sequences(tokenizer, replace(source, data=data), share, length, seed, by_document, around)
        if len(found) < (1 if fewer else share):
            unit = "documents" if by_document else f"sequences of {length} tokens"
            raise ShortcutError(f"{data} holds {len(found)} {unit} and --samples asks it for {share}")
        sequences += found
        domains += [number] * len(found)
    starts_with_bos = all(row[0] == tokenizer.bos_token_id for row in sequences)
    return Calibration(source, length, seed, by_document, starts_with_bos, tuple(sequences), tuple(domains))


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole shares in proportion to weights that add up to exactly the total: the largest remainders are rounded up."""
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda place: shares[place] - exact[place])
    for place in by_remainder[: total - sum(shares)]:
        shares[place] += 1
    return shares


def _make_sequences(
    tokenizer: Any,
    source: Source,
    samples: int,
    length: int,
    seed: int,
    by_document: bool,
    around: tuple[tuple[int, ...], tuple[int, ...]],
) -> list[tuple[int, ...]]:
    """The sequences of one domain: so many, or all that it holds; around: what goes before and behind each."""
    bos, end = around
    room = length - len(bos) - len(end)
    pieces: list[Sequence[int]] = []
    joined: list[int] = []
    enough = ENOUGH * samples * room
    template = chat_template_of(tokenizer) if source.chat_template else None
    for document in read_documents(source, seed):
        tokens = tokenise(tokenizer, document, template) if document else []
        if bos and tokens[:1] == [*bos]:  # the template's own
            tokens = tokens[1:]
        if by_document and len(tokens) > 1:  # one token has none that comes next
            pieces.append(tokens[:room])
        elif tokens:
            joined += ([tokenizer.eos_token_id] if joined and tokenizer.eos_token_id is not None else []) + tokens
        if len(pieces) == samples or len(joined) >= enough:
            break
    if not by_document:
        windows = [joined[start : start + room] for start in range(0, len(joined) - room + 1, room)]
        chosen = random.Random(seed).sample(range(len(windows)), min(samples, len(windows)))
        pieces = [windows[number] for number in sorted(chosen)]
    return [(*bos, *piece, *end) for piece in pieces]


def frame_of(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that this tokenizer puts before every text and behind it."""
    whole, inner = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    start = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), 0)
    return tuple(whole[:start]), tuple(whole[start + len(inner) :])


def leading_bos(tokenizer: Any) -> tuple[int, ...]:
    """The BOS token as a sequence of one if this tokenizer puts it before every text, else an empty one."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()


def chat_template_of(tokenizer: Any) -> str:
    """The chat template of a tokenizer, for which it is always the same day. Raises ShortcutError if there is none."""
    try:
        return ONE_DAY + tokenizer.get_chat_template()
    except ValueError:
        raise ShortcutError("the model's tokenizer has no chat template: leave out --chat-template") from None


def tokenise(tokenizer: Any, document: str | Conversation, template: str | None) -> list[int]:
    """Token ids of a document without special tokens, or of what a chat template makes of it; text is of the user then.

    Raises ShortcutError for a conversation that the template refuses.
    """
    if template is None:
        return tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": document}] if isinstance(document, str) else document
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, return_dict=False)
    except (TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShortcutError(f"the chat template refuses the conversation {str(messages)[:80]}: {reason}") from None


def make_batches(calibration: Calibration, batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """The sequences in batches on a device, padded as `pad` pads them."""
    if batch_size < 1:
        raise ShortcutError(f"--batch-size {batch_size} is not a positive number")
    starts = range(0, len(calibration.sequences), batch_size)
    return [pad(calibration.sequences[start : start + batch_size], device) for start in starts]


def pad(sequences: Iterable[Sequence[int]], device: torch.device | str = "cpu") -> Batch:
    """Sequences as one batch on a device, shorter ones padded on the right with token 0 and masked."""
    rows = [torch.tensor(row) for row in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return Batch(ids.to(device), mask.to(device))
