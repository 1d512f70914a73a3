"""The calibration set is what was asked for, the same every time, or an error."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from shortcut.errors import ShortcutError
from shortcut.scoring.calibration import Source, make_batches, make_calibration, read_documents
from tests.conftest import make_tokenizer

TEXTS = [f"document {number}: " + "words and more words. " * (number + 1) for number in range(9)]


def write(folder: Path, suffix: str, column: str = "text") -> Path:
    """The documents in a file of one of the formats."""
    path, rows = folder / f"data{suffix}", [{column: text, "number": i} for i, text in enumerate(TEXTS)]
    data = Dataset.from_list(rows)
    match suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            data.to_csv(path, index=False)
        case ".parquet":
            data.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_are_read_without_the_hub(suffix: str, tmp_path: Path) -> None:
    """Every format gives the same documents, in an order that the seed decides."""
    path = write(tmp_path, suffix)
    documents = list(read_documents(Source(str(path)), seed=1))
    assert sorted(documents) == sorted(TEXTS)
    assert documents == list(read_documents(Source(str(path)), seed=1))
    assert documents != list(read_documents(Source(str(path)), seed=2))


def test_the_column_can_be_named(tmp_path: Path) -> None:
    """--column picks the text; without it an unusual name is an error that lists the columns."""
    path = write(tmp_path, ".jsonl", column="body")
    assert sorted(read_documents(Source(str(path), column="body"), 0)) == sorted(TEXTS)
    with pytest.raises(ShortcutError, match="Name it with --column: body, number"):
        list(read_documents(Source(str(path)), 0))
    with pytest.raises(ShortcutError, match=r"no column .content. in .*data\.jsonl; it has: body, number"):
        list(read_documents(Source(str(path), column="content"), 0))
    with pytest.raises(ShortcutError, match="column 'number' of .* holds int, not text"):
        list(read_documents(Source(str(path), column="number"), 0))


def test_packing_joins_documents(tmp_path: Path) -> None:
    """Packed windows have exactly the length, consecutive ones continue each other, documents end with EOS."""
    tokenizer = make_tokenizer()
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    packed = make_calibration(tokenizer, Source(str(tmp_path / "a.txt")), samples=5, length=5)
    assert "".join(tokenizer.decode(row) for row in packed.sequences) == "abcdefghijklmnopqrstuvwxy"
    (tmp_path / "b.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    (only,) = make_calibration(tokenizer, Source(str(tmp_path / "b.jsonl")), samples=1, length=5).sequences
    assert tokenizer.decode(only) in ("ab</s>cd", "cd</s>ab")


def test_the_seed_decides() -> None:
    """The same seed gives the same set and hash, another seed another."""
    one, again, other = (
        make_calibration(make_tokenizer(), Source(), samples=4, length=50, seed=seed) for seed in (3, 3, 4)
    )
    assert one == again
    assert one.hash == again.hash
    assert one.hash != other.hash
    # Fixed: the set must be the same on every machine and in every version.
    assert one.hash == "19d4d45607ceeb57"
    assert one.record()["tokens"] == 200


def test_bos_comes_first_where_the_tokenizer_puts_it() -> None:
    """Every sequence starts with BOS if the tokenizer does so, within the length; the record says which."""
    with_bos = make_calibration(make_tokenizer(bos=True), Source(), samples=3, length=20)
    without = make_calibration(make_tokenizer(), Source(), samples=3, length=20)
    assert [(row[0], len(row)) for row in with_bos.sequences] == [(1, 20)] * 3
    assert all(1 not in row[1:] for row in with_bos.sequences)
    assert all(1 not in row for row in without.sequences)
    assert (with_bos.record()["starts_with_bos"], without.record()["starts_with_bos"]) == (True, False)


@pytest.mark.parametrize("by_document", [False, True])
def test_bos_comes_once(by_document: bool, tmp_path: Path) -> None:
    """However many documents are in a sequence, and also where each is its own: one BOS, at the front."""
    path = write(tmp_path, ".jsonl")
    sequences = make_calibration(
        make_tokenizer(bos=True), Source(str(path)), samples=9, length=100, by_document=by_document
    ).sequences
    assert [[place for place, token in enumerate(row) if token == 1] for row in sequences] == [[0]] * 9
    assert any(2 in row for row in sequences) == (not by_document)  # the end of one document, and another after it


def test_documents_are_padded_and_masked(tmp_path: Path) -> None:
    """By document, sequences keep their own length, are cut at --length, and padded on the right in a batch."""
    path = write(tmp_path, ".jsonl")
    calibration = make_calibration(make_tokenizer(), Source(str(path)), samples=9, length=100, by_document=True)
    lengths = sorted(min(len(text), 100) for text in TEXTS)
    assert sorted(map(len, calibration.sequences)) == lengths
    batches = make_batches(calibration, 4)
    assert [len(batch.ids) for batch in batches] == [4, 4, 1]
    rows = [tuple(ids[mask].tolist()) for batch in batches for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    assert tuple(rows) == calibration.sequences
    assert all(bool(mask[: int(mask.sum())].all()) for batch in batches for mask in batch.mask)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"too short", {}, r"holds 0 sequences of 50 tokens and --samples asks for 3"),
        (b"", {}, r"holds 0 sequences"),
        (b"caf\xe9 " * 99, {}, r"is not UTF-8 text: .* at byte 3"),
        (b"x" * 99, {"samples": 0}, r"--samples 0 is too small"),
        (b"x" * 99, {"length": 1}, r"--length 1 is too small"),
        (b"x" * 99, {"by_document": True}, r"holds 1 documents and --samples asks for 3"),
    ],
)
def test_too_little_or_unreadable_text_is_an_error(
    content: bytes, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    """An empty, short or wrongly encoded source stops with one line that says what there is."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ShortcutError, match=message):
        make_calibration(make_tokenizer(), Source(str(tmp_path / "a.txt")), **{"samples": 3, "length": 50, **options})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "no file .*nothing.txt"),
        ("nothing.jsonl", "no file .*nothing.jsonl"),
        ("picture.png", "cannot read .*picture.png: --data takes .txt, .jsonl"),
        ("broken.jsonl", "cannot read the data set .*broken.jsonl: "),
    ],
)
def test_wrong_files_are_errors(name: str, message: str, tmp_path: Path) -> None:
    """A missing file, an unknown kind and a damaged one are each one line."""
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "broken.jsonl").write_text('{"text": \n{{{')
    with pytest.raises(ShortcutError, match=message) as caught:
        list(read_documents(Source(str(tmp_path / name)), 0))
    assert "\n" not in str(caught.value)


def test_a_hub_set_offline_is_an_error() -> None:
    """A Hub id without network is one line."""
    with pytest.raises(ShortcutError, match="cannot read the data set org/none: "):
        list(read_documents(Source("org/none"), 0))
