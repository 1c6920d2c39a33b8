"""Data files: what is read from each kind, and errors with file, line and remedy."""

import json
from pathlib import Path

import pytest

from slothcore.data.files import load_dataset

RECORDS = [{"text": 'one, "two"\nthree'}, {"text": "日本\u2028語"}]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps(RECORDS)),
        ("wrapped.json", json.dumps({"version": 1, "data": RECORDS}, indent=1)),
        ("lines.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n\n"),
        ("bom.jsonl", b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r) for r in RECORDS).encode()),
        ("table.csv", 'text\r\n"one, ""two""\nthree"\r\n日本\u2028語\r\n'),
        ("table.TSV", 'text\n"one, ""two""\nthree"\n日本\u2028語\n'),
    ],
)
def test_kinds(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert load_dataset(write(tmp_path / name, content)) == RECORDS


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    text = "First paragraph.\n\nSecond.\n"
    assert load_dataset(write(tmp_path / "a.txt", text), format="alpaca") == [{"document": text}]


def test_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.json", json.dumps([{"text": name}]))
    write(tmp_path / "notes.pdf", b"\xff")
    assert [r["text"] for r in load_dataset(tmp_path)] == ["a", "b"]
    assert [r["text"] for r in load_dataset([tmp_path / "b.json", str(tmp_path / "a.json")])] == ["b", "a"]


def test_a_long_csv_cell_is_read(tmp_path: Path) -> None:
    text = "x" * 300_000
    assert load_dataset(write(tmp_path / "a.csv", f"text\n{text}\n")) == [{"text": text}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a.jsonl, line 2: not valid JSON \(Expecting value\)"),
        ("a.jsonl", "[\n{}\n]", r"line 1: not valid JSON.*a file with one JSON list is named .json"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', r"line 2: not valid JSON \(Extra data\); .* name the file .jsonl"),
        ("a.json", '[{"text": "a"},\n {"text": }]', "a.json, line 2: not valid JSON"),
        ("a.json", '{"train": [], "test": []}', "one object with 2 lists"),
        ("a.json", '"text"', "holds a str; give a list of records"),
        ("a.json", "[]", "a.json holds no records"),
        ("a.jsonl", "\n \n", "a.jsonl holds no records"),
        ("a.txt", " \n", "a.txt holds no records"),
        ("a.csv", "text\n", "a.csv holds no records"),
        ("a.csv", "prompt,completion\na,b\na,b,c\n", r"line 3: the row has not as many values as the header \(2\)"),
        ("a.csv", "prompt,completion\na\n", "line 2: the row has not as many values"),
        ("a.csv", 'text\n"a\n', "not valid CSV .*; repair its quotes"),
        ("a.csv", "prompt,completion\ra,b\r", "line 1: not valid CSV .*; a carriage return ends lines there: save the"),
        ("a.csv", "prompt,prompt,completion\na,b,c\n", "the header names the column 'prompt' twice"),
        ("a.jsonl", '{"text": "a"}\n' + "[" * 100_000, "line 2: lists or objects are nested too deeply"),
        ("a.json", "[" * 100_000, "a.json nests lists or objects too deeply"),
        ("a.jsonl", '{"text": "a \\ud83d"}', r"line 1: 'text' holds half a character \(\\ud83d at position 2\)"),
        ("a.txt", b"fine\nna\xefve", r"a.txt, line 2: byte 0xef is not UTF-8; save the file as UTF-8"),
        ("a.xlsx", "PK", "has the extension '.xlsx'; known are .json, .jsonl"),
        ("data", "x", r"has the extension '\(none\)'"),
        ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}', r"a.jsonl, line 3 lacks 'text': it has the fields 'txt'"),
        ("a.json", '[{"x": 1}]', r"a.json, record 1 has the fields 'x', but needs"),
        ("a.json", "[1]", "a.json, record 1 must be an object"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(write(tmp_path / name, content))


def test_the_named_format_is_demanded(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps([{"text": "a"}]))
    with pytest.raises(ValueError, match=r"record 1 lacks 'instruction', 'output'"):
        load_dataset(path, format="alpaca")
    with pytest.raises(ValueError, match="unknown record format"):
        load_dataset(path, format="alpacca")


def test_absent_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; check the path, or name a dataset on the Hub"):
        load_dataset(tmp_path / "a.json")
    with pytest.raises(ValueError, match="holds no data file"):
        load_dataset(tmp_path)
    with pytest.raises(ValueError, match="no data file was given"):
        load_dataset([])


def test_published_datasets(shared_data: Path) -> None:
    """Rows that can be used: empty answers, and answers judged bad, are left out."""
    counts = {
        "alpaca_4k.json": 3999,
        "alpaca_libre_3k.json": 3097,
        "dolly_3k.jsonl": 2996,
        "dpo_en_demo.json": 300,
        "gsm8k_test.jsonl": 1319,
        "kto_en_demo.json": 150,
        "oasst_100_sharegpt.json": 100,
        "preference_1100.json": 1100,
        "sharegpt_500.json": 500,
        "wiki_demo.txt": 1,
    }
    for name, count in counts.items():
        assert len(load_dataset(shared_data / "datasets" / name)) == count
