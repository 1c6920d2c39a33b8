"""The log of a run as columns of numbers, read once and then only where it grew."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Fields of a line that are drawn or counted.
FIELDS = (
    "loss",
    "learning_rate",
    "grad_norm",
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
        samples: step, and the generations that a line with `samples` has.
        lines, skipped: those read, and those of them that are no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clear()

    def _clear(self) -> None:
        self._offset, self._inode = 0, -1
        self.columns = {name: Column() for name in FIELDS}
        self.samples: list[tuple[int, list[dict[str, Any]]]] = []
        self.lines = self.skipped = self.unfinished = 0

    def update(self) -> None:
        """Read what was written since the last call; all of it again if the file is another or became shorter."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_size < self._offset or status.st_ino != self._inode:
                    self._clear()
                    self._inode = status.st_ino
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._clear()
            return
        whole, newline, rest = content.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.unfinished = int(bool(rest.strip()))
        for line in whole.split(b"\n"):
            if line.strip():
                self._add(line)

    def _add(self, line: bytes) -> None:
        self.lines += 1
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            self.skipped += 1
            return
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**53:
            self.skipped += 1
            return
        for name, column in self.columns.items():
            value = _number(record.get(name))
            if value is not None:
                column.steps.append(step)
                column.values.append(value)
        samples = record.get("samples")
        if isinstance(samples, list):
            self.samples.append((step, [sample for sample in samples if isinstance(sample, dict)]))


def _number(value: object) -> float | None:
    """`value` as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
