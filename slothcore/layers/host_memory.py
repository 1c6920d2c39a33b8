"""Pinned memory of the host that is reused from step to step, and copies to and from it beside the computation."""

from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

# Host memory starts on lines of this many bytes, so that no two copies share one.
ALIGNMENT = 512
SMALLEST_SLAB = 64 * 2**20
LARGEST_SLAB = 2**30


class Copy(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Make what the device computes from here on come after the copy; the host does not wait."""


class Transfer(Protocol):
    """Moves bytes between device and host, in the order asked for."""

    def moves(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies where this moves tensors from."""

    def host_memory(self, nbytes: int) -> Tensor:
        """A new uint8 [nbytes] on the host."""

    def copy(self, source: Tensor, target: Tensor) -> Copy:
        """Begin to copy uint8 `source` to `target`, after what the device was asked for so far and every earlier copy.

        Both must stay allocated, and as they are, until the copy was waited for.
        """


class CudaCopy:
    """A copy on a side stream, and the stream that computed when it began."""

    def __init__(self, done: torch.cuda.Event, home: torch.cuda.Stream) -> None:
        self._done = done
        self._home = home

    def wait(self) -> None:
        # Memory goes back to the stream it was taken on, which need not be the current one of a thread that lets go.
        for stream in {self._home, torch.cuda.current_stream(self._home.device)}:
            stream.wait_event(self._done)


class CudaTransfer:
    """Copies between a CUDA device and pinned memory, on a stream of their own.

    Both directions share one stream. A pass needs one of them at a time, and a stretch of host memory that is given
    back and taken again is then never written while an earlier copy still reads it.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def moves(self, tensor: Tensor) -> bool:
        return tensor.is_cuda

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, source: Tensor, target: Tensor) -> CudaCopy:
        device = source.device if source.is_cuda else target.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        side, home = self._streams[device], torch.cuda.current_stream(device)
        side.wait_stream(home)
        with torch.cuda.stream(side):
            target.copy_(source, non_blocking=True)
        return CudaCopy(side.record_event(), home)


class Region:
    """A stretch of a slab. It is free again once nobody refers to it: there is nothing to call."""

    __slots__ = ("__weakref__", "bytes")

    def __init__(self, memory: Tensor) -> None:
        self.bytes = memory


class _Slab:
    """One allocation, handed out from its beginning to its end, and again once all of it came back."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._used = 0
        self._taken: WeakSet[Region] = WeakSet()

    def take(self, nbytes: int) -> Region | None:
        if not self._taken:
            self._used = 0
        if self._used + nbytes > len(self.memory):
            return None
        region = Region(self.memory[self._used : self._used + nbytes])
        self._used += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._taken.add(region)
        return region


class HostMemory:
    """Memory on the host in a few slabs, since pinning some costs a millisecond for every few MiB.

    The slabs grow with what there is: a small model pins little, a large one has few slabs. They are never given back
    while this lives. Sizes are powers of two, to which torch would round pinned memory anyway.

    Args:
        allocate: makes a uint8 tensor of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._slabs: list[_Slab] = []

    @property
    def nbytes(self) -> int:
        """How much is allocated."""
        return sum(len(slab.memory) for slab in self._slabs)

    def take(self, nbytes: int) -> Region:
        """A region of exactly `nbytes`, at least 1; a new slab if there is no room for it."""
        for slab in self._slabs:
            region = slab.take(nbytes)
            if region is not None:
                return region
        size = min(max(self.nbytes, SMALLEST_SLAB), LARGEST_SLAB)
        slab = _Slab(self._allocate(max(size, 1 << (nbytes - 1).bit_length())))
        self._slabs.append(slab)
        region = slab.take(nbytes)
        assert region is not None
        return region
