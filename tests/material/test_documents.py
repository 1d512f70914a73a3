"""Documents are read as they are, in a reproducible order, or there is an error that says what was found."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from shortcut.common.errors import ShortcutError
from shortcut.material.documents import Source, _rows_under, parse_domains, read_documents

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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.txt", "no file .*nothing.txt"),
        ("nothing.jsonl", "no file .*nothing.jsonl"),
        ("picture.png", "cannot read .*picture.png: --data takes .txt, .jsonl"),
        ("broken.jsonl", "cannot read the data set .*broken.jsonl: "),
        ("empty.jsonl", "cannot read the data set .*empty.jsonl: it is empty"),
        ("empty.csv", "cannot read the data set .*empty.csv: No columns"),
        ("empty.parquet", "cannot read the data set .*empty.parquet: .* no data"),
    ],
)
def test_wrong_files_are_errors(name: str, message: str, tmp_path: Path) -> None:
    """A missing file, an unknown kind, a damaged one and an empty one are each one line."""
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "broken.jsonl").write_text('{"text": \n{{{')
    for empty in ("empty.jsonl", "empty.csv"):
        (tmp_path / empty).touch()
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ShortcutError, match=message) as caught:
        list(read_documents(Source(str(tmp_path / name)), 0))
    assert "\n" not in str(caught.value)


def test_a_hub_set_offline_is_an_error() -> None:
    """A Hub id without network is one line."""
    with pytest.raises(ShortcutError, match="cannot read the data set org/none: "):
        list(read_documents(Source("org/none"), 0))


CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
SHAREGPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": CHAT, "text": "no"}, None),
        ({"conversations": SHAREGPT, "text": "no"}, None),
        ({"conversations": CHAT, "messages": "no"}, "conversations"),
        ({"turns": SHAREGPT}, None),
        ({"turns": CHAT, "text": "no"}, "turns"),
    ],
)
def test_conversations_are_found(row: dict[str, object], column: str | None, tmp_path: Path) -> None:
    """With --chat-template a list of messages is found by its column's name or by --column, in both forms there are."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    source = Source(str(tmp_path / "a.jsonl"), column=column, chat_template=True)
    assert list(read_documents(source, 0)) == [CHAT]


@pytest.mark.parametrize(
    ("row", "chat_template", "message"),
    [
        (
            {"id": 1, "messages": CHAT},
            False,
            "column 'messages' of .*a.jsonl holds messages: they need --chat-template",
        ),
        ({"id": 1, "conversations": SHAREGPT}, False, "column 'conversations' of .* they need --chat-template"),
        ({"messages": ["one", "two"]}, True, "column 'messages' of .* holds list, not text or messages"),
        ({"messages": [{"role": "user"}]}, True, "column 'messages' of .* holds list, not text or messages"),
        (
            {"messages": {"role": "user", "content": "a"}},
            True,
            "column 'messages' of .* holds dict, not text or messages",
        ),
        ({"id": 1, "turns": CHAT}, True, "which column of .* is the text\\? Name it with --column: id, turns"),
    ],
)
def test_what_is_no_conversation(row: dict[str, object], chat_template: bool, message: str, tmp_path: Path) -> None:
    """Messages without --chat-template, and what is neither text nor messages, are errors that say what to do."""
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ShortcutError, match=message):
        list(read_documents(Source(str(tmp_path / "a.jsonl"), chat_template=chat_template), 0))


def test_contents_that_are_not_plain_text(tmp_path: Path) -> None:
    """None beside a call of a tool is no text, and parts that are text are one; rows may be under a name."""
    chat: list[dict[str, object]] = [
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
    ]
    (tmp_path / "chats.json").write_text(json.dumps({"version": 1, "data": [{"messages": chat}]}))
    (found,) = read_documents(Source(str(tmp_path / "chats.json"), chat_template=True), 0)
    assert [message["content"] for message in found] == ["one two", ""]
    assert [sorted(message) for message in found] == [["content", "role"], ["content", "role", "tool_calls"]]


def test_a_file_of_columns_is_no_list_of_rows(tmp_path: Path) -> None:
    """A single column of texts under its name is read as before."""
    (tmp_path / "columns.json").write_text(json.dumps({"text": ["one", "two"]}))
    assert _rows_under(tmp_path / "columns.json") is None
    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": [{"text": "one"}]}))
    assert list(read_documents(Source(str(tmp_path / "rows.json")), 0)) == ["one"]


def test_text_beside_messages_is_text_without_the_switch(tmp_path: Path) -> None:
    """Where there are both, a column of text wins without --chat-template."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT, "text": "yes"}))
    assert list(read_documents(Source(str(tmp_path / "a.jsonl")), 0)) == ["yes"]


@pytest.mark.parametrize(
    ("data", "domains"),
    [
        ("default", {"default": 1}),
        ("org/name:subset, heldout", {"org/name:subset": 1, "heldout": 1}),
        ("3*a.txt,0.5*b c.jsonl, 1e1 * d", {"a.txt": 3, "b c.jsonl": 0.5, "d": 10}),
    ],
)
def test_domains_are_parsed(data: str, domains: dict[str, float]) -> None:
    """Several texts stand between commas, each after its weight; without one it weighs 1."""
    assert parse_domains(data) == domains


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("0*a.txt,b.txt", "0\\*a.txt,b.txt: the weight '0' is not a positive number, such as in \"3\\*a.txt,b.jsonl\""),
        ("-1*a.txt", "the weight '-1' is not a positive number"),
        ("nan*a.txt", "the weight 'nan' is not a positive number"),
        ("inf*a.txt", "the weight 'inf' is not a positive number"),
        ("much*a.txt", "the weight 'much' is not a positive number"),
        ("*a.txt", "the weight '' is not a positive number"),
        ("texts/*.jsonl", "the weight 'texts/' is not a positive number"),
        ("a.txt,", "'a.txt,' lacks the name of a text, or has a comma too many"),
        ("3*", "'3\\*' lacks the name of a text"),
        ("", "'' lacks the name of a text"),
        ("a.txt,b.txt,3*a.txt", 'names a.txt twice: give it a weight instead, as in "2\\*a.txt"'),
        ("a.txt,./a.txt", "names ./a.txt twice"),
    ],
)
def test_domains_that_make_no_sense(data: str, message: str) -> None:
    """A weight that is not a positive number, a missing name and a text named twice are each one line."""
    with pytest.raises(ShortcutError, match=message):
        parse_domains(data)
