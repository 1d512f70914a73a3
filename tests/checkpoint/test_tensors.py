"""Safetensors files: written so that the library reads the same, and refused at least where the library refuses."""

import contextlib
import json

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shortcut.checkpoint.tensors import DTYPE_BITS, read_header, same_bytes, write_file
from shortcut.common.errors import ShortcutError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint16, torch.uint8, torch.bool, torch.complex64]
SHAPES = [(3, 5), (7,), (), (0,), (2, 0, 3)]


def store(path, header, data=b""):
    """Write a file with this header, as text, bytes or an object, and this data."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape, start, stop, dtype="U8"):
    """The header's entry of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files that hold a tensor of every type in every shape between them, with the tensors by name."""
    folder = tmp_path_factory.mktemp("sources")
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            size = dtype.itemsize * torch.Size(shape).numel()
            raw = torch.randint(0, 2 if dtype == torch.bool else 120, (size,), dtype=torch.uint8, generator=generator)
            tensors[f"{dtype}.{shape}".replace("torch.", "")] = raw.view(dtype).reshape(shape)
    names = list(tensors)
    for number in (0, 1):
        save_file(
            {name: tensors[name] for name in names[number::2]}, folder / f"{number}.safetensors", {"format": "pt"}
        )
    return [read_header(folder / f"{number}.safetensors") for number in (0, 1)], tensors


def test_what_is_written_is_what_the_library_reads(sources, tmp_path):
    """Tensors of all types and shapes, from several files and under new names, come out bit for bit."""
    files, tensors = sources
    copied = []
    chosen = [(f"blöck.{tensor.name}", tensor) for file in files for tensor in reversed(file.tensors)]
    write_file(tmp_path / "out.safetensors", chosen, {"format": "pt", "schlüssel": 'a "b"'}, copied.append)
    loaded = load_file(tmp_path / "out.safetensors")
    assert loaded.keys() == {f"blöck.{name}" for name in tensors}
    for name, tensor in tensors.items():
        other = loaded[f"blöck.{name}"]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert sum(copied) == sum(tensor.nbytes for tensor in tensors.values())


