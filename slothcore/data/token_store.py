"""Tokenised documents end to end in flat arrays, in memory or in files.

A token takes five bytes: its id (int32), and whether it is learned (1 byte). Lists of Python numbers take 16 to 70.
Arrays in files are mapped, so of a dataset larger than memory only the parts in use are there.
"""

import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from slothcore.data.masking import IGNORED_LABEL, TokenizedRow

IDS_FILE, LABELS_FILE, STARTS_FILE, TARGETS_FILE = "ids.int32", "learned.bool", "starts.npy", "targets.npy"
ABOUT_FILE = "about.json"
# Tokens that are written, or looked at, at once.
BLOCK = 1 << 20


class TokenStore:
    """Documents of tokens.

    Attributes:
        ids: [tokens] int32.
        labels: [tokens] bool, whether the token is learned; or int32, the labels as they are.
        starts: [documents + 1] int64, where each document begins, and the number of tokens.
        targets: [documents] int64, labels that are learned; the first token of a document is predicted by nothing.
        lease: what stays open for as long as the arrays are used.
    """

    lease: IO[bytes] | None = None

    def __init__(self, ids: np.ndarray, labels: np.ndarray, starts: np.ndarray, targets: np.ndarray) -> None:
        self.ids, self.labels, self.starts, self.targets = ids, labels, starts, targets

    @classmethod
    def from_rows(cls, rows: Iterable[TokenizedRow]) -> "TokenStore":
        """A copy of rows that somebody else has tokenised, with whatever labels they have."""
        ids, labels, starts, targets = array("i"), array("i"), array("q", [0]), array("q")
        for row in rows:
            ids.extend(row.input_ids)
            labels.extend(row.labels)
            starts.append(len(ids))
            targets.append(row.num_targets)
        return cls(*(np.array(part) for part in (ids, labels, starts, targets)))

    @classmethod
    def open(cls, folder: Path) -> "TokenStore":
        """The store that a `TokenWriter` left in a folder. Raises OSError or ValueError if it is not whole."""
        starts = np.load(folder / STARTS_FILE, allow_pickle=False)
        targets = np.load(folder / TARGETS_FILE, allow_pickle=False)
        tokens = int(starts[-1])
        if len(targets) != len(starts) - 1:
            raise ValueError(f"{folder} holds {len(targets)} counts for {len(starts) - 1} documents")
        # Copy on write: torch wants arrays that it could write to.
        ids = np.memmap(folder / IDS_FILE, dtype="<i4", mode="c", shape=(tokens,))
        labels = np.memmap(folder / LABELS_FILE, dtype=np.bool_, mode="c", shape=(tokens,))
        return cls(ids, labels, starts, targets)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: [documents] int64."""
        return np.diff(self.starts)

    def labels_of(self, piece: slice) -> np.ndarray:
        """Labels of some tokens, int32: their ids, or -100."""
        labels = self.labels[piece]
        if labels.dtype != np.bool_:
            return labels
        return np.where(labels, self.ids[piece], np.int32(IGNORED_LABEL))

    def num_also_in(self, other: "TokenStore") -> int:
        """How many of the documents have the tokens of one of `other`, to the last."""
        own = list(self._hashes(np.arange(len(self))))
        wanted = set(own)
        alike = np.flatnonzero(np.isin(other.lengths, self.lengths))
        found = wanted.intersection(other._hashes(alike))
        return sum(key in found for key in own)

    def _hashes(self, documents: np.ndarray) -> Iterator[int]:
        ids = np.asarray(self.ids)  # a slice of a mapped array takes ten times as long
        for start, end in zip(self.starts[documents].tolist(), self.starts[documents + 1].tolist(), strict=True):
            yield hash(ids[start:end].tobytes())

    def blocks(self) -> Iterator[slice]:
        """All tokens, some of them at a time. What was looked at of a mapped file leaves memory again."""
        for start in range(0, len(self.ids), BLOCK):
            yield slice(start, min(start + BLOCK, len(self.ids)))
        for part in (self.ids, self.labels):
            mapped = getattr(part, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)


class TokenWriter:
    """Collects documents for a `TokenStore`: in memory, or in the files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: list[BinaryIO] = []
        if folder is not None:
            self._files = [(folder / name).open("wb") for name in (IDS_FILE, LABELS_FILE)]
        self._ids, self._labels = array("i"), array("i")
        self._starts, self._targets = array("q", [0]), array("q")
        self._written: list[tuple[np.ndarray, np.ndarray]] = []

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def add(self, row: TokenizedRow) -> None:
        """One more document."""
        self._ids.extend(row.input_ids)
        self._labels.extend(row.labels)
        self._starts.append(self._starts[-1] + len(row.input_ids))
        if len(self._ids) >= BLOCK:
            self._flush()

    def finish(self, about: dict[str, Any]) -> TokenStore:
        """The store of all documents; `about` is kept with its files."""
        self._flush()
        starts, targets = np.array(self._starts), np.array(self._targets)
        if self._folder is None:
            ids, labels = (np.concatenate(parts) for parts in zip(*self._written, strict=True))
            return TokenStore(ids, labels, starts, targets)
        np.save(self._folder / STARTS_FILE, starts, allow_pickle=False)
        np.save(self._folder / TARGETS_FILE, targets, allow_pickle=False)
        (self._folder / ABOUT_FILE).write_text(json.dumps(about), encoding="utf-8")
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        return TokenStore.open(self._folder)

    def _flush(self) -> None:
        ids = np.array(self._ids, dtype="<i4")
        learned = np.array(self._labels, dtype=np.int32) != IGNORED_LABEL
        self._count_targets(learned)
        if self._folder is None:
            self._written.append((ids, learned))
        else:
            for file, part in zip(self._files, (ids, learned), strict=True):
                file.write(part.data)
        self._ids, self._labels = array("i"), array("i")

    def _count_targets(self, learned: np.ndarray) -> None:
        """Count those of the documents that are new since the last time, which hold all of `learned`."""
        first = len(self._targets)
        if first == len(self):
            return
        starts = np.array(self._starts[first:])
        starts -= starts[0]
        counts = np.add.reduceat(learned, starts[:-1], dtype=np.int64)
        self._targets.extend(counts - learned[starts[:-1]])


def row_of(store: TokenStore, index: int) -> TokenizedRow:
    """One document of a store as lists."""
    piece = slice(int(store.starts[index]), int(store.starts[index + 1]))
    return TokenizedRow(store.ids[piece].tolist(), store.labels_of(piece).tolist())


def rows_of(store: TokenStore) -> Sequence[TokenizedRow]:
    """All documents of a small store as lists."""
    return [row_of(store, index) for index in range(len(store))]
