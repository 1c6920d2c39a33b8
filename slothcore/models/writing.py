"""Writing safetensors piece by piece: of a tensor no more than a few pieces is in host memory besides itself.

A file begins with a header that says what lies where, so names, dtypes and shapes come first and the values follow, in
any order. They lie as safetensors' own library lays them: larger dtypes first, and by name; the files are equal to the
last byte. A thread writes while the caller makes the next tensor; one on a GPU travels through pinned buffers.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from slothcore.models.reading import DTYPES

PIECE_BYTES = 8 * 2**20
PIECES_UNDER_WAY = 16
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The order in which safetensors lays tensors: its dtypes, the widest first.
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")

Outline = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name -> dtype and shape of tensors that are still to come."""


def nbytes_of(outline: Outline) -> int:
    """Bytes of all tensors together."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in outline.values())


def outline_of(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What tensors that exist will be in a file."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors}


class PieceWriter:
    """Writes bytes of tensors to places in files, in a thread; at most `PIECES_UNDER_WAY` pieces wait for it.

    As a context manager: everything is in the files, though perhaps not on the disk, when its block ends without an
    error. After one, nothing is written any more.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing")
        self._under_way: deque[Future[None]] = deque()
        self._ring: Tensor | None = None
        self._count = 0

    def __enter__(self) -> "PieceWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._under_way and error is None:
                self._under_way.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, handle: int, position: int, tensor: Tensor) -> None:
        """Begin to write the bytes of `tensor`, row by row; it must not change any more.

        Raises: OSError if an earlier piece could not be written.
        """
        data = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for begin in range(0, len(data), PIECE_BYTES):
            piece = data[begin : begin + PIECE_BYTES]
            if len(self._under_way) == PIECES_UNDER_WAY:
                # The oldest one, whose pinned buffer is the next.
                self._under_way.popleft().result()
            piece, ready = self._fetched(piece) if piece.is_cuda else (piece, None)
            self._under_way.append(self._pool.submit(_write, handle, position + begin, piece, ready))
            self._count += 1

    def _fetched(self, piece: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """A piece on its way from the GPU to a pinned buffer, and what to wait for."""
        if self._ring is None:
            self._ring = torch.empty(PIECES_UNDER_WAY, PIECE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
        buffer = self._ring[self._count % PIECES_UNDER_WAY, : len(piece)]
        buffer.copy_(piece, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(piece.device))
        return buffer, event


class TensorFile:
    """One safetensors file that is being written. Its header is there from the first moment on.

    Args:
        outline: what it will hold.
        metadata: texts by name, for the header; None: what every reader of torch's tensors expects.
    """

    def __init__(self, path: Path, outline: Outline, *, metadata: Mapping[str, str] | None = None) -> None:
        self.missing = set(outline)
        self._outline = outline
        self._places: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata) if metadata else {"format": "pt"}}
        end = 0
        for name in sorted(outline, key=lambda name: (ORDER.index(NAMES[outline[name][0]]), name)):
            dtype, shape = outline[name]
            begin, end = end, end + dtype.itemsize * prod(shape)
            self._places[name] = begin
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
        try:
            _write_all(self._handle, 0, memoryview(len(text).to_bytes(8, "little") + text))
        except BaseException:
            self.close()
            raise

    def put(self, name: str, tensor: Tensor, writer: PieceWriter) -> None:
        """Begin to write one tensor. Raises: ValueError if it is not what the outline says of it."""
        expected, found = self._outline.get(name), (tensor.dtype, tuple(tensor.shape))
        if expected != found or name not in self.missing:
            raise ValueError(f"{name} was to be written as {expected} once, and came as {found}")
        writer.write(self._handle, self._start + self._places[name], tensor)
        self.missing.discard(name)

    def close(self) -> None:
        """No piece may be under way any more."""
        os.close(self._handle)


def _write(handle: int, position: int, piece: Tensor, ready: torch.cuda.Event | None) -> None:
    if ready is not None:
        ready.synchronize()
    _write_all(handle, position, piece.numpy().data)


def _write_all(handle: int, position: int, data: memoryview) -> None:
    """A system may write less than it was asked to."""
    while len(data) > 0:
        count = os.pwrite(handle, data, position)
        data = data[count:]
        position += count
