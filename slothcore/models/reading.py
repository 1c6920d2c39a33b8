"""Tensors out of safetensors files at the speed of the disk.

A file is a header, JSON that says where each tensor lies, and then the bytes of the tensors without gaps. They are read
in the order in which they lie, in pieces of 8 MiB, by a few threads that run ahead of whoever uses the tensors:

    on a CPU   straight into the memory of the tensor that is handed out;
    on a GPU   into a ring of pinned buffers, from which the GPU fetches each piece while the next ones are read.

At most 16 pieces are under way, so beside the tensors themselves 128 MiB of host memory suffice for any model, and the
GPU is never waited for, except by a thread that finds its buffer still being fetched.
"""

import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

PIECE_BYTES = 8 * 2**20
PIECES_UNDER_WAY = 16
THREADS = 8
LARGEST_HEADER = 100_000_000
"""What safetensors itself allows."""

# How the file begins that stands for another in a checkout without git-lfs.
GIT_LFS_POINTER = b"version https://git-lfs"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, read from the header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file by name.

    Raises: ValueError if the file is missing, cut short, or its header does not describe the bytes that follow.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its {size} bytes do not hold the header")
            header = json.loads(stream.read(length).decode("utf-8"))
        return _checked(header, file, data_start=8 + length, data_bytes=size - 8 - length)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from None


def _checked(header: Any, file: Path, *, data_start: int, data_bytes: int) -> dict[str, StoredTensor]:
    """The tensors of a header that fits its file: each as long as its shape says, one after the other, to the end."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"its header does not describe {name}") from None
        if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f"its header describes {name} wrongly")
        tensors[name] = StoredTensor(file, shape, dtype, data_start + begin, end - begin)
        # A dtype that we do not know is refused later, if anyone asks for the tensor.
        if dtype in DTYPES and end - begin != prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{name} has {end - begin} bytes, which do not fit {dtype} of shape {list(shape)}")
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise ValueError(f"{name} begins at byte {tensor.offset} instead of {position}")
        position += tensor.nbytes
    if position != data_start + data_bytes:
        raise ValueError(f"it has {data_start + data_bytes} bytes, its header describes {position}")
    return tensors


def read_bytes(stored: StoredTensor) -> bytes:
    """The bytes of one small tensor. Raises: ValueError, naming the file, if it is damaged."""
    try:
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            return stream.read(stored.nbytes)
    except OSError as error:
        raise _damaged(stored.file, error) from None


def read_tensors(
    stored: Mapping[str, StoredTensor],
    names: Iterable[str],
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in the dtype and shape in which they are stored, by file and position.

    Args:
        names: keys of `stored`.
        device: a GPU gets the tensors itself, complete for what follows on its current stream while the host goes on;
            for any other device they are on the CPU.
        progress: show a bar of the bytes, if standard error is a terminal.
    Raises: ValueError, naming the file, if it cannot be read as its header promised.
    """
    device = torch.device(device)
    ordered = sorted(set(names), key=lambda name: (stored[name].file, stored[name].offset))
    pieces = _pieces(stored, ordered)
    under_way: deque[tuple[_Piece, Future[None]]] = deque()
    with ExitStack() as stack:
        total = sum(stored[name].nbytes for name in ordered)
        bar = tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=None if progress else True)
        stack.callback(bar.close)
        largest = max((stored[name].nbytes for name in ordered), default=0)
        destination = _PinnedRing(device, min(max(largest, 1), PIECE_BYTES)) if device.type == "cuda" else _InPlace()
        files = _OpenFiles(stack.enter_context(ExitStack()))
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reading")
        # Whoever stops early need not wait for pieces that nobody will use.
        stack.callback(pool.shutdown, cancel_futures=True)
        while True:
            while len(under_way) < PIECES_UNDER_WAY and (piece := next(pieces, None)) is not None:
                job = destination.prepare(piece)
                handle = files.handle(piece.stored.file)
                under_way.append((piece, pool.submit(_fill, handle, piece, *job)))
            if not under_way:
                return
            piece, future = under_way.popleft()
            future.result()
            tensor = destination.complete(piece)
            bar.update(piece.end - piece.begin)
            if piece.end == piece.stored.nbytes:
                name, shape = piece.name, piece.stored.shape
                yield name, tensor.view(DTYPES[piece.stored.dtype]).view(shape)
                del tensor  # or it would live on while the next one is read


