"""Stretches of device memory that backward needs: their way to the host, back, and the tensors made from them again."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slothcore.layers.host_memory import Copy, HostMemory, Region, Transfer


@dataclass(frozen=True, slots=True)
class Layout:
    """How a tensor lies in memory.

    Attributes:
        first: address of its first element.
        nbytes: from there to the end of its last element, gaps included.
    """

    device: torch.device
    first: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "Layout":
        """The layout of a tensor that is not empty."""
        shape, stride = tensor.shape, tensor.stride()
        last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        nbytes = (last + 1) * tensor.element_size()
        return Layout(tensor.device, tensor.data_ptr(), nbytes, tensor.dtype, shape, stride)

    def view(self, memory: Tensor, start: int) -> Tensor:
        """The tensor again, a view of bytes that lay at address `start` when it was saved."""
        begin = self.first - start
        return memory[begin : begin + self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)


class Block:
    """A stretch of device memory that backward needs, however many operations saved it.

    Attributes:
        address: where it began in the forward pass.
        nbytes: its size.
        source: its bytes there, until they are let go; they have the version of the tensor.
        is_kept: whether they are not let go at all.
    """

    def __init__(self, memory: Tensor) -> None:
        """Of `memory`, uint8 [nbytes], as `bytes_behind` gives it."""
        self.address = memory.data_ptr()
        self.nbytes = len(memory)
        self.source: Tensor | None = memory
        self.is_kept = False
        self._device = memory.device
        self._version = memory._version
        self._host: Region | None = None
        self._sent: Copy | None = None
        self._fetched: _Fetched | None = None

    def holds(self, layout: Layout, version: int) -> bool:
        """Whether a tensor that exists now, laid out like this and of this version, is a part of it.

        While `source` is held, no other tensor can have come to its address.
        """
        if self.source is None or not self._version == self.source._version == version:
            return False
        begin = layout.first - self.address
        inside = self._device == layout.device and begin >= 0 and begin + layout.nbytes <= self.nbytes
        return inside and begin % layout.dtype.itemsize == 0

    def send(self, transfer: Transfer, memory: HostMemory) -> None:
        """Begin the copy to the host, unless that was done."""
        if self._host is None:
            assert self.source is not None
            self._host = memory.take(self.nbytes)
            self._sent = transfer.copy(self.source, self._host.bytes)

    def let_go(self) -> None:
        """Give the memory of the forward pass back, for use after the copy."""
        assert self._sent is not None
        self._sent.wait()
        self._sent = self.source = None

    @property
    def is_on_device(self) -> bool:
        """Whether its bytes are there, or on their way."""
        # A backward that overwrites what was saved leaves nothing for another user of the same bytes.
        return self.source is not None or (self._fetched is not None and not self._fetched.is_overwritten)

    def fetch(self, transfer: Transfer) -> None:
        """Begin the copy back, unless the bytes are on the device or on their way."""
        if not self.is_on_device:
            assert self._host is not None
            self._fetched = _Fetched(self._host, self._device, transfer)

    def on_device(self) -> Tensor:
        """Its bytes, for use from now on, after `fetch`."""
        if self.source is not None:
            return self.source
        assert self._fetched is not None
        return self._fetched.ready()


class _Fetched:
    """Bytes on their way back to the device."""

    def __init__(self, host: Region, device: torch.device, transfer: Transfer) -> None:
        self._copy: Copy | None = None
        self._bytes = torch.empty(len(host.bytes), dtype=torch.uint8, device=device)
        self._copy = transfer.copy(host.bytes, self._bytes)
        self._version = 0

    @property
    def is_overwritten(self) -> bool:
        """Whether a backward changed them after they were ready."""
        return self._copy is None and self._bytes._version != self._version

    def ready(self) -> Tensor:
        """The bytes, for use from now on."""
        if self._copy is not None:
            self._copy.wait()
            self._copy = None
            self._version = self._bytes._version
        return self._bytes

    def __del__(self) -> None:
        # The allocator may hand the memory out again at once; nothing may be written there before the copy is over.
        if self._copy is not None:
            self._copy.wait()


def bytes_behind(tensor: Tensor, *, at_least: int) -> Tensor | None:
    """What has to travel so that `tensor` can be made again: uint8 [n], a view that shares its version.

    These are its own bytes if they lie together. Of one with gaps, such as the queries in a fused projection, it is
    the whole storage, so that keys and values find theirs there too. None if that is more than twice as much, if it is
    fewer bytes than `at_least`, or if the tensor is of a kind whose bytes are not all of it.
    """
    plain = tensor.layout == torch.strided and type(tensor) in (Tensor, nn.Parameter) and not tensor.is_complex()
    if not plain or tensor.untyped_storage().nbytes() < at_least:
        return None
    size = tensor.element_size()
    if _is_dense(tensor):
        begin, count = tensor.storage_offset(), tensor.numel()
    else:
        begin, count = 0, tensor.untyped_storage().nbytes() // size
        if count > 2 * tensor.numel():
            return None
    if count * size < at_least:
        return None
    return tensor.detach().as_strided((count,), (1,), begin).view(torch.uint8)


def is_weight(tensor: Tensor) -> bool:
    """Whether a saved tensor is a parameter, frozen or not, another leaf of the graph, or a view of one.

    Such a tensor is there before and after the pass, so sending it away would save nothing. Its class tells: a dense
    weight is always an `nn.Parameter`, and NF4 weights are not saved through autograd. A set of the addresses of the
    model's weights would have to be made anew whenever one of them is replaced, and an activation may come to the
    address of a weight that is gone.
    """
    owner = tensor if tensor._base is None else tensor._base
    return isinstance(owner, nn.Parameter) or (owner.is_leaf and owner.requires_grad)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill a stretch of memory without gaps, in any order of its dimensions."""
    if tensor.is_contiguous():
        return True
    elements = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if step != elements:
                return False
            elements *= size
    return True
