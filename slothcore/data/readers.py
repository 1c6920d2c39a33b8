"""Training files to records, one at a time: JSON lines, JSON, CSV, plain text, Parquet, each said by its extension.

| extension       | one record is                                            | read                   |
| --------------- | -------------------------------------------------------- | ---------------------- |
| .jsonl, .ndjson | a line                                                   | line by line           |
| .csv, .tsv      | a row under the header, every value a text               | row by row             |
| .parquet        | a row (needs pyarrow)                                    | a thousand rows a time |
| .json           | an element of the list, or of the only list in an object | whole                  |
| .txt, .md       | the whole file, as one running text (`document`)         | two million characters |

Each but Parquet, which is compressed already, may end in .gz. A record that cannot be read comes as the ValueError
that says so: its reader decides whether to go on. What is wrong with the file as a whole is raised.

Training cuts a running text into rows of full length. It is not split at blank lines, because a paragraph of prose is
no document; many short texts are written as JSON lines with a field `text`.
"""

import codecs
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

from slothcore.data.beginnings import BYTE_ORDER_MARK, check_beginning
from slothcore.data.formats import PIECE_FIELD
from slothcore.data.pieces import pieces_of
from slothcore.data.values import without_fillers

Located = tuple[str, Any]  # where a record stands, for messages, and the record or what is wrong with it
Reader = Callable[[Path], Iterator[Located]]

# A row beyond this is a file that lost its line ends, or a text that a model never sees more than the start of.
LONGEST_ROW = 8_000_000
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
PARQUET_BATCH = 1000
TEXT_BLOCK = 1 << 20


def read_records(path: Path) -> Iterator[Located]:
    """The records of a file, each with its place.

    Raises: ValueError for an unknown extension, or if the file cannot be read at all.
    """
    reader = reader_of(path)
    check_beginning(path)
    try:
        yield from reader(path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); pack it again, or download it again") from None


def reader_of(path: Path) -> Reader:
    """What reads this file. Raises ValueError naming the known extensions if nothing does."""
    reader = READERS.get(extension(path))
    if reader is None:
        raise ValueError(
            f"{path} has the extension {path.suffix or '(none)'!r}; "
            f"known are {', '.join(READERS)}: rename it or convert it to JSON lines"
        )
    return reader


def extension(path: Path) -> str:
    """The extension that tells how a file is read, without .gz."""
    suffix = path.suffix.lower()
    if suffix != ".gz":
        return suffix
    inner = Path(path.stem).suffix.lower()
    return "" if inner == ".parquet" else inner


def is_running_text(path: Path) -> bool:
    """Whether the file is one text instead of records."""
    return extension(path) in (".txt", ".md")


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _text(path: Path) -> str:
    """The whole file as text, without a byte order mark."""
    with _open(path) as file:
        content = file.read()
    try:
        return _decoded(content.removeprefix(BYTE_ORDER_MARK))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(_not_utf8(f"{path}, line {line}", content, error)) from None


def _decoded(content: bytes) -> str:
    return content.decode("utf-8")


def _not_utf8(where: str, content: bytes, error: UnicodeDecodeError) -> str:
    meant = ", it looks like UTF-16" if content[:2] in UTF_16_MARKS else ""
    return f"{where}: byte {error.object[error.start]:#04x} is not UTF-8{meant}; save the file as UTF-8"


def _read_json(path: Path) -> Iterator[Located]:
    text = _text(path)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        remedy = "repair it there"
        if error.msg == "Extra data":
            remedy = "one object a line is JSON lines: name the file .jsonl"
        elif error.pos >= len(text.rstrip()):
            remedy = "the file breaks off: write or download it again"
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); {remedy}") from None
    except RecursionError:
        raise ValueError(f"{path} nests lists or objects too deeply for a dataset; flatten them") from None
    except ValueError:
        raise ValueError(f"{path} holds a number of thousands of digits; write it as text in quotes") from None
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            raise ValueError(
                f"{path} holds one object with {len(lists)} lists; give a list of records, or an object with one list"
            )
        value = value[lists[0]]
    if not isinstance(value, list):
        raise ValueError(f"{path} holds a {type(value).__name__}; give a list of records")
    del text
    for number, record in enumerate(value, start=1):
        yield f"{path}, record {number}", record


def _read_json_lines(path: Path) -> Iterator[Located]:
    with _open(path) as file:
        # Split at bytes of a line feed alone: JSON allows U+2028 and its like inside a string.
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.isspace() and line:
                where = f"{path}, line {number}"
                yield where, _json_line(line, number, where)


