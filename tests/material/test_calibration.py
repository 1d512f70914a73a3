"""The calibration set is what was asked for, the same every time, or an error."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortcut.common.errors import ShortcutError
from shortcut.material.calibration import make_batches, make_calibration, share_out
from shortcut.material.documents import Source
from tests.conftest import make_tokenizer
from tests.material.test_documents import CHAT, SHAREGPT, TEXTS, write

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


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
        (b"too short", {}, r"holds 0 sequences of 50 tokens and --samples asks it for 3"),
        (b"", {}, r"holds 0 sequences"),
        (b"caf\xe9 " * 99, {}, r"is not UTF-8 text: .* at byte 3"),
        (b"x" * 99, {"samples": 0}, r"--samples 0 is too small"),
        (b"x" * 99, {"length": 1}, r"--length 1 is too small"),
        (b"x" * 99, {"by_document": True}, r"holds 1 documents and --samples asks it for 3"),
        (b"x", {"by_document": True, "samples": 1}, r"holds 0 documents and --samples asks it for 1"),
    ],
)
def test_too_little_or_unreadable_text_is_an_error(
    content: bytes, options: dict[str, int], message: str, tmp_path: Path
) -> None:
    """An empty, short or wrongly encoded source stops with one line that says what there is."""
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ShortcutError, match=message):
        make_calibration(make_tokenizer(), Source(str(tmp_path / "a.txt")), **{"samples": 3, "length": 50, **options})


def write_chats(folder: Path) -> str:
    """Two conversations and a text, in a file."""
    rows = [{"messages": CHAT}, {"messages": SHAREGPT}]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "chats.jsonl")


@pytest.mark.parametrize("of_template", [False, True])
@pytest.mark.parametrize("of_tokenizer", [False, True])
@pytest.mark.parametrize("length", [11, 100])
def test_a_conversation_is_what_the_template_writes(
    of_tokenizer: bool, of_template: bool, length: int, tmp_path: Path
) -> None:
    """By document, a sequence is a conversation in chat format, cut at --length, with BOS once if anybody puts one."""
    tokenizer = make_tokenizer(bos=of_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" * of_template + TEMPLATE
    made = make_calibration(
        tokenizer, Source(write_chats(tmp_path), chat_template=True), samples=2, length=length, by_document=True
    )
    bos = "<s>" * (of_tokenizer or of_template)
    expected = tokenizer(f"{bos}[user]one</s>[assistant]two</s>", add_special_tokens=False)["input_ids"][:length]
    assert [list(row) for row in made.sequences] == [expected] * 2
    assert made.starts_with_bos is (of_tokenizer or of_template)
    assert "chats.jsonl text by the chat template, 2 sequences" in made.described
    if of_template or not of_tokenizer:
        assert tokenizer.apply_chat_template(CHAT, return_dict=False)[:length] == expected


def test_conversations_are_packed_as_documents_are(tmp_path: Path) -> None:
    """Packed, conversations are joined with EOS, and their own BOS does not come a second time."""
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    chat = Source(write_chats(tmp_path), chat_template=True)
    (only,) = make_calibration(tokenizer, chat, samples=1, length=52).sequences
    one = "[user]one</s>[assistant]two</s>"
    assert tokenizer.decode(only) == f"<s>{one}</s>{one}"
    assert only.count(tokenizer.bos_token_id) == 1


def test_text_becomes_a_message_of_the_user(tmp_path: Path) -> None:
    """With --chat-template a plain document is one message; an empty one stays nothing."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n{"text": ""}\n')
    chat = Source(str(tmp_path / "a.jsonl"), chat_template=True)
    (only,) = make_calibration(tokenizer, chat, samples=1, length=50, by_document=True).sequences
    assert tokenizer.decode(only) == "[user]hello</s>"
    with pytest.raises(ShortcutError, match="holds 1 documents and --samples asks it for 2"):
        make_calibration(tokenizer, chat, samples=2, length=50, by_document=True)