@dataclass(frozen=True)
class _Piece:
    """Bytes begin to end of one tensor."""

    name: str
    stored: StoredTensor
    begin: int
    end: int


def _pieces(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[_Piece]:
    for name in names:
        nbytes = stored[name].nbytes
        for begin in range(0, max(nbytes, 1), PIECE_BYTES):
            yield _Piece(name, stored[name], begin, min(begin + PIECE_BYTES, nbytes))


class _InPlace:
    """Pieces are read into the tensors themselves, on the CPU."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}  # of which some pieces are under way

    def prepare(self, piece: _Piece) -> tuple[memoryview, None]:
        """Where to read the piece to, and what to wait for before."""
        if piece.begin == 0:
            self.tensors[piece.name] = torch.empty(piece.stored.nbytes, dtype=torch.uint8, device="cpu")
        return self.tensors[piece.name].numpy().data[piece.begin : piece.end], None

    def complete(self, piece: _Piece) -> Tensor:
        """The bytes of the tensor, once the piece is there."""
        is_last = piece.end == piece.stored.nbytes
        return self.tensors.pop(piece.name) if is_last else self.tensors[piece.name]


class _PinnedRing:
    """Pieces are read into pinned buffers by turns, and copied to the GPU on its current stream."""

    def __init__(self, device: torch.device, piece_bytes: int) -> None:
        self.device = device
        # As many as pieces are under way: a buffer's turn comes again when its last piece is complete.
        shape = (PIECES_UNDER_WAY, piece_bytes)
        self.buffers = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True)
        self.fetched: list[torch.cuda.Event | None] = [None] * PIECES_UNDER_WAY
        self.prepared = self.completed = 0
        self.tensor: Tensor | None = None

    def prepare(self, piece: _Piece) -> tuple[memoryview, torch.cuda.Event | None]:
        slot = self.prepared % PIECES_UNDER_WAY
        self.prepared += 1
        buffer = self.buffers[slot, : piece.end - piece.begin]
        return buffer.numpy().data, self.fetched[slot]

    def complete(self, piece: _Piece) -> Tensor:
        slot = self.completed % PIECES_UNDER_WAY
        self.completed += 1
        if piece.begin == 0:
            self.tensor = torch.empty(piece.stored.nbytes, dtype=torch.uint8, device=self.device)
        assert self.tensor is not None
        tensor = self.tensor
        tensor[piece.begin : piece.end].copy_(self.buffers[slot, : piece.end - piece.begin], non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.fetched[slot] = event
        if piece.end == piece.stored.nbytes:
            self.tensor = None
        return tensor


class _OpenFiles:
    """Files opened when first asked for, and closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.handles: dict[Path, int] = {}

    def handle(self, file: Path) -> int:
        if file not in self.handles:
            try:
                handle = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise _damaged(file, error) from None
            self.stack.callback(os.close, handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self.handles[file] = handle
        return self.handles[file]


def _fill(handle: int, piece: _Piece, buffer: memoryview, fetched: torch.cuda.Event | None) -> None:
    """Read a piece into `buffer`, once the GPU has fetched what was in it."""
    if fetched is not None:
        fetched.synchronize()
    position, file = piece.stored.offset + piece.begin, piece.stored.file
    while len(buffer) > 0:
        try:
            count = os.preadv(handle, [buffer], position)
        except OSError as error:
            raise _damaged(file, error) from None
        if count == 0:
            raise _damaged(file, f"it ends at byte {position}")
        buffer = buffer[count:]
        position += count


def _damaged(file: Path, reason: object) -> ValueError:
    if isinstance(reason, PermissionError):
        return ValueError(f"{file} may not be read: {reason.strerror}; change its rights")
    try:
        with file.open("rb") as stream:
            is_pointer = stream.read(len(GIT_LFS_POINTER)) == GIT_LFS_POINTER
    except OSError:
        is_pointer = False
    if is_pointer:
        return ValueError(f"{file} is only git-lfs's pointer to the weights; run `git lfs pull` in that folder")
    return ValueError(f"{file} is truncated or damaged ({reason}); download or copy it again")
