"""Training files to records: JSON, JSON lines, CSV and plain text, each said by its extension.

| extension       | one record is                                            |
| --------------- | -------------------------------------------------------- |
| .json           | an element of the list, or of the only list in an object |
| .jsonl, .ndjson | a line                                                   |
| .csv, .tsv      | a row under the header, every value a text               |
| .txt, .md       | the whole file, as one running text (`document`)         |

Training cuts a running text into rows of full length. It is not split at blank lines, because a paragraph of prose is
no document; many short texts are written as JSON lines with a field `text`.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slothcore.data.formats import check_format_name, detect_format, format_example

Located = tuple[str, Any]  # where a record stands, for messages, and the record


def load_dataset(
    path_or_paths: str | Path | Sequence[str | Path], format: str = "auto", *, text_field: str = "text"
) -> list[dict[str, Any]]:
    """All records of one file, several files, or every file of known extension in a folder, in order.

    Each record is checked against its format, so a wrong one is reported with its file and line before anything else
    happens.

    Args:
        path_or_paths: files or folders; the files of a folder are read in the order of their names.
        format: a name from `formats.LAYOUTS`; "auto" takes, for each file, the one that its first record fits.
        text_field: the field that holds the text of the format `text`.
    Raises: ValueError with file, line and remedy; FileNotFoundError if a file is absent.
    """
    format = check_format_name(format)
    paths = [path_or_paths] if isinstance(path_or_paths, str | Path) else list(path_or_paths)
    records: list[dict[str, Any]] = []
    for path in _files(paths):
        located = _read(path)
        if not located:
            raise ValueError(f"{path} holds no records; give a file with at least one")
        where, first = located[0]
        # Running text keeps its own format whatever the other files of the dataset hold.
        name = "document" if _reader(path) is _read_text else format
        if name == "auto" and isinstance(first, dict):
            name = detect_format(first, text_field=text_field, where=where)
        for where, record in located:
            format_example(record, format=name, text_field=text_field, where=where)
        records.extend(record for _, record in located)
    return records


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    if not paths:
        raise ValueError("no data file was given; name at least one")
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
            if not inside:
                raise ValueError(f"the folder {path} holds no data file; known are {', '.join(READERS)}")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise FileNotFoundError(f"the data file {path} does not exist; data are local files, so download it first")


def _reader(path: Path) -> Callable[[Path, str], list[Located]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} has the extension {path.suffix or '(none)'!r}; "
            f"known are {', '.join(READERS)}: rename it or convert it to JSON lines"
        )
    return reader


def _read(path: Path) -> list[Located]:
    reader = _reader(path)
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {content[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error
    return reader(path, text)


def _read_json(path: Path, text: str) -> list[Located]:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "; one object a line is JSON lines: name the file .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){remedy}") from error
    except RecursionError:
        raise ValueError(f"{path} nests lists or objects too deeply for a dataset") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path} holds one object with {len(lists)} lists; give a list of records, or an object with one list"
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a {type(value).__name__}; give a list of records")
    return [(f"{path}, record {number}", record) for number, record in enumerate(value, start=1)]


def _read_json_lines(path: Path, text: str) -> list[Located]:
    located: list[Located] = []
    # Not splitlines(): it also splits at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            located.append((f"{path}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            remedy = "; a file with one JSON list is named .json" if number == 1 and line.strip() == "[" else ""
            raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}){remedy}") from error
        except RecursionError:
            raise ValueError(f"{path}, line {number}: lists or objects are nested too deeply") from None
    return located


def _read_csv(path: Path, text: str) -> list[Located]:
    limit = csv.field_size_limit(len(text) + 1)
    try:
        reader = csv.DictReader(
            io.StringIO(text, newline=""),
            dialect="excel-tab" if path.suffix.lower() == ".tsv" else "excel",
            strict=True,
        )
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise ValueError(f"{path}: the header names the column {twice!r} twice; rename one of them")
        located: list[Located] = []
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: the row has not as many values as the header ({len(header)}); "
                    "quote values that hold the separator"
                )
            located.append((where, row))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)
    return located


def _read_text(path: Path, text: str) -> list[Located]:
    return [(str(path), {"document": text})] if text.strip() else []


READERS: dict[str, Callable[[Path, str], list[Located]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".md": _read_text,
}
