"""How the records of a source are read: by a format, or by templates over their own columns."""

from dataclasses import dataclass

from slothcore.data.columns import ColumnTemplates
from slothcore.data.formats import Example, Record, TextExample, format_example


@dataclass(frozen=True)
class Reading:
    """How the records of a source are read.

    Attributes:
        format: a name of `formats.LAYOUTS`, or "auto": each record by itself.
        columns: templates that make prompt and completion, in place of a format.
    """

    format: str = "auto"
    text_field: str = "text"
    columns: ColumnTemplates | None = None

    def example(self, record: Record, where: str) -> Example:
        """What a record says. Raises ValueError with `where` if it does not fit."""
        if self.columns is None:
            return format_example(record, format=self.format, text_field=self.text_field, where=where)
        return TextExample(*self.columns.fill(record, where))
