"""Own columns: one line with {column} names that makes a prompt, and one that makes its completion."""

import string
from dataclasses import dataclass

from slothcore.data.values import Record, field_names, text_value

ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}


@dataclass(frozen=True)
class ColumnTemplates:
    """What a record becomes: `prompt` and `completion` with {column} filled in; {{ and }} are braces.

    A template is one line, so `\\n` in it is a new line, `\\t` a tab and `\\\\` a backslash.

    Raises: ValueError for a template that does not close its braces, or one without a column.
    """

    completion: str
    prompt: str = ""

    def __post_init__(self) -> None:
        for option, template in (("prompt_template", self.prompt), ("completion_template", self.completion)):
            try:
                parts = _parts(template)
            except ValueError as error:
                raise ValueError(
                    f"{option} {template!r} is not valid: {error}; write {{column}}, and {{{{ for a brace"
                ) from None
            if option == "completion_template" and not any(column is not None for _, column in parts):
                raise ValueError(f"{option} {template!r} names no column; write {{column}} where its text is to stand")

    def fill(self, record: Record, where: str) -> tuple[str, str]:
        """Prompt and completion of a record; no completion if all its columns are blank, whatever stands around them.

        Raises: ValueError naming `where`, the column that the record lacks and those that it has.
        """
        prompt, _ = self._filled("prompt_template", self.prompt, record, where)
        completion, says_something = self._filled("completion_template", self.completion, record, where)
        return prompt, completion if says_something else ""

    def prompt_of(self, record: Record, where: str) -> str:
        """The prompt alone, for a record that may have no answer. Raises ValueError as `fill` does."""
        return self._filled("prompt_template", self.prompt, record, where)[0]

    @staticmethod
    def _filled(option: str, template: str, record: Record, where: str) -> tuple[str, bool]:
        """The text, and whether any column holds some of it."""
        pieces, says_something = [], False
        for literal, column in _parts(template):
            pieces.append(literal)
            if column is None:
                continue
            if column not in record:
                raise ValueError(
                    f"{where} has no column {column!r}, which {option} names; it has {field_names(record)}: "
                    "correct the template"
                )
            value = text_value(record, column, where, optional=True)
            says_something |= value.strip() != ""
            pieces.append(value)
        return "".join(pieces), says_something


def _parts(template: str) -> list[tuple[str, str | None]]:
    """Pieces of text, each with the name of the column that follows it. A name may hold spaces and dots."""
    parts = []
    for literal, column, layout, conversion in string.Formatter().parse(template):
        if column is not None and (not column or layout or conversion):
            raise ValueError(f"{{{column}}} is no name of a column")
        parts.append((_unescaped(literal), column))
    return parts


def _unescaped(text: str) -> str:
    pieces, position = [], 0
    while position < len(text):
        pair = text[position : position + 2]
        pieces.append(ESCAPES.get(pair, text[position]))
        position += 2 if pair in ESCAPES else 1
    return "".join(pieces)
