"""Wrong data of many kinds: each ends in one sentence with file, place and remedy; a wrong row can be skipped."""

import gzip
import json
import re
from pathlib import Path

import pytest

from slothcore.data import readers
from slothcore.data.dataset import open_dataset

GOOD = {"prompt": "a", "completion": "b"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}


def chat(*turns: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(*rows: object) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


# The whole file cannot be read, or holds nothing.
FILES = {
    "an empty file": ("a.jsonl", b"", "a.jsonl holds no records; give a file with at least one"),
    "only a header": ("a.csv", b"prompt,completion\r\n", "a.csv holds no records; give a file"),
    "an empty CSV": ("a.csv", b"", "a.csv holds no records; give a file"),
    "an empty list": ("a.json", b"[]", "a.json holds no records; give a file"),
    "blank text": ("a.txt", b" \r\n\t", "a.txt holds no records; give a file"),
    "JSON that is not UTF-8": ("a.json", b'[\n{"text": "na\xefve"}]', "a.json, line 2: byte 0xef is not UTF-8; save"),
    "CSV that is not UTF-8": ("a.csv", b"text\nna\xefve\n", "a.csv, line 2: byte 0xef is not UTF-8; save the file"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "a.txt, line 1: byte 0xff is not UTF-8, it looks like UTF-16; save"),
    "half a JSON file": (
        "a.json",
        b'[{"text": "a"},\n{"text"',
        "a.json, line 2: not valid JSON .*breaks off: write or",
    ),
    "JSON lines in .json": (
        "a.json",
        b'{"text": "a"}\n{"text": "b"}',
        "line 2: .*; one object a line is JSON lines: name",
    ),
    "JSON that is no list": ("a.json", b'"text"', "a.json holds a str; give a list of records"),
    "JSON with two lists": ("a.json", b'{"a": [], "b": []}', "a.json holds one object with 2 lists; give a list"),
    "a column twice": ("a.csv", b"text,id,text\na,1,b\n", "a.csv: the header names the column 'text' twice; rename"),
    "a column without name": (
        "a.csv",
        b"text,\na,b\n",
        "a.csv, line 1: the header has a column without a name; name it",
    ),
    "an open quote": ("a.csv", b'text\n"a\n', r"a.csv, line 2: not valid CSV \(.*\); repair its quotes"),
    "half a gzip file": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-20], "a.jsonl.gz is not a whole gzip"),
    "no gzip file": ("a.jsonl.gz", b'{"text": "a"}', "a.jsonl.gz is not a whole gzip file .*; pack it again"),
    "an unknown kind": ("a.xlsx", b"PK", "a.xlsx has the extension '.xlsx'; known are .*: rename it or convert it"),
}

# One row of a file that is fine otherwise.
ROWS = {
    "half a line": ('{"prompt": "a", "compl', "line 2: not valid JSON .*; the line breaks off: write one whole object"),
    "no JSON": ("{'prompt': 'a'}", "line 2: not valid JSON .*; repair the line, or drop it"),
    "bytes that are not UTF-8": (b'{"prompt": "\xff", "completion": "b"}', "line 2: byte 0xff is not UTF-8; save"),
    "a list": ([1, 2], "line 2 must be an object with named fields, got list"),
    "nothing": (None, "line 2 must be an object with named fields, got NoneType"),
    "a field too few": (
        {"prompt": "a"},
        "line 2 lacks 'completion': it has the fields 'prompt', .*; rename the fields",
    ),
    "a field misspelled": (
        {"promt": "a", "completion": "b"},
        "line 2 lacks 'prompt': it has the fields 'promt', 'compl",
    ),
    "null for text": ({**GOOD, "completion": None}, "line 2: 'completion' must be text, got NoneType None; fill it in"),
    "a list for text": (
        {**GOOD, "prompt": ["a"]},
        r"line 2: 'prompt' must be text, got list \['a'\]; write it as text",
    ),
    "true for text": ({**GOOD, "prompt": True}, "line 2: 'prompt' must be text, got bool True; write it as text"),
    "half a character": (
        b'{"prompt": "\\ud800", "completion": "b"}',
        "line 2: 'prompt' holds half a character .*; rep",
    ),
    "another format": (CHAT, "line 2 has the format messages, and the first record of the file prompt; keep one"),
    "too long": (
        {**GOOD, "completion": "x" * 2000},
        "line 2: the row has 2,034 bytes, more than the 1,000 that .*; cut",
    ),
    "nested too deeply": (b"[" * 900, "line 2: not valid JSON|line 2: lists or objects are nested too deeply; flatten"),
}
TURNS = {
    "an empty conversation": (
        {"messages": []},
        r"line 2: a conversation must be a list of at least one message, got list",
    ),
    "text for a conversation": ({"messages": "hi"}, "line 2: a conversation must be a list .*, got str 'hi'; fill it"),
    "null for one": (
        {"messages": None},
        "line 2: a conversation must be a list .*, got NoneType None; fill it or drop",
    ),
    "a turn that is text": (
        {"messages": ["hi"]},
        "line 2, message 1: needs 'role' and 'content', has str; write it as",
    ),
    "a turn without text": (
        {"messages": [{"role": "user"}]},
        "line 2, message 1: needs 'role' and 'content', has 'role'",
    ),
    "an unknown role": (chat(("cat", "a")), "line 2, message 1: unknown role 'cat'; known are user, human"),
    "roles out of order": (
        chat(("assistant", "a"), ("user", "b")),
        "line 2, message 1: the conversation begins with 'as",
    ),
    "a missing turn": (
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        "line 2, message 2: 'user' speaks twice",
    ),
    "a late system prompt": (
        chat(("user", "a"), ("system", "b"), ("assistant", "c")),
        "line 2, message 2: a system pro",
    ),
    "nobody answers": (chat(("user", "a")), "line 2: nobody answers in this conversation; add the assistant's turn"),
    "a number for text": (
        chat(("user", 5), ("assistant", "a")),
        "line 2, message 1: 'content' must be text, got int 5; w",
    ),
    "null for a text": (
        chat(("user", "a"), ("assistant", None)),
        "line 2, message 2: 'content' must be text, got NoneT",
    ),
    "an empty question": (chat(("user", " "), ("assistant", "a")), "line 2, message 1: 'content' is empty; write what"),
    "tools that are none": ({**CHAT, "tools": {"name": "f"}}, "line 2: 'tools' must be a list of objects, got dict"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    name, content, message = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(ValueError, match=message) as caught:
            open_dataset(path, on_bad_row=on_bad_row)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [*ROWS, *TURNS])
def test_a_row_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(readers, "LONGEST_ROW", 1000)
    good = GOOD if kind in ROWS else CHAT
    row, message = {**ROWS, **TURNS}[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(good, row.encode() if isinstance(row, str) else row, good))
    with pytest.raises(ValueError, match=re.escape(str(path)) + f", ({message})") as error:
        open_dataset(path)
    assert str(error.value).endswith("; or leave such rows out with on_bad_row: skip"), "one row of a good file"
    dataset = open_dataset(path, on_bad_row="skip")
    assert list(dataset) == [good, good]
    begin = f"{path}: 1 row skipped as unusable; first "
    (note,) = [note for note in dataset.notes if note.startswith(begin)]
    assert re.match(f"({message})", note.removeprefix(begin)), "the file is named once, at the beginning"


def test_the_first_skipped_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(GOOD, *[{"prompt": n} for n in range(5)]))
    (note,) = [n for n in open_dataset(path, on_bad_row="skip").notes if "skipped as unusable" in n]
    assert "5 rows" in note
    assert [f"line {n}" in note for n in (2, 3, 4, 5)] == [True, True, True, False]


