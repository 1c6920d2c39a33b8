"""A file of lines that another process is still writing, read once and then only where it grew."""

from pathlib import Path


class GrowingFile:
    """The lines of a file.

    Attributes:
        has_unfinished: whether what stands at the end is no whole line; it waits for its rest.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._offset, self._inode = 0, -1
        self.has_unfinished = False

    def read(self) -> tuple[bool, list[bytes]]:
        """The lines written since the last call, blank ones left out, and whether they are all that there are.

        They are all of them at the first call, and where the file is another or became shorter: what was read before
        is then void. A file that is not there has no lines.
        """
        is_whole = False
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_size < self._offset or status.st_ino != self._inode:
                    self._begin_anew()
                    self._inode, is_whole = status.st_ino, True
                file.seek(self._offset)
                content = file.read()
        except OSError:
            self._begin_anew()
            return True, []
        whole, newline, rest = content.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        self.has_unfinished = bool(rest.strip())
        return is_whole, [line for line in whole.split(b"\n") if line.strip()]