def test_what_is_written_is_read_back(sources, tmp_path):
    """The header read back has the same tensors and metadata, every tensor aligned to its elements."""
    files, tensors = sources
    out = tmp_path / "out.safetensors"
    write_file(out, [(tensor.name, tensor) for file in files for tensor in file.tensors], {"format": "pt"})
    read = read_header(out)
    assert (read.path, read.metadata) == (out, {"format": "pt"})
    assert {tensor.name: (tensor.shape, tensor.size, tensor.parameters) for tensor in read.tensors} == {
        name: (tuple(tensor.shape), tensor.nbytes, tensor.numel()) for name, tensor in tensors.items()
    }
    assert [tensor.name for tensor in read.tensors if tensor.start % (DTYPE_BITS[tensor.dtype] // 8)] == []
    originals = {tensor.name: tensor for file in files for tensor in file.tensors}
    assert [tensor.name for tensor in read.tensors if not same_bytes(tensor, originals[tensor.name])] == []


def test_same_bytes_sees_every_difference(tmp_path):
    """Two tensors are told apart by one bit and by their length."""
    path = store(tmp_path / "a", {"a": entry([4], 0, 4), "b": entry([4], 4, 8), "c": entry([3], 8, 11)}, b"abcdabceabc")
    a, b, c = read_header(path).tensors
    assert [same_bytes(a, a), same_bytes(a, b), same_bytes(a, c)] == [True, False, False]


def test_a_source_that_shrinks(tmp_path):
    """A source that was cut short since its header was read is told, and how much is missing."""
    path = store(tmp_path / "a", {"a": entry([9], 0, 9)}, b"123456789")
    tensors = read_header(path).tensors
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ShortcutError, match="ended 4 bytes early: it changed while it was read"):
        write_file(tmp_path / "out", [("a", tensors[0])], {})


NOT_VALID, IMPROPER, GAP = (
    "its header is not valid",
    "'a' lacks a proper dtype, shape and data_offsets",
    "gap or overlap",
)
HOSTILE = {
    "not JSON": (b"\x00" * 8, b"", NOT_VALID),
    "not UTF-8": (b'{"\xff": 1}', b"", NOT_VALID),
    "not an object": ("[]", b"", "its header is not a JSON object"),
    "nested": ('{"a":' * 100_000 + "1" + "}" * 100_000, b"", NOT_VALID),
    "huge number": ('{"a":{"dtype":"U8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', b"1", NOT_VALID),
    "twice": ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"1", NOT_VALID),
    "half a character": ('{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1", "is damaged"),
    "half a character in metadata": ('{"__metadata__":{"a":"\\ud800"}}', b"", "is damaged"),
    "minus zero": ('{"a":{"dtype":"U8","shape":[1],"data_offsets":[-0,1]}}', b"1", "is damaged"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "its __metadata__ is not a map of text to text"),
    "more than an entry": ({"a": {**entry([1], 0, 1), "more": 1}}, b"1", IMPROPER),
    "negative offset": ({"a": entry([2], -1, 1)}, b"1", IMPROPER),
    "boolean": ({"a": entry([True], 0, 1)}, b"1", IMPROPER),
    "beyond 63 bits": ({"a": entry([1 << 63, 0], 0, 0)}, b"", IMPROPER),
    "unknown type": ({"a": entry([1], 0, 1, "F7")}, b"1", "tensor .a. is of the unknown type .F7."),
    "wrong shape": ({"a": entry([2, 2], 0, 3)}, b"123", r"'a', U8 \[2, 2\], does not fit its bytes \[0, 3\]"),
    "reversed": ({"a": entry([1], 1, 0)}, b"1", "does not fit its bytes"),
    "overflow": ({"a": entry([1 << 62, 1 << 62, 0], 0, 0)}, b"", "does not fit its bytes"),
    "many dimensions": ({"a": entry([1 << 62] * 2000, 0, 1)}, b"1", "does not fit its bytes"),
    "overlap": ({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, b"123", GAP),
    "hole at the front": ({"a\nb": entry([1], 1, 2)}, b"12", GAP),
    "trailing bytes": ({"a": entry([1], 0, 1)}, b"12", "its header speaks of .* bytes and the file has"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(tmp_path, case):
    """A header that claims what cannot be is refused in one short line that names the file and what is wrong."""
    header, data, message = HOSTILE[case]
    path = store(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ShortcutError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("length", "size"), [(3, 2), (0, 7), (100, 99 + 8), (1 << 63, 64), (100_000_001, 100_000_100)])
def test_headers_that_do_not_fit(tmp_path, length, size):
    """A header longer than its file, or than the format allows, is refused before it is read."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(length.to_bytes(8, "little")[:size])
    with path.open("r+b") as file:
        file.truncate(size)
    with pytest.raises(ShortcutError, match=f"its header does not fit into its {size} bytes"):
        read_header(path)


def test_files_that_are_none(tmp_path):
    """A missing file and a folder are told apart."""
    with pytest.raises(ShortcutError, match="gone is missing"):
        read_header(tmp_path / "gone")
    with pytest.raises(ShortcutError, match=r"cannot read .*: Is a directory"):
        read_header(tmp_path)


VALID = json.dumps(
    {"__metadata__": {"k": "v"}, "a": entry([2, 3], 0, 6), "b": entry([], 6, 8, "F16"), "c": entry([0], 8, 8)}
)
EDITS = st.tuples(
    st.integers(0, len(VALID)),
    st.integers(0, 3),
    st.binary(max_size=3) | st.sampled_from([b"-", b"0", b".0", b"\\ud800", b'"a":1,', b"e1", b" ", b"NaN", b"null"]),
)
NUMBERS = st.integers(-1, 9) | st.sampled_from([1 << 32, 1 << 62, 1 << 63, 1 << 64, True, 1.0])
ENTRIES = st.builds(entry, st.lists(NUMBERS, max_size=3), NUMBERS, NUMBERS, st.sampled_from(["U8", "F32", "F4", "F7"]))
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]), ENTRIES | st.dictionaries(st.just("k"), st.text())
)


@given(st.lists(EDITS, min_size=1, max_size=3) | HEADERS, st.binary(max_size=9))
@settings(max_examples=400, deadline=None)
def test_nothing_is_read_that_the_library_refuses(tmp_path_factory, change, data):
    """Of damaged and of made-up files, whatever the library refuses is a ShortcutError, and never anything else."""
    header = (VALID if isinstance(change, list) else json.dumps(change)).encode()
    for position, length, text in change if isinstance(change, list) else []:
        header, data = header[:position] + text + header[position + length :], b"12345678"
    path = store(tmp_path_factory.getbasetemp() / "fuzzed.safetensors", header, data)
    with contextlib.suppress(ShortcutError):
        names = [tensor.name for tensor in read_header(path).tensors]
        assert sorted(names) == sorted(name for name, _ in safetensors.deserialize(path.read_bytes()))
