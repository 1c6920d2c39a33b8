"""A folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What a file system takes for itself, and the small files.
SPARE_BYTES = 32 * 2**20
GIB = 2**30


def place_of(path: str | Path) -> Path:
    """The folder that is meant: ~ is the user's own, and of a link it is where that leads.

    Raises: ValueError for a link that leads nowhere but to itself.
    """
    folder = Path(path).expanduser()
    if not folder.is_symlink():
        return folder
    place = Path(os.path.realpath(folder))  # Path.resolve raises another error in each version of Python
    if place.is_symlink():
        raise ValueError(f"{folder} is a link that leads in a circle; choose another folder")
    return place


def require_new(folder: Path) -> None:
    """Raise ValueError unless `folder`, a `place_of`, is absent or empty, and can be made; nothing is written."""
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"output_dir {folder} is a file; choose a new folder")
        if any(folder.iterdir()):
            raise ValueError(f"output_dir {folder} exists and is not empty; choose a new folder")
        is_mount = os.path.ismount(folder)
        if is_mount or folder.samefile(Path.cwd()):
            what = "where a disk is mounted" if is_mount else "the folder that you are in"
            raise ValueError(f"output_dir {folder} is {what} and cannot be replaced; choose a new folder in it")
    nearest = _nearest(folder.absolute().parent)
    if not nearest.is_dir():
        raise ValueError(f"output_dir {folder} would lie in {nearest}, which is a file; choose a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir {folder}: {nearest} may not be written into; choose another folder")


def require_room(folder: Path, size: int) -> None:
    """Raise ValueError unless there is room for `size` bytes where `folder` will lie.

    What an export that was killed has left counts as room: it is deleted first.
    """
    # It is filled beside its place, which may be another disk than one that is mounted there.
    free = shutil.disk_usage(_nearest(folder.absolute().parent)).free
    partial = _partial(folder)
    if partial.is_dir():
        free += sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    if size + SPARE_BYTES > free:
        raise ValueError(
            f"{folder} will take {size / GIB:.2f} GiB, and {free / GIB:.2f} GiB are free there; free some space, or "
            "choose a folder on another disk"
        )


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to be filled, which takes that name when the block ends, on disk to the last byte.

    If anything fails, or the process is killed, nothing has that name; what a killed one left is deleted by the next.

    Raises: OSError, naming `target`, for whatever the disk refuses.
    """
    with folder_beside(target) as partial:
        yield partial
        flush(partial)
        if target.exists():
            target.rmdir()  # empty, or it was not one to write into
        os.replace(partial, target)
        _flush(target.parent)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """A folder on the same disk as `target` for what is to go there, which is gone when the block ends.

    What a process that was killed has left of it is deleted by the next.

    Raises: OSError, naming `target`, for whatever the disk refuses.
    """
    partial = _partial(target)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} cannot be written ({error}); make room, or check the disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def flush(folder: Path) -> None:
    """All files in `folder` onto the disk: a rename survives a power cut, and what was renamed must, too."""
    for path in (*folder.rglob("*"), folder):
        _flush(path)


def _partial(target: Path) -> Path:
    return target.absolute().with_name(f".{target.absolute().name}.partial")


def _nearest(folder: Path) -> Path:
    """Of a folder and those that it would lie in, the innermost that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
