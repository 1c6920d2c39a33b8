"""What a row must have beyond a readable reading, and what is counted about those that have not."""

from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from slothcore.data.conversations import check_turns, is_blank
from slothcore.data.formats import Example, TextExample, detect_format
from slothcore.data.preferences import VERDICTS, verdict
from slothcore.data.readers import LONGEST_ROW
from slothcore.data.row_reading import Reading
from slothcore.data.values import counted, parsed

# How many of the rows that were left out are named.
NAMED = 3
# What records of other libraries may say beside a layout: earlier turns, pictures and sounds, older names of tools.
UNREAD = ("history", "image", "images", "videos", "audios", "functions")
# Beside a text, which takes nothing from them but the system prompt that Alpaca's template begins with.
UNREAD_BESIDE_TEXT = ("system", "system_prompt", "tools")


def check_size(record: Any, where: str) -> None:
    """Raise ValueError if a record holds more text than any row can teach. A document may: it is cut into rows."""
    if not isinstance(record, Mapping) or "document" in record:
        return
    size = _characters(record)
    if size > LONGEST_ROW:
        raise ValueError(
            f"{where}: the row has {size:,} characters, more than the {LONGEST_ROW:,} that a row may have; "
            "cut its text into several rows, or keep running text in a .txt file"
        )


def check_example(example: Example, where: str) -> None:
    """Raise ValueError unless the roles of a conversation follow one another."""
    if not isinstance(example, TextExample):
        check_turns(example.messages, where)


