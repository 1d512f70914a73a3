"""Weight files on the Hub, of which only the bytes that are needed are fetched.

Each remote file gets a mirror in the user's cache: a sparse file of its full size, in which fetched ranges stand where
they stand on the Hub, and beside it a journal of the ranges that are there. So everything that reads a local checkpoint
reads a mirror as well, an interrupted fetch goes on where it stopped, and no range is fetched twice.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from shortcut.checkpoint.tensors import HEADER_LIMIT, Tensor
from shortcut.common.errors import ShortcutError

CHUNK = 16 << 20  # bytes of one request
CONNECTIONS = 8
ATTEMPTS = 3
SILENCE = 30  # seconds without a byte before a connection counts as lost
Range = tuple[int, int]  # bytes from the first to before the second


@dataclass(frozen=True)
class Mirror:
    """One file on the Hub and its local mirror. url: of the file at a fixed commit; size: its bytes."""

    path: Path
    url: str
    size: int

    @property
    def _journal(self) -> Path:
        return self.path.with_name(self.path.name + ".ranges")

    def open(self) -> None:
        """Make the mirror if there is none, and fetch the header: after this, `read_header` can read the file."""
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._journal.unlink(missing_ok=True)
            with self.path.open("wb") as file:
                file.truncate(self.size)
        self.fetch([(0, 8)])
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, self.size - 8):
            raise ShortcutError(f"{self.url} is damaged: its header does not fit into its {self.size} bytes")
        self.fetch([(8, 8 + length)])

    def missing(self, ranges: Iterable[Range]) -> list[Range]:
        """The parts of these ranges that have not been fetched yet, joined where they touch, in order."""
        lines = self._journal.read_text().splitlines() if self._journal.exists() else []
        there = [(int(start), int(stop)) for start, _, stop in (line.partition(" ") for line in lines)]
        return subtract(merge(ranges), merge(there))

    def fetch(self, ranges: Iterable[Range], advance: Callable[[int], object] = lambda _: None) -> None:
        """Fetch what is missing of these ranges, in parallel; `advance` is told the bytes that came in.

        Raises ShortcutError where the Hub does not answer with just these bytes; what came in before stays.
        """
        pieces = [
            (start, min(start + CHUNK, stop))
            for first, stop in self.missing(ranges)
            for start in range(first, stop, CHUNK)
        ]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            jobs = [pool.submit(self._fetch_piece, piece, advance) for piece in pieces]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _fetch_piece(self, piece: Range, advance: Callable[[int], object]) -> None:
        """Fetch one piece, going on where a connection broke; what came in is noted in the journal in any case."""
        from huggingface_hub.errors import HTTPError

        start, stop = piece
        for attempt in range(ATTEMPTS):
            try:
                for position in self._receive(start, stop):
                    advance(position - start)
                    start = position
            except (HTTPError, OSError) as error:
                if attempt + 1 == ATTEMPTS:
                    raise ShortcutError(f"lost {self.url}: {error}; run the same command again to go on") from None
                time.sleep(2**attempt)
            if start == stop:
                return
        raise ShortcutError(f"{self.url} ended after {start} bytes; run the same command again to go on")

    def _receive(self, start: int, stop: int) -> Iterator[int]:
        """Write what one request brings into the mirror, yielding how far it came."""
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        position = start
        with (
            get_session().stream("GET", self.url, headers=headers, timeout=SILENCE) as response,
            self.path.open("r+b", buffering=0) as file,
        ):
            hf_raise_for_status(response)
            if response.headers.get("Content-Range") != f"bytes {start}-{stop - 1}/{self.size}":
                raise ShortcutError(f"{self.url} is not served in parts, or changed: HTTP {response.status_code}")
            try:
                for data in response.iter_bytes():
                    position += os.pwrite(file.fileno(), data, position)
                    yield position
            finally:
                os.fdatasync(file.fileno())
                with self._journal.open("a") as journal:
                    journal.write(f"{start} {position}\n")


def fetch_tensors(
    mirrors: Iterable[Mirror], tensors: Iterable[Tensor], advance: Callable[[int], object] = lambda _: None
) -> None:
    """Fetch the bytes of these tensors into the mirrors of their files."""
    for mirror, ranges in _by_mirror(mirrors, tensors):
        mirror.fetch(ranges, advance)


def bytes_to_fetch(mirrors: Iterable[Mirror], tensors: Iterable[Tensor]) -> int:
    """How many bytes of these tensors are not here yet."""
    missing = (mirror.missing(ranges) for mirror, ranges in _by_mirror(mirrors, tensors))
    return sum(stop - start for parts in missing for start, stop in parts)


def _by_mirror(mirrors: Iterable[Mirror], tensors: Iterable[Tensor]) -> list[tuple[Mirror, list[Range]]]:
    wanted: dict[Path, list[Range]] = {}
    for tensor in tensors:
        wanted.setdefault(tensor.file, []).append((tensor.start, tensor.stop))
    return [(mirror, wanted.get(mirror.path, [])) for mirror in mirrors]


def merge(ranges: Iterable[Range]) -> list[Range]:
    """Ascending ranges without overlap that cover the same bytes."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif stop > start:
            merged.append((start, stop))
    return merged


def subtract(wanted: Iterable[Range], there: Iterable[Range]) -> list[Range]:
    """What is in merged ranges `wanted` and not in merged ranges `there`."""
    left = list(wanted)
    for start, stop in there:
        cut = [[(a, min(b, start)), (max(a, stop), b)] for a, b in left]
        left = [part for parts in cut for part in parts if part[0] < part[1]]
    return left
