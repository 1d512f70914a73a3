"""Safetensors files as what they are: a JSON header and a row of byte ranges.

Reading is at least as strict as the safetensors library, so that nothing a file claims is believed unchecked; copying
moves runs of adjacent tensors through one small buffer, whatever their type and number.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from shortcut.common.errors import ShortcutError

HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
# Bytes copied at a time. Larger writes are slower by a factor of up to five on virtual machines whose free memory is
# handed back to their host, and no faster elsewhere.
BUFFER = 256 << 10
FLOATS = {"F64", "F32", "F16", "BF16"}
# Bits per element of every type the format knows.
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
ROTARY_TABLE = "rotary_emb.inv_freq"  # what follows from the config, and old checkpoints hold in every block


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: bytes `start` to `stop` (exclusive) counted from the beginning of the file.

    pieces: where only parts of it are meant, the byte ranges that are, within every `period` bytes. blank: zeros are
    meant in the place of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    period: int = 0
    pieces: tuple[tuple[int, int], ...] = ()
    blank: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its bytes are copied as they are."""
        return not self.pieces and not self.blank

    @property
    def size(self) -> int:
        """Bytes."""
        whole = self.stop - self.start
        return whole // self.period * sum(b - a for a, b in self.pieces) if self.pieces else whole

    @property
    def parameters(self) -> int:
        """Elements, as stored (a packed 4-bit weight counts its packed elements); a table of frequencies has none."""
        return 0 if self.name.endswith(ROTARY_TABLE) else math.prod(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """The header of one file: tensors in the order of their bytes, and the free-form metadata."""

    path: Path
    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> TensorFile:
    """Read and check the header of one safetensors file.

    Raises ShortcutError, naming file and tensor, for a header that is cut short, too long, not JSON, or holds a
    duplicate name, an unknown type, a shape that does not fit its range, or ranges with gaps, overlaps or leftovers.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ShortcutError(f"{path} is damaged: its header does not fit into its {size} bytes")
            raw = file.read(length)
    except FileNotFoundError:
        raise ShortcutError(f"{path} is missing") from None
    except OSError as error:
        raise ShortcutError(f"cannot read {path}: {error.strerror}") from None
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_whole)
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise ShortcutError(f"{path} is damaged: its header is not valid ({error})") from None
    if not isinstance(header, dict):
        raise ShortcutError(f"{path} is damaged: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ShortcutError(f"{path} is damaged: its __metadata__ is not a map of text to text")
    tensors = sorted((_read_entry(path, 8 + length, *item) for item in header.items()), key=lambda t: (t.start, t.stop))
    position = 8 + length
    for tensor in tensors:
        if tensor.start != position:
            raise ShortcutError(
                f"{path} is damaged: the bytes of {tensor.name!r} leave a gap or overlap their neighbour"
            )
        position = tensor.stop
    if position != size:
        raise ShortcutError(f"{path} is damaged: its header speaks of {position} bytes and the file has {size}")
    return TensorFile(path, tuple(tensors), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    for name, value in pairs:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        name.encode()
        if isinstance(value, str):
            value.encode()
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _whole(digits: str) -> int:
    if digits == "-0":
        raise ValueError("minus zero")
    return int(digits)


def _elements(shape: list[int]) -> int:
    """Their product, or more than any file has where it outgrows 64 bits on the way."""
    product = 1
    for size in shape:
        product *= size
        if product >= 1 << 64:
            return product
    return product


def _read_entry(path: Path, data_start: int, name: str, entry: Any) -> Tensor:
    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype: Any
    shape: Any
    offsets: Any
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    proper = isinstance(shape, list) and isinstance(offsets, list) and len(fields) == 3 and len(offsets) == 2
    if not proper or not all(map(count, shape + offsets)):
        raise ShortcutError(f"{path} is damaged: tensor {name!r} lacks a proper dtype, shape and data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ShortcutError(f"{path}: tensor {name!r} is of the unknown type {dtype!r}")
    if _elements(shape) * DTYPE_BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        raise ShortcutError(f"{path} is damaged: {name!r}, {dtype} {str(shape)[:80]}, does not fit its bytes {offsets}")
    return Tensor(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def write_file(
    path: Path,
    tensors: Sequence[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    advance: Callable[[int], object] = lambda _: None,
) -> None:
    """Write a safetensors file of tensors copied, byte for byte, from other files, each under the name given.

    The order is kept, but for larger element types coming first, so that every tensor stays aligned. `advance` is told
    the bytes copied, step by step. Raises ShortcutError where a source is shorter than its header said.
    """
    ordered = sorted(tensors, key=lambda item: -DTYPE_BITS[item[1].dtype])
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in ordered:
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    buffer = memoryview(bytearray(BUFFER))
    with path.open("wb") as target:
        target.write(len(header).to_bytes(8, "little") + header)
        for plain, run in groupby((tensor for _, tensor in ordered), lambda tensor: tensor.is_plain):
            if not plain:
                for chunk in (chunk for tensor in run for chunk in read_chunks(tensor)):
                    target.write(chunk)
                    advance(len(chunk))
                continue
            for source, start, stop in _runs(run):
                with source.open("rb", buffering=0) as file:
                    file.seek(start)
                    _copy(file, target, stop - start, buffer, advance)


def _runs(tensors: Iterable[Tensor]) -> list[tuple[Path, int, int]]:
    """Join byte ranges that follow each other in the same file."""
    runs: list[tuple[Path, int, int]] = []
    for tensor in tensors:
        if runs and runs[-1][0] == tensor.file and runs[-1][2] == tensor.start:
            runs[-1] = (tensor.file, runs[-1][1], tensor.stop)
        else:
            runs.append((tensor.file, tensor.start, tensor.stop))
    return runs


def _copy(
    source: BinaryIO, target: BinaryIO, length: int, buffer: memoryview, advance: Callable[[int], object]
) -> None:
    while length:
        count = source.readinto(buffer[: min(length, len(buffer))])  # type: ignore[attr-defined]
        if not count:
            raise ShortcutError(f"{source.name} ended {length} bytes early: it changed while it was read")
        target.write(buffer[:count])
        length -= count
        advance(count)


def select(tensor: Tensor, axis: int, parts: int, kept: Sequence[int]) -> Tensor:
    """The tensor of only some parts along an axis that is made of this many equal parts."""
    period = (tensor.stop - tensor.start) // math.prod(tensor.shape[:axis])
    unit = period // parts
    shape = (*tensor.shape[:axis], tensor.shape[axis] // parts * len(kept), *tensor.shape[axis + 1 :])
    pieces = tuple((part * unit, (part + 1) * unit) for part in kept)
    return replace(tensor, shape=shape, period=period, pieces=pieces)


def read_chunks(tensor: Tensor) -> Iterator[bytes]:
    """The bytes of a tensor, piece by piece."""
    if tensor.blank:
        yield from (bytes(min(left, BUFFER)) for left in range(tensor.size, 0, -BUFFER))
        return
    step = max(1, BUFFER // tensor.period) * tensor.period if tensor.pieces else BUFFER
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        for left in range(tensor.stop - tensor.start, 0, -step):
            chunk = file.read(min(left, step))
            if len(chunk) < min(left, step):
                raise ShortcutError(f"{tensor.file} ended {left} bytes early: it changed while it was read")
            yield _pick(chunk, tensor) if tensor.pieces else chunk


def _pick(chunk: bytes, tensor: Tensor) -> bytes:
    import numpy as np

    rows = np.frombuffer(chunk, np.uint8).reshape(-1, tensor.period)
    return np.concatenate([rows[:, a:b] for a, b in tensor.pieces], axis=1).tobytes()


def digest(tensors: Iterable[Tensor]) -> bytes:
    """SHA-256 over the bytes of tensors, one after the other."""
    total = hashlib.sha256()
    for chunk in (chunk for tensor in tensors for chunk in read_chunks(tensor)):
        total.update(chunk)
    return total.digest()


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    if not one.is_plain or not other.is_plain:  # read in other steps
        return digest([one]) == digest([other])
    return one.size == other.size and all(a == b for a, b in zip(read_chunks(one), read_chunks(other), strict=True))
