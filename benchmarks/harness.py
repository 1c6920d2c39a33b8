"""What every benchmark shares: the record of the machine, the CSV of results, the printed table."""

import csv
import datetime
import io
import os
import re
import statistics
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"

CSV_FIELDS = (
    "date",
    "commit",
    "gpu",
    "torch",
    "triton",
    "benchmark",
    "system",
    "case",
    "settings",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "tokens_per_second",
    "rate",
    "fraction_of_floor",
    "peak_gib",
    "first_loss",
    "gradient_norm",
)


def quantiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 20% and 80% quantile: as many values lie below the one as above the other."""
    ordered = sorted(values)
    fifth = len(ordered) // 5
    return statistics.median(ordered), ordered[fifth], ordered[-1 - fifth]


def environment() -> dict[str, str]:
    """What a figure depends on besides the code: the leading columns of the CSV."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def commit() -> str:
    """Short hash of the checkout, "+" appended if files differ from it; BENCHMARK_COMMIT names a copy without git."""
    try:
        described = ["git", "-C", str(REPOSITORY), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT", "unknown")


def append_csv(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Append rows to `folder`/<gpu>.csv. Returns: the file. Raises: ValueError as `Journal.add` does."""
    journal = Journal(folder)
    journal.add(rows)
    return journal.path


class Journal:
    """Rows of a run in the CSV of this GPU as they come, so that a run that is cut short loses none.

    Attributes:
        path: the file, which is begun where there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.about = environment()
        self.path = folder / f"{re.sub(r'[^a-z0-9]+', '-', self.about['gpu'].lower()).strip('-')}.csv"
        self._lines: list[str] = []

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, each with the environment; fields that a row lacks stay empty.

        Raises: ValueError if a row has a field that the file has not.
        """
        lines = [csv_line(self.about | dict(row)) for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            file.write("".join([*([",".join(CSV_FIELDS) + "\n"] if is_new else []), *lines]))
        self._lines += lines

    @property
    def lines(self) -> set[str]:
        """What this run has in the file, until it is settled."""
        return set(self._lines)

    def settle(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put these rows in the place of all that were added: the figures that stand when everything has run."""
        if self._lines:
            kept = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            for line in self._lines:
                # The last of equal ones: an earlier run's is further up.
                del kept[len(kept) - 1 - kept[::-1].index(line)]
            self._lines = []
            self.path.write_text("".join(kept), encoding="utf-8", newline="\n")
        self.add(rows)


def csv_line(row: Mapping[str, Any]) -> str:
    """A row as it stands in the file."""
    text = io.StringIO()
    csv.DictWriter(text, CSV_FIELDS, lineterminator="\n").writerow(row)
    return text.getvalue()


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; the first column is left-aligned, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = f"| {'-' * widths[0]} | {' | '.join('-' * (w - 1) + ':' for w in widths[1:])} |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
