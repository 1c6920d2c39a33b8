"""Files of a run are written as a whole, or an error says which one was not, and what helps."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """For a block that writes `target`. Raises: OSError that names it and says what helps, if it cannot be written."""
    try:
        yield
    except OSError as error:
        remedy = "make room, or check the disk"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            remedy = "choose a folder that may be written into"
        raise OSError(f"{target} cannot be written ({error}); {remedy}") from error


def replace_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one stroke: who reads it sees the old file or the new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.partial")
    with writing(path):
        try:
            # A lone surrogate, which JSON may bring along, has no UTF-8.
            temporary.write_bytes(text.encode("utf-8", "replace"))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
