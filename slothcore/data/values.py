"""Single values of a record: texts, lists written as text, and the words in which messages speak of them."""

import json
import math
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def field_names(record: Record) -> str:
    """The names of a record's fields as a message shows them."""
    return ", ".join(repr(field) for field in record) or "none"


def shown(value: Any) -> str:
    """A value as a message shows it: its type, and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '...'}"


def counted(number: int, what: str) -> str:
    """`1 row`, `1,234 rows`: how many of something there are; `what` is the word for one of them."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def text_value(record: Record, field: str, where: str, *, optional: bool = False) -> str:
    """The text of a field; of an optional one that is absent or null, nothing.

    Raises: ValueError with `where`, the field and what it holds, if that is no text.
    """
    value = record.get(field)
    if value is None and optional:
        return ""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)  # JSON writers leave the quotes off numeric answers
    if not isinstance(value, str):
        missing = value is None or isinstance(value, float)  # NaN is how data frames write an empty cell
        remedy = "; fill it in, or drop the row" if missing else "; write it as text in quotes"
        raise ValueError(f"{where}: {field!r} must be text, got {shown(value)}{remedy}")
    return whole_characters(value, f"{where}: {field!r}")


def whole_characters(text: str, where: str) -> str:
    """The text itself. Raise if it holds half a surrogate pair, which JSON can escape and UTF-8 cannot say."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        broken = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{where} holds half a character ({broken} at position {error.start}); repair the text"
        ) from None
    return text


def parsed(value: Any) -> Any:
    """A list or object written as JSON text, as in a CSV cell, is read; anything else stays as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value


def without_arrays(record: Any) -> Any:
    """A record with lists and numbers of Python where its columns hold arrays, or numbers, of numpy or torch.

    So data frames have them, and datasets with a format of their own; nobody else is to take `numpy.False_` for a word.
    """
    if not isinstance(record, Mapping) or not any(hasattr(value, "tolist") for value in record.values()):
        return record
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def without_fillers(record: Any) -> Any:
    """A row of a table without the nulls that tables put into objects: each gets every key that any in its column has.

    So a call to `weather(city)` would be learned with the arguments of all other functions. Columns, and a message's
    own keys, keep their nulls, since whoever reads them knows what they mean.
    """
    if not isinstance(record, Mapping):
        return record
    return {name: _filled(value) if name == "tools" else _with_filled(value) for name, value in record.items()}


def _with_filled(value: Any) -> Any:
    """A column: messages, or one of them."""
    if isinstance(value, Mapping):
        return {key: _filled(item) for key, item in value.items()}
    return [_with_filled(item) for item in value] if isinstance(value, list) else value


def _filled(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(item) for key, item in value.items() if item is not None}
    return [_filled(item) for item in value] if isinstance(value, list) else value


def boolean(value: Any) -> bool | None:
    """True or false as JSON, CSV and Python write them; None for anything else."""
    if isinstance(value, bool):
        return value
    words = {"true": True, "false": False}
    return words.get(value.strip().lower()) if isinstance(value, str) else None
