"""What makes room in the cache of prepared tokens: what was not used for long, and then what was used longest ago.

Safe beside other runs. A run holds a shared lock on what it reads, for as long as it has it mapped, and what is locked
is left alone. What goes is renamed first, so nobody finds half of it. Folders that a run fills have names of their own,
and count as left behind by one that died when nothing was written into them for a day.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import uuid4

from slothcore.data.token_store import ABOUT_FILE
from slothcore.data.values import counted

try:
    import fcntl
except ImportError:  # Windows, which deletes no file that is open
    fcntl = None  # type: ignore[assignment]

LIMIT_VARIABLE = "SLOTHCORE_CACHE_GIB"
DEFAULT_LIMIT_GIB = 20.0
LONGEST_UNUSED_DAYS = 30
DEAD_AFTER_DAYS = 1
GIB, DAY = 1 << 30, 86_400


@dataclass(frozen=True)
class Entry:
    """A folder of the cache: the time of its last use (or writing), and its bytes."""

    path: Path
    used: float
    size: int


def limit_gib() -> float:
    """How much the cache may hold. Raises ValueError if SLOTHCORE_CACHE_GIB is no such number."""
    chosen = os.environ.get(LIMIT_VARIABLE)
    if not chosen:
        return DEFAULT_LIMIT_GIB
    try:
        limit = float(chosen)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise ValueError(
            f"{LIMIT_VARIABLE} must be a number of GiB, at least 0, got {chosen!r}; set it so, or unset it"
        )
    return limit


def lock_shared(file: IO[bytes]) -> None:
    """Say that what the file belongs to is in use, until it is closed.

    Raises: BlockingIOError if it is being removed.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        # On a file system without locks none can be had to remove it either.
        if isinstance(error, BlockingIOError):
            raise


def prune(folder: Path, keep: Path) -> list[str]:
    """Make room in the folder of the cache.

    Args:
        keep: what was just made; it stays even if it alone is more than the cache may hold.
    Returns: a line about what was removed, if anything was.
    Raises: ValueError for a limit that is no number.
    """
    limit = limit_gib()
    now = time.time()
    entries = sorted((entry for entry in _entries(folder) if entry.path != keep), key=lambda entry: entry.used)
    total = sum(entry.size for entry in entries) + _entry(keep).size
    removed = freed = 0
    for entry in entries:
        being_made = entry.path.name.startswith(".")
        days = DEAD_AFTER_DAYS if being_made else LONGEST_UNUSED_DAYS
        too_old = now - entry.used > days * DAY
        too_much = total > limit * GIB and not being_made
        if (too_old or too_much) and _remove(entry.path):
            removed, freed, total = removed + 1, freed + entry.size, total - entry.size
    if not removed:
        return []
    return [
        f"{counted(removed, 'older set')} of prepared rows, {freed / GIB:.2f} GiB, removed from {folder}: it keeps "
        f"{limit:g} GiB ({LIMIT_VARIABLE}), and nothing unused for {LONGEST_UNUSED_DAYS} days"
    ]


def _entries(folder: Path) -> list[Entry]:
    return [_entry(path) for path in folder.iterdir() if path.is_dir()]


def _entry(path: Path) -> Entry:
    used, size = 0.0, 0
    # Another run may remove it meanwhile.
    with suppress(OSError):
        for file in (path, *path.iterdir()):
            facts = file.stat()
            used = max(used, facts.st_mtime)
            size += facts.st_size
    return Entry(path, used, size)


def _remove(path: Path) -> bool:
    """Remove an entry that nobody has in use. Returns whether it is gone."""
    with suppress(OSError):
        if path.name.startswith("."):
            shutil.rmtree(path)
            return True
        # One that is damaged has no file to lock, and nobody reads it.
        lock = (path / ABOUT_FILE).open("rb") if (path / ABOUT_FILE).exists() else None
        try:
            if lock is not None and fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            gone = path.with_name(f".gone-{uuid4().hex}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            return True
        finally:
            if lock is not None:
                lock.close()
    return False