def test_a_template_that_writes_the_date_always_writes_the_same(tmp_path: Path) -> None:
    """The set does not change from one day to the next."""
    tokenizer = make_tokenizer()
    today = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d') }}"
    tokenizer.chat_template = "{% macro head() %}" + today + "{% endmacro %}{{ head() }}\n"
    chat = Source(write_chats(tmp_path), chat_template=True)
    (only,) = make_calibration(tokenizer, chat, samples=1, length=50, by_document=True).sequences
    assert tokenizer.decode(only) == "26 Jul 2024 2024-07-26"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the model's tokenizer has no chat template: leave out --chat-template"),
        (
            "{{ raise_exception('roles must\nalternate') }}",
            r"the chat template refuses the conversation \[{'role': 'user', .*: roles must alternate",
        ),
        ("{{ messages[0].content + 1 }}", r"refuses .*: can only concatenate str"),
        ("{% for", "refuses .*: unexpected 'end of template'"),
    ],
)
def test_a_template_that_is_missing_or_refuses(template: str | None, message: str, tmp_path: Path) -> None:
    """No chat template, and one that cannot write a conversation, are each one line."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ShortcutError, match=message) as caught:
        make_calibration(tokenizer, Source(write_chats(tmp_path), chat_template=True), samples=1, length=9)
    assert "\n" not in str(caught.value)


@given(st.integers(0, 500), st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=9))
def test_shares_add_up(total: int, weights: list[float]) -> None:
    """Shares add up to the total exactly, and none is a whole sequence away from its weight's part."""
    shares = share_out(total, weights)
    assert sum(shares) == total
    largest = max(weights)
    whole = sum(weight / largest for weight in weights)
    for share, weight in zip(shares, weights, strict=True):
        assert share == pytest.approx(total * (weight / largest) / whole, abs=1 + 1e-9)


def test_equal_remainders_go_to_the_first() -> None:
    """Equal weights share equally; what is left over goes to those named first."""
    assert share_out(8, [1, 1, 1]) == [3, 3, 2]
    assert share_out(10, [3, 1]) == [8, 2]
    assert share_out(10, [0.1, 0.2, 0.7]) == [1, 2, 7]


@pytest.mark.parametrize("by_document", [False, True])
def test_domains_give_their_shares(by_document: bool, tmp_path: Path) -> None:
    """Every domain gives as many sequences as its weight says, those it would give alone; the record says so."""
    paths = [write(tmp_path, ".jsonl"), write(tmp_path, ".csv")]
    how = {"length": 25, "seed": 3, "by_document": by_document}
    both = make_calibration(make_tokenizer(), Source(f"3*{paths[0]},{paths[1]}"), samples=8, **how)
    alone = [
        make_calibration(make_tokenizer(), Source(str(path)), samples=samples, **how).sequences
        for path, samples in zip(paths, (6, 2), strict=True)
    ]
    assert both.sequences == alone[0] + alone[1]
    assert both.record()["domains"] == [
        {"data": str(paths[0]), "weight": 3, "samples": 6},
        {"data": str(paths[1]), "weight": 1, "samples": 2},
    ]
    assert both.record()["samples"] == 8


def test_domains_are_the_same_everywhere() -> None:
    """The same seed gives the same sequences of several domains, on every machine and in every version."""
    one, again = (make_calibration(make_tokenizer(), Source("default,3*heldout"), samples=6, length=50) for _ in "12")
    assert one == again
    assert one.domains == (0, 0, 1, 1, 1, 1)
    assert one.hash == "06d9a47c91783fa9"


def test_every_domain_is_set_aside_in_proportion() -> None:
    """Setting aside takes the end of every domain, by its size, and leaves each at least one sequence."""
    both = make_calibration(make_tokenizer(), Source("2*default,heldout"), samples=15, length=50)
    kept, aside = both.split(3)
    assert (kept.domains, aside.domains) == ((0,) * 8 + (1,) * 4, (0, 0, 1))
    assert kept.sequences == both.sequences[:8] + both.sequences[10:14]
    assert aside.sequences == both.sequences[8:10] + both.sequences[14:]
    assert [domain["samples"] for domain in kept.record()["domains"]] == [8, 4]
    assert [part.domains for part in both.split(13)] == [(0, 1), (0,) * 9 + (1,) * 4]
    with pytest.raises(ShortcutError, match="cannot set 14 of 15 sequences aside and keep one of every text"):
        both.split(14)


@pytest.mark.parametrize(
    ("data", "samples", "message"),
    [
        ("default,heldout,{short}", 2, "--samples 2 leaves none for .*short.txt: use more, or give it more weight"),
        ("9*default,heldout", 3, "--samples 3 leaves none for heldout"),
        ("default,{short}", 2, r"^[^,]*short.txt holds 0 sequences of 50 tokens and --samples asks it for 1"),
        ("default,{empty}", 2, r"^[^,]*empty.txt holds 0 sequences of 50 tokens and --samples asks it for 1"),
        ("default,gone.txt", 2, "no file gone.txt"),
        ("default,0*heldout", 2, "the weight '0' is not a positive number"),
    ],
)
def test_domains_that_give_nothing(data: str, samples: int, message: str, tmp_path: Path) -> None:
    """A domain without a sequence of its own is one line that names it."""
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").touch()
    data = data.format(short=tmp_path / "short.txt", empty=tmp_path / "empty.txt")
    with pytest.raises(ShortcutError, match=message):
        make_calibration(make_tokenizer(), Source(data), samples=samples, length=50)