def test_nothing_but_rows_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"a": 1}, {"a": 2}))
    with pytest.raises(
        ValueError, match=r"a.jsonl: none of 2 rows can be used; the first: .* has the fields 'a', but needs"
    ):
        open_dataset(path, on_bad_row="skip")
    path.write_bytes(lines({**GOOD, "label": False}))
    with pytest.raises(ValueError, match="all answers are judged bad; give some with label true"):
        open_dataset(path)
    path.write_bytes(lines({**GOOD, "completion": " "}))
    with pytest.raises(ValueError, match=r"all answers are empty \(first .*a.jsonl, line 1\); fill them in"):
        open_dataset(path)


def test_rows_of_a_table_that_do_not_fit_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'prompt,completion\r\n"a\nb",c\r\na\r\na,b,c\r\nd,e\r\n')
    with pytest.raises(
        ValueError, match=r"a.csv, line 4: the row has not as many values as the header \(2\), but 1; quote"
    ):
        open_dataset(path)
    dataset = open_dataset(path, on_bad_row="skip")
    assert [record["prompt"] for record in dataset] == ["a\nb", "d"]
    assert any("2 rows skipped as unusable; first line 4: " in note for note in dataset.notes)


def test_empty_answers_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({**GOOD, "completion": "\n"}, GOOD))
    dataset = open_dataset(path)
    assert list(dataset) == [GOOD]
    assert dataset.notes == (
        f"{path}: format prompt; 1 of 2 rows are used",
        f"{path}: 1 row with an empty answer left out; first line 1",
    )
    path.write_bytes(lines(chat(("user", "a"), ("assistant", "")), CHAT))
    assert list(open_dataset(path)) == [CHAT]


def test_ids_that_come_again_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(*[{**GOOD, "id": identity} for identity in ("x", "y", "x")]))
    note = f"{path}: 1 row with the id of an earlier one, first 'x' at line 3; drop what is a copy"
    assert note in open_dataset(path).notes


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_byte_order_mark_and_carriage_returns_are_no_fault(tmp_path: Path, name: str) -> None:
    contents = {
        "a.jsonl": b'{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "a", "completion": "b"}\r\n',
        "a.json": b'[{"prompt": "a", "completion": "b"},\r\n{"prompt": "a", "completion": "b"}]\r\n',
        "a.csv": b"prompt,completion\r\na,b\r\n\r\na,b\r\n",
    }
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + contents[name])
    assert list(open_dataset(path)) == [GOOD, GOOD]


def test_ten_megabytes_in_one_row(tmp_path: Path) -> None:
    for name, content in {"a.jsonl": lines({"text": "x" * 10**7}), "a.csv": b"text\n" + b"x" * 10**7}.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"{name}, line \d: the row has 10,000,0.* keep running text in a .txt file"
        ):
            open_dataset(path)
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 10**7)
    assert open_dataset(path).notes == (f"{path}: format document; 5 of 5 pieces are used",)


def test_what_only_looks_like_another_kind_of_file_is_read(tmp_path: Path) -> None:
    for name, content in {
        "a.csv": b"Par1,text\n1,a\n",
        "a.txt": b"<html> is how a page begins",
        "b.csv": b"text\n<HTML>\n",
        "c.csv": b"text;more\na\n",
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        if name == "c.csv":
            with pytest.raises(ValueError, match="';' stands between the columns"):
                open_dataset(path)
        else:
            assert len(open_dataset(path)) == 1
