"""Files that are not what their names say: told by how they begin, before a reader fails somewhere inside."""

from pathlib import Path

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files begin that are often met under a wrong name, the endings that fit them, and what to do.
_PAGE = (".txt", ".md"), "a page of the web, such as a login or an error; download the file itself"
MISTAKEN: dict[bytes, tuple[tuple[str, ...], str]] = {
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"version https://git-lfs": ((), "a pointer of Git LFS instead of the file; fetch that with git lfs pull"),
    b"PK\x03\x04": ((), "a zip archive or a spreadsheet; unpack it, or save it as CSV"),
    b"PAR1": ((".parquet",), "a Parquet file; name it .parquet"),
    b"\x1f\x8b": ((".gz",), "compressed by gzip; add .gz to its name"),
}


def check_beginning(path: Path) -> None:
    """Raise ValueError if the file begins as a file of another kind does."""
    with path.open("rb") as file:
        begin = file.read(64).removeprefix(BYTE_ORDER_MARK).lstrip()
    for sign, (endings, what) in MISTAKEN.items():
        # Of these only HTML may be written in capitals; a header of a table may begin with Par1.
        fits = begin.startswith(sign) or (sign.startswith(b"<") and begin.lower().startswith(sign))
        if fits and not path.name.lower().endswith(endings):
            raise ValueError(f"{path} is {what}")
