"""A stand-in for the copies between a GPU and the host that makes them as late as the rules allow."""

from weakref import ref

import torch
from torch import Tensor

POISON = 255  # in every byte: NaN in each floating-point dtype


class LateTransfer:
    """Copies in the order asked for, and none before it, or a later one, is waited for.

    So whoever reads too early, or gives memory back too early, meets poison.

    Attributes:
        out, into: bytes of each copy to the host and back, in the order asked for.
        sources: addresses of what was sent to the host.
        slabs: how often host memory was allocated.
        peak: the most of `held` when a copy began.
        faults: what a GPU would have answered with silent corruption.
    """

    def __init__(self) -> None:
        self.out: list[int] = []
        self.into: list[int] = []
        self.sources: list[int] = []
        self.slabs = 0
        self.peak = 0
        self.faults: list[str] = []
        self._host: set[int] = set()
        self._waiting: list[LateCopy] = []
        self._device_side: list[ref[Tensor]] = []

    def moves(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() not in self._host

    def host_memory(self, nbytes: int) -> Tensor:
        self.slabs += 1
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self._host.add(memory.untyped_storage().data_ptr())
        return memory

    def copy(self, source: Tensor, target: Tensor) -> "LateCopy":
        assert source.dtype == target.dtype == torch.uint8
        assert source.shape == target.shape
        outward = self.moves(source)
        assert outward != self.moves(target)
        (self.out if outward else self.into).append(len(source))
        if outward:
            self.sources.append(source.data_ptr())
        target.fill_(POISON)
        self._device_side.append(ref(source if outward else target))
        self.peak = max(self.peak, self.held())
        job = LateCopy(self, source, target, outward)
        self._waiting.append(job)
        return job

    def finish(self, job: "LateCopy") -> None:
        """Make the copies up to this one."""
        while job in self._waiting:
            self._waiting.pop(0).make()

    def held(self) -> int:
        """Bytes of the device's memory that copies came from or went to, and that are held still."""
        tensors = [tensor for reference in self._device_side if (tensor := reference()) is not None]
        return sum(len(tensor) for tensor in tensors)


class LateCopy:
    """Holds the host's side only: memory of the device that was given back is no longer there to be copied."""

    def __init__(self, transfer: LateTransfer, source: Tensor, target: Tensor, outward: bool) -> None:
        self._transfer = transfer
        self._host, self._device = (target, ref(source)) if outward else (source, ref(target))
        self._outward = outward

    def wait(self) -> None:
        self._transfer.finish(self)

    def make(self) -> None:
        device = self._device()
        if device is None:
            # Sending what nobody needs any more is harmless; writing into memory that belongs to others is not.
            if not self._outward:
                self._transfer.faults.append("wrote into memory that was given back")
        elif self._outward:
            self._host.copy_(device)
        else:
            device.copy_(self._host)
