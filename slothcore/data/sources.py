"""Where records come from: files, folders, patterns, repositories of the Hub, and objects of Python.

A source is read from its beginning as often as it is needed; nothing of it stays in memory. What it holds is told by
its digest, so that tokens prepared from the same content are found again.
"""

import glob
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from slothcore.data.hub_files import dataset_files, named_splits, names_dataset
from slothcore.data.readers import READERS, Located, extension, is_running_text, read_records, reader_of
from slothcore.data.values import without_arrays, without_fillers

DIGEST_BLOCK = 1 << 20
# What a folder of data, such as a clone from the Hub, holds beside them.
ABOUT_DATA = re.compile(r"(\.|(readme|licen[cs]e|changelog|requirements)[^.]*\.(md|txt)$|dataset_infos?\.json$)", re.I)


class Source(Protocol):
    """Records in a fixed order."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def is_running_text(self) -> bool:
        """Whether it is one text instead of records."""

    def records(self) -> Iterator[Located]:
        """All records, each with its place; one that cannot be read comes as the ValueError that says why."""

    def digest(self) -> str | None:
        """A hash of the content; None if it cannot be told without reading all records."""

    def size(self) -> int | None:
        """Bytes of the content, or None."""


@dataclass(frozen=True)
class FileSource:
    """The records of one file."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def is_running_text(self) -> bool:
        return is_running_text(self.path)

    def records(self) -> Iterator[Located]:
        return read_records(self.path)

    def size(self) -> int:
        return self.path.stat().st_size

    def digest(self) -> str:
        digest = hashlib.sha256(extension(self.path).encode())
        with self.path.open("rb") as file:
            while block := file.read(DIGEST_BLOCK):
                digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class MemorySource:
    """Records of a list, a generator, a `datasets.Dataset`: whatever gives one mapping after another.

    What can be gone through only once, or is asked by number, is kept as a list.
    """

    rows: Iterable[Any]
    name: str = "the dataset"
    is_running_text: bool = False

    def __post_init__(self) -> None:
        rows: Any = self.rows
        if not isinstance(rows, Iterable):
            object.__setattr__(self, "rows", [rows[number] for number in range(len(rows))])
        elif iter(rows) is rows:
            object.__setattr__(self, "rows", list(rows))

    def records(self) -> Iterator[Located]:
        # As a `datasets.Dataset` has, which is a table.
        is_table = hasattr(self.rows, "column_names")
        for number, row in enumerate(self.rows, start=1):
            record = without_arrays(row)
            # Only what reads tables makes arrays of lists.
            yield f"record {number}", without_fillers(record) if is_table or record is not row else record

    def size(self) -> None:
        return None

    def digest(self) -> None:
        return None


def find_sources(
    path: str | Path, *, token: str | bool | None = None, local_files_only: bool = False
) -> list[FileSource]:
    """The files that one entry of `data` stands for.

    Args:
        path: a file, a folder, a pattern such as `data/*.jsonl`, or a dataset on the Hub (`owner/name`,
            `owner/name:validation`).
        token, local_files_only: for the Hub.
    Raises: ValueError if there is nothing that can be read; FileNotFoundError if the file does not exist.
    Warns: if a folder holds a README, a licence or the like beside its data, or folders of data, which are left out; or
        several splits, which are not told apart.
    """
    here = Path(path).expanduser()
    if here.is_dir():
        # The JSON files beside the Arrow files are notes, and no records.
        if (here / "dataset_dict.json").is_file() or any(here.glob("*.arrow")):
            raise ValueError(
                f"the folder {here} was written by save_to_disk of datasets, which is not read here; write it with "
                "that library's to_json or to_parquet"
            )
        inside = _files_of_folder(here)
        return [FileSource(file) for file in inside]
    if here.is_file():
        reader_of(here)
        return [FileSource(here)]
    if glob.has_magic(str(path)):
        found = sorted(p for p in map(Path, glob.glob(str(here), recursive=True)) if p.is_file())
        if not found:
            raise ValueError(f"no file fits the pattern {path}; quote it, and look at the folder that it names")
        for file in found:
            reader_of(file)
        return [FileSource(file) for file in found]
    if names_dataset(str(path)):
        files = dataset_files(str(path), token=token, local_files_only=local_files_only)
        return [FileSource(file) for file in files]
    several = ", or give several as a list, without commas in them" if "," in str(path) else ""
    raise FileNotFoundError(
        f"the data file {path} does not exist; check the path, or name a dataset on the Hub as owner/name{several}"
    )


def _files_of_folder(folder: Path) -> list[Path]:
    """The data files that stand in a folder itself, sorted; errors and warnings as of `find_sources`."""
    inside = sorted(p for p in folder.iterdir() if p.is_file() and extension(p) in READERS)
    about = [file for file in inside if ABOUT_DATA.match(file.name)]
    data = [file for file in inside if file not in about]
    # As a clone from the Hub has them, its README above.
    below = {
        file.parent.name
        for file in folder.glob("[!.]*/*")
        if file.is_file() and extension(file) in READERS and not ABOUT_DATA.match(file.name)
    }
    if not data and below:
        raise ValueError(
            f"the folder {folder} holds no data itself, but its folders {', '.join(sorted(below))} do; name one of "
            f"them, or a pattern such as {folder / min(below) / '*'}"
        )
    # A README alone may be what is to be learned; beside something that cannot be read it is about that.
    others = [entry for entry in folder.iterdir() if entry not in about and not entry.name.startswith(".")]
    if not data and (others or not about):
        raise ValueError(f"the folder {folder} holds no data file; known are {', '.join(READERS)}")
    if not data:
        return about
    if about:
        names = ", ".join(file.name for file in about)
        warnings.warn(
            f"{names} in the folder {folder} is not read: it is about the data; name a file to learn it", stacklevel=3
        )
    if below:
        warnings.warn(
            f"of the folder {folder} the files in it are read, and not those in its folders "
            f"{', '.join(sorted(below))}; name these as well to read them",
            stacklevel=3,
        )
    splits = named_splits([file.name for file in data])
    if len(splits) > 1:
        warnings.warn(
            f"the folder {folder} holds the splits {', '.join(splits)}, and all of its files are read; name the files "
            "of one split to keep to it",
            stacklevel=3,
        )
    return data


def is_records(data: Any) -> bool:
    """Whether `data` gives records itself, instead of naming files."""
    # A dataset of torch's that is asked by number has no __iter__.
    if isinstance(data, str | Path | Mapping) or not (isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        return False
    return not (isinstance(data, Sequence) and all(isinstance(item, str | Path) for item in data))