class RowCounts:
    """What became of the rows of one source while they were checked.

    Attributes:
        repeats: for each row so far 1 if it is used, else 0.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.repeats = array("i")
        self.formats: dict[str, int] = {}
        self._judged_bad = self._skipped = self._repeated_ids = self._numbered = 0
        self._unread: dict[str, int] = {}
        self._beside_chosen: list[str] = []
        self._without_prompt = 0
        self._empty: list[str] = []
        self._errors: list[str] = []
        self._ids: set[int] = set()
        self._first_repeated = ""
        self._num_empty = 0

    def is_judged_bad(self, record: Any, where: str, reading: Reading) -> bool:
        """Whether the record's answer is one to avoid; counted and left out then."""
        if not isinstance(record, Mapping) or ("label" not in record and "kto_tag" not in record):
            return False
        if reading.format not in ("kto", "auto") or verdict(record) is not False:
            return False
        if detect_format(record, text_field=reading.text_field, where=where) != "kto":
            return False
        self._judged_bad += 1
        self.repeats.append(0)
        return True

    def is_empty(self, example: Example, where: str) -> bool:
        """Whether there is nothing to learn because an answer is blank; counted and left out then."""
        if isinstance(example, TextExample):
            blank = not example.completion.strip()
        else:
            answers = [message for message in example.messages if message["role"] == "assistant"]
            blank = any(is_blank(message["content"]) and not message.get("tool_calls") for message in answers)
        if blank:
            self._num_empty += 1
            self.repeats.append(0)
            if len(self._empty) < NAMED:
                self._empty.append(where)
        return blank

    def skip(self, error: ValueError) -> None:
        """The row cannot be used."""
        self._skipped += 1
        self.repeats.append(0)
        if len(self._errors) < NAMED:
            self._errors.append(str(error))

    def take(self, record: Any, where: str, reading: Reading, example: Example) -> None:
        """The row is used."""
        self.repeats.append(1)
        name = reading.format
        if reading.columns is None and name == "auto":
            name = detect_format(record, text_field=reading.text_field)
        self.formats[name] = self.formats.get(name, 0) + 1
        if reading.columns is None:
            if name == "preference" and isinstance(example, TextExample) and not example.prompt:
                others = [field for field in record if field not in ("chosen", "rejected")]
                beside = [f for f in others if isinstance(record[f], str | list) and _says_something(record[f])]
                self._without_prompt += bool(beside)
                self._beside_chosen = self._beside_chosen or beside
            for field in _unread(record, example):
                self._unread[field] = self._unread.get(field, 0) + 1
            self._numbered += name != "kto" and name not in ("text", "document") and _is_numbered(record)
        identity = record.get("id")
        if isinstance(identity, str | int):
            key = hash(identity)
            if key in self._ids:
                self._repeated_ids += 1
                self._first_repeated = self._first_repeated or f"{identity!r} at {self._inside(where)}"
            self._ids.add(key)

    def check_any(self) -> None:
        """Raise ValueError if no row is used."""
        if not self.repeats:
            raise ValueError(f"{self.name} holds no records; give a file with at least one")
        if sum(self.formats.values()):
            return
        if self._errors:
            raise ValueError(
                f"{self.name}: none of {len(self.repeats):,} rows can be used; the first: {self._errors[0]}"
            )
        if self._judged_bad:
            raise ValueError(f"{self.name}: all answers are judged bad; give some with label true")
        raise ValueError(f"{self.name}: all answers are empty (first {self._empty[0]}); fill them in")

    def notes(self, reading: Reading) -> list[str]:
        """A line about the format, and one about each kind of row that is left out."""
        used = sum(self.formats.values())
        if reading.columns is not None:
            what = "own columns, by completion_template"
        else:
            what = ", ".join(f"format {name}" for name in self.formats)
        verb = "is" if len(self.repeats) == 1 else "are"
        # A long text is one document, read in pieces.
        unit = "piece" if reading.format == "document" and len(self.repeats) > 1 else "row"
        lines = [f"{self.name}: {what}; {used:,} of {counted(len(self.repeats), unit)} {verb} used"]
        if "preference" in self.formats:
            lines.append(
                f"{self.name}: preference data, trained as SFT: the chosen answers are learned, the rejected ignored"
            )
        if "kto" in self.formats:
            lines.append(
                f"{self.name}: judged answers (KTO), trained as SFT: those with label true are learned, "
                f"{self._judged_bad:,} with label false left out"
            )
        if self._without_prompt:
            rows, beside = counted(self._without_prompt, "row"), " or ".join(map(repr, self._beside_chosen))
            lines.append(
                f"{self.name}: {rows} with a chosen answer and no prompt, so the answer is learned as a text of its own"
                f"; if {beside} is the prompt, name it so"
            )
        if self._num_empty:
            lines.append(
                f"{self.name}: {counted(self._num_empty, 'row')} with an empty answer left out; "
                f"first {self._inside(self._empty[0])}"
            )
        if self._skipped:
            first = " | ".join(map(self._inside, self._errors))
            lines.append(f"{self.name}: {counted(self._skipped, 'row')} skipped as unusable; first {first}")
        for field, count in self._unread.items():
            place = "prompt" if field in UNREAD_BESIDE_TEXT else "messages"
            lines.append(
                f"{self.name}: {counted(count, 'row')} with {field!r}, which is not read; write what it says into the "
                f"{place}, or drop the field"
            )
        if self._numbered:
            lines.append(
                f"{self.name}: {counted(self._numbered, 'row')} with a label of 0 or 1, which judges no answer here, "
                "so all are learned; write false or true if it tells bad answers from good ones"
            )
        if self._repeated_ids:
            lines.append(
                f"{self.name}: {counted(self._repeated_ids, 'row')} with the id of an earlier one, "
                f"first {self._first_repeated}; drop what is a copy"
            )
        return lines

    def _inside(self, message: str) -> str:
        """A place, or a message that begins with one, without the name of the source, which begins the note."""
        return message.removeprefix(f"{self.name}, ")


def _unread(record: Mapping[str, Any], example: Example) -> Iterator[str]:
    """The fields that say something of which nothing is in the example."""
    for field in UNREAD:
        if field in record and _says_something(parsed(record[field])):
            yield field
    if not isinstance(example, TextExample):
        return
    for field in UNREAD_BESIDE_TEXT:
        value = record.get(field)
        begins = isinstance(value, str) and example.prompt.startswith(value.strip())
        if _says_something(parsed(value)) and not begins:
            yield field


def _says_something(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() != ""
    # NaN is how data frames write an empty cell.
    return bool(value) if isinstance(value, list | Mapping) else value is not None and value == value


def _is_numbered(record: Mapping[str, Any]) -> bool:
    """Whether a field that may judge the answer holds a number, which may as well be a class."""
    values = (record.get(field) for field in VERDICTS)
    return any(isinstance(v, int | float | str) and not isinstance(v, bool) and v in (0, 1, "0", "1") for v in values)


def _characters(value: Any) -> int:
    """Characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 0
