"""Prepared tokens on disk, found again by what they were made of.

A folder is named after a hash of the records, the tokenizer and the settings, so nothing in it is ever out of date. It
is written under another name and renamed when it is whole: a run that dies leaves nothing that looks finished, and of
two runs that prepare the same data the first one wins.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """The tokens of that name, and what was kept about them; None if they are not there, or damaged."""
    folder = prepared_folder(key)
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        return TokenStore.open(folder), about
    except (OSError, ValueError):
        return None


class PreparedFolder:
    """A folder being filled: `writer` fills it, `keep` gives it its name, and without that it is deleted."""

    def __init__(self, key: str) -> None:
        self._final = prepared_folder(key)
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=self._final.parent))
        self.writer = TokenWriter(self.path)

    def __enter__(self) -> "PreparedFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.__exit__(*error)
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self, about: dict[str, Any]) -> tuple[TokenStore, Path]:
        """The finished store, and where it lies."""
        self.writer.finish(about)
        if find_prepared(self._final.name) is None:
            shutil.rmtree(self._final, ignore_errors=True)
        try:
            self.path.rename(self._final)
        except OSError:
            # Another run was faster, with the same content.
            if find_prepared(self._final.name) is None:
                raise
        return TokenStore.open(self._final), self._final


def prepared_folder(key: str) -> Path:
    """Where the tokens of that name lie, or will."""
    return cache_home() / "prepared" / key
