"""Data files to a list of records, for callers that want to look at them or change them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from slothcore.data.dataset import open_dataset


def load_dataset(
    path_or_paths: str | Path | Sequence[str | Path] | Iterable[Any],
    format: str = "auto",
    *,
    text_field: str = "text",
    **options: Any,
) -> list[dict[str, Any]]:
    """All records that can be used, in order, of files, folders, patterns, datasets of the Hub, or of an iterable.

    Each record is checked against its format, so a wrong one is reported with its file and line before anything else
    happens. What does not fit into memory is read by `slothcore.data.dataset.open_dataset`.

    Args:
        path_or_paths: files or folders; the files of a folder are read in the order of their names.
        format: a name from `formats.LAYOUTS`; "auto" takes, for each file, the one that its first record fits.
        text_field: the field that holds the text of the format `text`.
        options: as `open_dataset` takes them (weights, on_bad_row, ...).
    Raises: ValueError with file, line and remedy; FileNotFoundError if a file is absent.
    """
    return list(open_dataset(path_or_paths, format, text_field=text_field, **options))
