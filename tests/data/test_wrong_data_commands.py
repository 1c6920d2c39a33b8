"""Wrong data as a user meets it: `slothcore train` ends with one line and leaves nothing, or skips and counts."""

import gzip
import json
import re
from pathlib import Path

import pytest

from slothcore.cli import main
from slothcore.data.prepared_cache import HOME_VARIABLE
from tests.training.tiny import write_model

GOOD = {"prompt": "a", "completion": "b"}
JUDGED = {**GOOD, "label": True}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
TASK = {"instruction": "a", "output": "b"}
ASKED = {"from": "human", "value": "a"}


def chat(*contents: object, **more: object) -> dict:
    roles = ("user", "assistant")
    messages = [
        content if isinstance(content, dict) and "role" in content else {"role": roles[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]
    return {"messages": messages, **more}


CHAT = chat("hi", "ho")
SHAREGPT = {"conversations": [ASKED, {"from": "gpt", "value": "b"}]}
CALLS = {"role": "assistant", "content": None}

# One row between good ones: a good row, the wrong one, what is said of it.
ROWS: dict[str, tuple[dict, object, str]] = {
    "zero bytes": (GOOD, b"\0\0\0", "line 2: not valid JSON"),
    "two objects in a line": (GOOD, json.dumps(GOOD).encode() * 2, r"line 2: not valid JSON \(Extra data\); repair"),
    "a byte order mark in the middle": (GOOD, b"\xef\xbb\xbf{}", "line 2: not valid JSON .*BOM.*; repair the line"),
    "not a number": (GOOD, b'{"prompt": NaN, "completion": "b"}', "line 2: 'prompt' must be text, got float nan; fill"),
    "infinite": (GOOD, b'{"prompt": "a", "completion": Infinity}', "line 2: 'completion' must be text, got float inf"),
    "a number without end": (
        GOOD,
        b'{"prompt": %s, "completion": "b"}' % (b"9" * 5000),
        "line 2: a number has thousands of digits; write it as text",
    ),
    "nested without end": (GOOD, b'{"prompt": ' + b"[" * 100_000, "line 2: lists or objects are nested too deeply"),
    "a judgement in words": (JUDGED, {**GOOD, "label": "good"}, "line 2: 'label' must be true or false; say there"),
    "a chosen number": (
        PAIR,
        {**PAIR, "chosen": 5},
        "line 2: 'chosen' must be an answer or a list of messages, got int",
    ),
    "a table for an input": (
        TASK,
        {**TASK, "input": {"x": 1}},
        r"line 2: 'input' must be text, got dict \{'x': 1\}; w",
    ),
    "a truth for an answer": (TASK, {**TASK, "output": False}, "line 2: 'output' must be text, got bool False; write"),
    "an unknown speaker": (
        SHAREGPT,
        {"conversations": [{**ASKED, "from": "alien"}, {"from": "gpt", "value": "b"}]},
        "line 2, message 1: unknown speaker 'alien'; known are user, human",
    ),
    "a speaker without a word": (
        SHAREGPT,
        {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]},
        "line 2, message 1: needs 'from' and 'value', has 'from'; name them so",
    ),
    "an object for a conversation": (CHAT, {"messages": {"role": "user"}}, "line 2: a conversation must be a list of"),
    "a number for a conversation": (CHAT, {"messages": 5}, "line 2: a conversation must be a list .*, got int 5; fill"),
    "a role that is null": (
        CHAT,
        chat({"role": None, "content": "a"}, "b"),
        "line 2, message 1: unknown role None; kn",
    ),
    "an object for a text": (
        CHAT,
        chat({"role": "user", "content": {"a": 1}}, "b"),
        "line 2, message 1: 'content' must",
    ),
    "parts of nothing": (CHAT, chat([], "b"), "line 2, message 1: 'content' is empty; write what the user says, or"),
    "parts of numbers": (CHAT, chat([1, 2], "b"), "line 2: message 1 has a part of type int; only text can be learned"),
    "a picture": (
        CHAT,
        chat([{"type": "image_url", "image_url": {"url": "x"}}], "b"),
        "line 2: message 1 has a part of type 'image_url'; only text can be learned from, take it out",
    ),
    "half a character in a part": (
        CHAT,
        chat([{"type": "text", "text": "\ud800"}], "b"),
        r"line 2: the conversation holds half a character \(\\ud800 at position \d+\); repair the text",
    ),
    "half a character in an answer": (
        CHAT,
        chat("a", "b\udc00"),
        r"line 2, message 2 holds half a character \(\\udc00",
    ),
    "a result without a call": (
        CHAT,
        chat({"role": "tool", "content": "a"}, "b"),
        "line 2, message 1: the result of a tool begins the conversation; put the assistant's call before it",
    ),
    "calls that are no list": (
        CHAT,
        chat("a", {**CALLS, "tool_calls": {"x": 1}}),
        r"line 2, message 2: 'tool_calls' must be a list of objects, got dict \{'x': 1\}; write it so",
    ),
    "calls that are numbers": (
        CHAT,
        chat("a", {**CALLS, "tool_calls": [1]}),
        r"line 2, message 2: 'tool_calls' must be a list of objects, got list \[1\]; write it so",
    ),
    "tools that are a number": (
        CHAT,
        chat("a", "b", tools=5),
        "line 2: 'tools' must be a list of objects, got int 5; w",
    ),
    "tools that are half JSON": (
        CHAT,
        chat("a", "b", tools="[{"),
        r"line 2: 'tools' must be a list of objects, got st",
    ),
    "a system prompt of numbers": (
        CHAT,
        chat("a", "b", system=[5]),
        r"line 2: 'system' must be text, got list \[5\]; w",
    ),
    "a role that the template does not know": (
        CHAT,
        chat({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, "c", "d"),
        "line 2: the chat template rejects this conversation: .*; change it, or choose another chat_template",
    ),
}

# The file as a whole: its name, its bytes, what is said of it. There is nothing to skip.
FILES: dict[str, tuple[str, bytes, str]] = {
    "a page of the web": (
        "a.json",
        b"\n<!DOCTYPE html><html>",
        "a.json is a page of the web, such as a login .*; down",
    ),
    "an error page": ("a.jsonl", b"<html>\n<body>", "a.jsonl is a page of the web"),
    "a pointer of Git LFS": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\n",
        "a pointer of Git LFS .*; fetch",
    ),
    "a spreadsheet": ("a.csv", b"PK\x03\x04\x00\xff", "a.csv is a zip archive or a spreadsheet; unpack it, or save it"),
    "Parquet under another name": ("a.jsonl", b"PAR1\x15", "a.jsonl is a Parquet file; name it .parquet"),
    "gzip under another name": ("a.jsonl", gzip.compress(b"{}"), "a.jsonl is compressed by gzip; add .gz to its name"),
    "no Parquet": ("a.parquet", b"PAR1 no", "a.parquet is not a Parquet file .*; download or write it again"),
    "packed rubbish": ("a.json.gz", gzip.compress(b"\x80"), "a.json.gz, line 1: byte 0x80 is not UTF-8; save the file"),
    "semicolons": (
        "a.csv",
        b"prompt;completion\na;b\n",
        "a.csv, line 1: ';' stands between the columns instead of a c",
    ),
    "tabs": ("a.csv", b"prompt\tcompletion\na\tb\n", r"a.csv, line 1: '\\t' stands between .*, or with tabs as .tsv"),
    "no header": (
        "a.csv",
        b"What?,That.\nWho?,Me.\n",
        "a.csv, line 2 has the fields 'What.', 'That.', but needs .*ren",
    ),
    "a comma too many": ("a.json", b'[{"text": "a"},]', r"a.json, line 1: not valid JSON \(.*\); repair it there"),
    "one object": (
        "a.json",
        b'{"prompt": "a", "completion": "b"}',
        "a.json holds one object with 0 lists; give a list",
    ),
    "a number in a list": ("a.json", b"[%s]" % (b"9" * 5000), "a.json holds a number of thousands of digits; write it"),
    "an object over many lines": (
        "a.jsonl",
        json.dumps(GOOD, indent=1).encode(),
        "a.jsonl.*, line 1: .*; the line breaks",
    ),
    "Python's notation": (
        "a.jsonl",
        b"{'prompt': 'a', 'completion': 'b'}",
        "a.jsonl.*, line 1: not valid JSON .*; repair",
    ),
    "no ending": ("train", b"{}", r"train has the extension '\(none\)'; known are .*: rename it or convert it"),
    "nothing but long prompts": (
        "a.jsonl",
        json.dumps({"prompt": "x" * 3000, "completion": "b"}).encode(),
        "no row is left .*a.jsonl, line 1: .*the first word to learn is token .*; raise max_seq_length, or shorten",
    ),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model", max_position_embeddings=1024)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(data: str, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    capsys.readouterr()
    words = f"train --model model --output-dir run --bits 32 --device cpu --max-steps 1 --plot false --data {data}"
    status = main([*words.split(), *flags])
    return status, *capsys.readouterr()


def check_refused(status: int, error: str, message: str, here: Path, before: set[Path]) -> None:
    assert status == 1
    assert re.fullmatch(r"slothcore: error: [^\n]+\n", error), error
    assert re.search(message, error), error
    assert set(here.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize("kind", ROWS)
def test_a_wrong_row(here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    good, row, message = ROWS[kind]
    lines = [json.dumps(good).encode(), row if isinstance(row, bytes) else json.dumps(row).encode()]
    (here / "a.jsonl").write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")
    before = set(here.rglob("*"))
    status, _, error = train("a.jsonl", capsys)
    check_refused(status, error, f"error: a.jsonl, ({message})", here, before)
    assert error.endswith("; or leave such rows out with on_bad_row: skip\n"), "one row of a good file"
    status, output, error = train("a.jsonl", capsys, "--on-bad-row", "skip")
    assert (status, error) == (0, "")
    assert re.search(
        f"training: (a.jsonl: 1 row skipped as unusable; first|.*first left out: a.jsonl,) ({message})", output
    )
    assert ": 1 row skipped as unusable; " in output or "; 1 wrong one skipped\n" in output
    assert re.search(r"training: [23] records gave 2 rows", output), "the good ones are trained on"


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file(here: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, message = FILES[kind]
    (here / name).write_bytes(content)
    before = set(here.rglob("*"))
    for flags in ([], ["--on-bad-row", "skip"]):
        status, _, error = train(name, capsys, *flags)
        check_refused(status, error, message, here, before)


def test_answers_of_no_parts_are_left_out(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "a.jsonl").write_text("\n".join(map(json.dumps, [CHAT, chat("a", []), chat("a", [" "]), CHAT])))
    status, output, error = train("a.jsonl", capsys)
    assert (status, error) == (0, "")
    assert "training: a.jsonl: 2 rows with an empty answer left out; first line 2\n" in output


def test_there_are_enough_kinds() -> None:
    from tests.data import test_wrong_data

    kinds = [*test_wrong_data.FILES, *test_wrong_data.ROWS, *test_wrong_data.TURNS, *ROWS, *FILES]
    assert len(kinds) >= 80
    assert len(set(kinds)) == len(kinds)
