"""The records of a run: read once to check each and count, then again whenever they are needed.

Nothing but one number for each row stays in memory: how often an epoch takes it. 0 leaves a row out because it cannot
be used, its answer was judged bad, or it is held out for evaluation; weights make it more than 1.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from slothcore.data.columns import ColumnTemplates
from slothcore.data.formats import ChatExample, Example, Record, check_format_name, detect_format
from slothcore.data.preferences import VERDICTS
from slothcore.data.row_checks import RowCounts, check_example, check_size
from slothcore.data.row_reading import Reading
from slothcore.data.sources import MemorySource, Source, find_sources, is_records
from slothcore.data.values import counted

OnBadRow = Literal["error", "skip"]
# A bar for what is done before it is drawn would only flicker.
BAR_DELAY = 2.0


@dataclass(frozen=True, eq=False)
class Part:
    """One source, its reading, and how often each of its rows is taken: repeats [rows] int32."""

    source: Source
    reading: Reading
    repeats: np.ndarray

    def chosen(self) -> Iterator[tuple[str, Any]]:
        """The records that are taken, each as often as it is, with their places.

        Raises: ValueError if the source now ends before it did when its records were checked.
        """
        records = self.source.records()
        for number, times in enumerate(self.repeats.tolist()):
            located = next(records, None)
            if located is None:
                raise ValueError(
                    f"{self.source.name} held {counted(len(self.repeats), 'record')} when they were checked and holds "
                    f"{number:,} now; leave it as it is while it is read, or give a list"
                )
            for _ in range(times):
                yield located


class Dataset:
    """Checked records of one or several sources, in order.

    Attributes:
        notes: what is worth saying about them, a line each.
    """

    def __init__(self, parts: Sequence[Part], notes: Sequence[str] = ()) -> None:
        self.parts, self.notes = tuple(parts), tuple(notes)

    def __len__(self) -> int:
        return sum(int(part.repeats.sum()) for part in self.parts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            for _, record in part.chosen():
                yield record

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record at a place; reads up to it, so loops go over the dataset itself."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        wanted = index % len(self)
        return next(record for number, record in enumerate(self) if number == wanted)

    def examples(self) -> Iterator[tuple[str, Example]]:
        """What the records say, each with its place."""
        for part in self.parts:
            for where, record in part.chosen():
                yield where, part.reading.example(record, where)

    def has_conversations(self) -> bool:
        """Whether the first record of any source is a conversation."""
        firsts = (next(((part, *found) for found in part.chosen()), None) for part in self.parts)
        return any(
            isinstance(p.reading.example(record, where), ChatExample) for p, where, record in filter(None, firsts)
        )

    @property
    def size(self) -> int | None:
        """Bytes of all sources; None if they are not files."""
        sizes = [part.source.size() for part in self.parts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def digest(self) -> str | None:
        """A hash of the records and of how they are read; None if a source is not a file."""
        digest = hashlib.sha256()
        for part in self.parts:
            content = part.source.digest()
            if content is None:
                return None
            digest.update(f"{content} {part.reading!r}\n".encode())
            digest.update(np.ascontiguousarray(part.repeats, dtype="<i4").data)
        return digest.hexdigest()

    def hold_out(self, fraction: float, *, seed: int) -> tuple["Dataset", "Dataset"]:
        """The dataset without a share of its rows, chosen by the seed, and those, each of them once.

        Raises: ValueError if that leaves nothing on one side.
        """
        import torch  # its generator has always chosen the rows, and another would choose others

        repeats = np.concatenate([part.repeats for part in self.parts])
        rows = np.flatnonzero(repeats)
        count = round(fraction * len(rows))
        if not 0 < count < len(rows):
            raise ValueError(
                f"eval_fraction {fraction} of {len(rows)} records holds out {count}; change it, or give eval_data"
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).numpy()
        held_out = np.zeros(len(repeats), dtype=np.int32)
        held_out[rows[order[:count]]] = 1
        return self._with_repeats(np.where(held_out, 0, repeats), self.notes), self._with_repeats(held_out)

    def _with_repeats(self, repeats: np.ndarray, notes: Sequence[str] = ()) -> "Dataset":
        ends = np.cumsum([len(part.repeats) for part in self.parts])[:-1]
        pieces = np.split(repeats.astype(np.int32), ends)
        return Dataset([replace(p, repeats=piece) for p, piece in zip(self.parts, pieces, strict=True)], notes)


def open_dataset(
    data: str | Path | Sequence[str | Path] | Iterable[Any],
    format: str = "auto",
    *,
    text_field: str = "text",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    weights: Sequence[float] | None = None,
    on_bad_row: OnBadRow = "error",
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: bool = False,
) -> Dataset:
    """Find, read and check all records; a wrong one is reported with its file and line before anything else happens.

    Args:
        data: files, folders, patterns or datasets of the Hub (`sources.find_sources`), one or several; or records.
        format: a name from `formats.LAYOUTS`; "auto" takes, for each file, the one that its first record fits.
        text_field: the field that holds the text of the format `text`.
        prompt_template, completion_template: what own columns become (`columns.ColumnTemplates`); no format then.
        weights: how often the rows of each entry of `data` are seen, relative to the others. The rows of the least
            are seen once an epoch.
        on_bad_row: "skip" leaves out what cannot be used, counts it and notes the first few.
        token, local_files_only: for datasets of the Hub.
        progress: show a bar if reading takes long.
    Raises: ValueError with file, line and remedy; FileNotFoundError if a file is absent.
    """
    columns = None if completion_template is None else ColumnTemplates(completion_template, prompt_template or "")
    reading = Reading(check_format_name(format), text_field, columns)
    if isinstance(data, Mapping):
        # As load_dataset of datasets gives all splits.
        names = ", ".join(map(repr, data)) or "nothing"
        raise ValueError(f"the dataset is a {type(data).__name__} with {names}; give the records, such as one of these")
    if hasattr(data, "columns"):
        raise ValueError(
            f"the dataset is a {type(data).__name__}, which gives columns and no rows; give its rows, as pandas' "
            'to_dict("records"), to_dicts() of polars or to_pylist() of pyarrow makes them'
        )
    groups: list[list[Source]]
    if is_records(data):
        groups = [[MemorySource(data)]]  # type: ignore[arg-type]
    else:
        entries = [data] if isinstance(data, str | Path) else list(data)  # type: ignore[arg-type]
        groups = [[*find_sources(e, token=token, local_files_only=local_files_only)] for e in entries]
    if not groups:
        raise ValueError("no data file was given; name at least one")
    if weights is not None and len(weights) != len(groups):
        raise ValueError(f"there are {len(weights)} data_weights for {len(groups)} data; give one for each")
    if weights is not None and min(weights) <= 0:
        raise ValueError(f"data_weights must be greater than 0, got {min(weights)}; leave out what is not to be seen")
    parts, notes = [], []
    for number, sources in enumerate(groups):
        for source in sources:
            part, said = _checked(source, reading, on_bad_row, progress=progress)
            if weights is not None:
                part = replace(part, repeats=_weighted(part.repeats, weights[number] / min(weights)))
                said.append(f"{source.name}: an epoch sees {int(part.repeats.sum()):,} rows of it, by data_weights")
            parts.append(part)
            notes.extend(said)
    return Dataset(parts, notes)


def _checked(source: Source, reading: Reading, on_bad_row: OnBadRow, *, progress: bool) -> tuple[Part, list[str]]:
    """Go through a source once: its rows with what is left out at 0, and what there is to say."""
    # Running text keeps its own format whatever the other files of the dataset hold.
    if source.is_running_text:
        reading = Reading("document")
    by_first = reading.columns is None and reading.format == "auto" and not isinstance(source, MemorySource)
    counts = RowCounts(source.name)
    records = source.records()
    bar = tqdm(records, desc=f"reading {source.name}", unit=" rows", delay=BAR_DELAY, disable=not progress, leave=False)
    for where, record in bar:
        try:
            if isinstance(record, ValueError):
                raise record
            check_size(record, where)
            if by_first and reading.format == "auto" and isinstance(record, Mapping):
                reading = replace(reading, format=detect_format(record, text_field=reading.text_field, where=where))
            if reading.columns is None and counts.is_judged_bad(record, where, reading):
                continue
            example = _example(reading, record, where, mixed=by_first)
            if counts.is_empty(example, where):
                continue
            check_example(example, where)
        except ValueError as error:
            if on_bad_row != "skip":
                # With good rows before it, the file is probably right and this row wrong.
                hint = "; or leave such rows out with on_bad_row: skip" if any(counts.repeats) else ""
                raise ValueError(f"{error}{hint}") from None
            counts.skip(error)
        else:
            counts.take(record, where, reading, example)
    counts.check_any()
    return Part(source, reading, np.array(counts.repeats, dtype=np.int32)), counts.notes(reading)


def _example(reading: Reading, record: Any, where: str, *, mixed: bool) -> Example:
    try:
        return reading.example(record, where)
    except ValueError as error:
        # A judged file's wrong verdict is what its own error says.
        if (
            mixed
            and isinstance(record, Mapping)
            and not (reading.format == "kto" and any(name in record for name in VERDICTS))
        ):
            found = _format_or_none(record, reading.text_field)
            if found not in (None, reading.format):
                raise ValueError(
                    f"{where} has the format {found}, and the first record of the file {reading.format}; "
                    "keep one format in a file, and give several files"
                ) from None
        raise error


def _format_or_none(record: Record, text_field: str) -> str | None:
    try:
        return detect_format(record, text_field=text_field)
    except ValueError:
        return None


def _weighted(repeats: np.ndarray, factor: float) -> np.ndarray:
    """Each row as often as `factor` says; the part of it behind the point falls on rows at even distances."""
    kept = np.flatnonzero(repeats)
    # A factor such as 0.3 / 0.1 lies a rounding below the whole number that is meant.
    ends = np.floor(np.arange(len(kept) + 1) * factor + 1e-6).astype(np.int32)
    weighted = np.zeros_like(repeats)
    weighted[kept] = np.diff(ends)
    return weighted
