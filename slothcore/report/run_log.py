"""The log of a run as columns of numbers, read once and then only where it grew."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slothcore.report.growing_file import GrowingFile

# Fields of a line that are drawn or counted.
FIELDS = (
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped_steps",
    "tokens_per_second",
    "memory_gib",
    "host_memory_gib",
    "eval_loss",
    "eval_perplexity",
    "elapsed",
    "tokens",
    "epoch",
)


@dataclass
class Column:
    """A field over the steps at which it was written."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float | None:
        return self.values[-1] if self.values else None


class RunLog:
    """What `log.jsonl` holds. A line that is no record is skipped and counted; one still being written waits.

    Attributes:
        columns: of each name in FIELDS.
        lines, skipped: those read, and those of them that are no record.
        unfinished: lines at the end that are not whole, 0 or 1.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._clear()

    def _clear(self) -> None:
        self.columns = {name: Column() for name in FIELDS}
        self.lines = self.skipped = self.unfinished = 0

    def update(self) -> None:
        """Read what was written since the last call; all of it again if the file is another or became shorter."""
        is_whole, lines = self._file.read()
        if is_whole:
            self._clear()
        self.unfinished = int(self._file.has_unfinished)
        for line in lines:
            self._add(line)

    def _add(self, line: bytes) -> None:
        self.lines += 1
        record = read_record(line)
        if record is None:
            self.skipped += 1
            return
        for name, column in self.columns.items():
            value = _number(record.get(name))
            if value is not None:
                column.steps.append(record["step"])
                column.values.append(value)


def read_record(line: bytes) -> dict[str, Any] | None:
    """The object of a line, with the step that it tells of; None if it is no such thing."""
    try:
        record = json.loads(line)
        step = record["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_step = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53
    return record if is_step and isinstance(record, dict) else None


def _number(value: object) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