def _json_line(line: bytes, number: int, where: str) -> Any:
    """What a line holds, or the error that says why that cannot be told."""
    if len(line) > LONGEST_ROW:
        return ValueError(
            f"{where}: the row has {len(line):,} bytes, more than the {LONGEST_ROW:,} that a row may have; "
            "cut its text into several rows, or keep running text in a .txt file"
        )
    try:
        return json.loads(_decoded(line))
    except UnicodeDecodeError as error:
        return ValueError(_not_utf8(where, line, error))
    except json.JSONDecodeError as error:
        remedy = "repair the line, or drop it"
        if number == 1 and line.strip() == b"[":
            remedy = "a file with one JSON list is named .json"
        elif error.pos >= len(line.decode().rstrip()):
            remedy = "the line breaks off: write one whole object a line"
        return ValueError(f"{where}: not valid JSON ({error.msg}); {remedy}")
    except RecursionError:
        return ValueError(f"{where}: lists or objects are nested too deeply; flatten them")
    except ValueError:
        return ValueError(f"{where}: a number has thousands of digits; write it as text in quotes")


def _read_csv(path: Path) -> Iterator[Located]:
    number = 0

    def lines(file: IO[bytes]) -> Iterator[str]:
        nonlocal number
        for number, line in enumerate(file, start=1):
            try:
                yield _decoded(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line)
            except UnicodeDecodeError as error:
                raise ValueError(_not_utf8(f"{path}, line {number}", line, error)) from None

    # Long cells are judged like long rows of any other file.
    csv.field_size_limit(sys.maxsize)
    with _open(path) as file:
        rows = csv.reader(lines(file), dialect="excel-tab" if extension(path) == ".tsv" else "excel", strict=True)
        try:
            header = next(rows, [])
            twice = next((name for name in header if header.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{path}: the header names the column {twice!r} twice; rename one of them")
            between = next((sign for sign in (";", "\t", "|") if len(header) == 1 and sign in header[0]), None)
            if between is not None:
                raise ValueError(
                    f"{path}, line 1: {between!r} stands between the columns instead of a comma; "
                    "save the file with commas, or with tabs as .tsv"
                )
            if header and not all(name.strip() for name in header):
                raise ValueError(f"{path}, line 1: the header has a column without a name; name it, or delete it")
            for row in rows:
                where = f"{path}, line {number}"
                if not row:
                    continue
                if len(row) == len(header):
                    yield where, dict(zip(header, row, strict=True))
                else:
                    yield where, ValueError(_ragged(where, row, header))
        except csv.Error as error:
            where, remedy = f"{path}, line {number}", "repair its quotes"
            if "new-line character" in str(error):  # as old programs of the Macintosh end their lines
                remedy = "a carriage return ends lines there: save the file with line feeds, or quote the value"
            raise ValueError(f"{where}: not valid CSV ({error}); {remedy}") from None


def _ragged(where: str, row: list[str], header: list[str]) -> str:
    return (
        f"{where}: the row has not as many values as the header ({len(header)}), but {len(row)}; "
        "quote values that hold the separator"
    )


def _read_text(path: Path) -> Iterator[Located]:
    said_something = False
    for part, (text, before, last) in enumerate(pieces_of(_text_blocks(path))):
        said_something |= not text.isspace()
        if part == 0 and last:
            if said_something:
                yield str(path), {"document": text}
            return
        piece = {"part": part, "last": last, "before": before}
        yield f"{path}, piece {part + 1}", {"document": text, PIECE_FIELD: piece}


def _text_blocks(path: Path) -> Iterator[str]:
    """The text of a file as it is read, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, begin = 1, True
    with _open(path) as file:
        while True:
            content = file.read(TEXT_BLOCK)
            start = content[:2]
            if begin:
                content = content.removeprefix(BYTE_ORDER_MARK)
            try:
                text = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise ValueError(_not_utf8(f"{path}, line {line}", start if begin else b"", error)) from None
            if text:
                yield text
            if not content:
                return
            line, begin = line + text.count("\n"), False


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install 'slothcore[parquet]', or convert it to JSON lines"
        ) from None
    try:
        file = parquet.ParquetFile(path, memory_map=True)
    except Exception as error:  # pyarrow's own kinds of errors are not at hand to be named
        raise ValueError(f"{path} is not a Parquet file ({_first_line(error)}); download or write it again") from None
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: the column {twice!r} is there twice; rename one of them")
    number = 0
    batches = file.iter_batches(batch_size=PARQUET_BATCH)
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # a page that is damaged, or text that is not UTF-8
            raise ValueError(
                f"{path} is damaged behind row {number} ({_first_line(error)}); download or write it again"
            ) from None
        if batch is None:
            return
        for number, record in enumerate(rows, start=number + 1):  # noqa: B020 (counts through batches)
            yield f"{path}, row {number}", without_fillers(record)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
