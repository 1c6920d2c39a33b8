"""One process at a time trains into a folder: two would delete each other's checkpoints and mix their logs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none, and opens no folder
    fcntl = None  # type: ignore[assignment]

# Folders that this process has, so that who has one may enter another block for it.
_held: set[Path] = set()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """For a block that writes into `folder`, which is made if need be: nobody else who asks has it meanwhile.

    The folder itself is locked, so nothing lies in it for that, and however a process ends, the system lets go. Where
    folders cannot be locked, as on some network file systems, or `folder` cannot be made, the block runs all the same.
    A folder that was made, and stays empty, is deleted again.

    Raises: ValueError if another process has it.
    """
    place = folder.absolute()
    if place in _held:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    handle = None
    try:
        handle = _open(folder)
        _held.add(place)
        yield
    finally:
        _held.discard(place)
        for path in made:
            with suppress(OSError):
                path.rmdir()
        if handle is not None:
            os.close(handle)


def _open(folder: Path) -> int | None:
    """The locked folder, to be closed; None if it cannot be locked. Raises ValueError if another process has it."""
    if fcntl is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None  # what is wrong with it is said by who writes into it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise ValueError(
            f"output_dir {folder} belongs to a run that is under way; choose another folder, or wait until it ends"
        ) from error
    except OSError:
        os.close(handle)
        return None
    return handle
