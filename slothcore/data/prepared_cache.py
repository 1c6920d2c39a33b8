"""Prepared tokens on disk, found again by what they were made of.

A folder is named after a hash of the records, the tokenizer and the settings, so nothing in it is ever out of date. It
is written under another name and renamed when it is whole: a run that dies leaves nothing that looks finished, and of
two runs that prepare the same data the first one wins. What is new makes room for itself (`cache_pruning`).
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from slothcore.data.cache_pruning import LONGEST_UNUSED_DAYS, limit_gib, lock_shared, prune
from slothcore.data.token_store import ABOUT_FILE, TokenStore, TokenWriter
from slothcore.version import __version__

HOME_VARIABLE = "SLOTHCORE_HOME"


def cache_home() -> Path:
    """Where slothcore keeps what it can make again: SLOTHCORE_HOME, or ~/.cache/slothcore."""
    if chosen := os.environ.get(HOME_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "slothcore"


def cache_key(parts: Mapping[str, Any]) -> str:
    """A name for what these values lead to; other releases may prepare the same otherwise, so theirs differ."""
    text = json.dumps({**parts, "slothcore": __version__}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_prepared(key: str) -> tuple[TokenStore, dict[str, Any]] | None:
    """The tokens of that name, and what was kept about them; None if they are not there, or damaged.

    As long as the store is in use, they are not removed to make room.
    """
    try:
        return _open(prepared_folder(key))
    except (OSError, ValueError):
        return None


class PreparedFolder:
    """A folder being filled: `writer` fills it, `keep` gives it its name, and without that it is deleted."""

    def __init__(self, key: str) -> None:
        limit_gib()  # a wrong one is said before the work, not after it
        self._final = prepared_folder(key)
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self._final.parent))
        self.writer = TokenWriter(self.path)

    def __enter__(self) -> "PreparedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(*error)
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self, about: dict[str, Any]) -> tuple[TokenStore, list[str]]:
        """The finished store, and what there is to say about where it lies."""
        self.writer.finish(about)
        # In use from before it has its name, so that no other run removes it.
        store, _ = _open(self.path)
        if find_prepared(self._final.name) is None:
            shutil.rmtree(self._final, ignore_errors=True)
        # Another run may be faster, with the same content; what is mapped stays readable after its folder is deleted.
        with suppress(OSError):
            self.path.rename(self._final)
        limit, days = limit_gib(), LONGEST_UNUSED_DAYS
        notes = [f"the prepared rows are kept in {self._final} for the next run ({limit:g} GiB in all, {days} days)"]
        return store, [*notes, *prune(self._final.parent, self._final)]


def prepared_folder(key: str) -> Path:
    """Where the tokens of that name lie, or will."""
    return cache_home() / "prepared" / key


def _open(folder: Path) -> tuple[TokenStore, dict[str, Any]]:
    """What a folder holds, locked against removal.

    Raises: OSError or ValueError if it is not whole, or is being removed.
    """
    with ExitStack() as stack:
        about_file = stack.enter_context((folder / ABOUT_FILE).open("rb"))
        lock_shared(about_file)
        about = json.loads(about_file.read())
        store = TokenStore.open(folder)
        # The time of its last use.
        os.utime(folder / ABOUT_FILE)
        store.lease = about_file
        stack.pop_all()
        return store, about
