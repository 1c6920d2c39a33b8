"""Activations on the host: sent there as the forward pass saves them, and back just before the backward needs them.

    forward    layer 0   layer 1   layer 2   ..          backward    ..   layer 2   layer 1   layer 0
    copies         0 out     1 out     2 out                    2 in    1 in      0 in

Of what the layers save, only about one layer's worth is on the device at any time: a window that moves along the order
in which they saved it. In forward the oldest tensor is let go when a new one needs its place; in backward the tensors
that come next, as many as the window holds, are on their way. A tensor is let go after the computing stream was told to
wait for its copy: should the bus be slower than the layers, they wait, and memory does not grow. The tensors of the
last layers stay, since their backward begins at once.

What travels is the bytes of a storage, so values, strides and dtypes come back as they were and gradients are the same
to the last bit. A tensor that several operations save travels once. A saved tensor that is changed in place raises
RuntimeError in backward, as without offloading.

Everything hangs on what autograd holds. Nodes of the graph own handles, handles own blocks, and a block owns its memory
on the device and on the host. So a graph that is dropped without a backward pass, or whose backward pass fails, gives
everything back.

Source    Rhu et al. 2016 (vDNN), arXiv:1602.08124.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from slothcore.layers.host_memory import CudaTransfer, HostMemory, Transfer
from slothcore.layers.offload_blocks import Block, Layout, bytes_behind, is_weight

MIN_BYTES = 2**20


class ActivationOffload:
    """Keeps what the layers of a model save for backward in pinned host memory.

    One object serves one model, step after step. A pass and its backward run on one stream. What came back stays on the
    device until its node of the graph is gone, so a backward with retain_graph=True gathers all of it there.

    Args:
        num_layers: of the model; None: as many as the last pass with a backward had.
        keep_last: how many of the last layers keep everything on the device.
        resident_layers: how much may be on the device, as a multiple of what the largest layer saves.
        min_bytes: smaller tensors stay on the device.
        transfer: does the copying; None: between CUDA devices and pinned memory, or nothing at all without CUDA.
    Raises: ValueError for a number out of range.
    """

    def __init__(
        self,
        *,
        num_layers: int | None = None,
        keep_last: int = 1,
        resident_layers: float = 1.0,
        min_bytes: int = MIN_BYTES,
        transfer: Transfer | None = None,
    ) -> None:
        if keep_last < 0:
            raise ValueError(f"keep_last must be at least 0, got {keep_last}")
        if resident_layers <= 0:
            raise ValueError(f"resident_layers must be above 0, got {resident_layers}")
        if min_bytes < 1:
            raise ValueError(f"min_bytes must be at least 1, got {min_bytes}")
        if transfer is None and torch.cuda.is_available():
            transfer = CudaTransfer()
        self._transfer = transfer
        self._memory = None if transfer is None else HostMemory(transfer.host_memory)
        self._num_layers = num_layers
        self._keep_last = keep_last
        self._resident_layers = resident_layers
        self._min_bytes = min_bytes
        self._forward = _Forward()
        # Blocks whose memory of the forward pass is held, oldest first. They belong to the graph: if it is dropped,
        # they go too.
        self._resident: list[ref[Block]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActivationOffload":
        """For a copy of the model: host memory of its own, of which it has none yet."""
        return ActivationOffload(
            num_layers=self._num_layers,
            keep_last=self._keep_last,
            resident_layers=self._resident_layers,
            min_bytes=self._min_bytes,
            transfer=self._transfer,
        )

    @property
    def host_bytes(self) -> int:
        """Host memory that is allocated, in use or not."""
        return 0 if self._memory is None else self._memory.nbytes

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Surround the forward pass of layer `index`; the layers of a pass come in rising order.

        An index that is not above the one before begins another pass; any number of them may wait for their backward.
        Without gradients nothing happens.
        """
        if self._transfer is None or not torch.is_grad_enabled():
            yield
            return
        if index <= self._forward.last_index:
            self._forward = _Forward()
        self._forward.last_index = index
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._forward.end_layer()

    def _pack(self, tensor: Tensor) -> "_Staying | _Saved":
        # A handle must not hold an output of the node that holds the handle. A detached tensor shares its version.
        detached = tensor.detach()
        block = self._block_of(tensor)
        if block is None:
            return _Staying(detached, tensor._version)
        layout = Layout.of(tensor)
        position = self._forward.add(block)
        self._make_room()
        # What is left of it knows the version still, but has none of the memory.
        detached.data = detached.new_empty(0)
        return _Saved(block, self._forward, position, layout, tensor._version, detached)

    def _unpack(self, saved: "_Staying | _Saved") -> Tensor:
        if isinstance(saved, _Staying):
            _check_version(saved.tensor, saved.version, saved.tensor.shape)
            return saved.tensor
        _check_version(saved.witness, saved.version, saved.layout.shape)
        # Of a pass that did not come to its end there is no backward.
        self._num_layers = saved.forward.last_index + 1
        assert self._transfer is not None
        block = saved.block
        block.fetch(self._transfer)
        self._fetch_ahead(saved.forward, saved.position)
        return saved.layout.view(block.on_device(), block.address)

    def _block_of(self, tensor: Tensor) -> Block | None:
        """The block that `tensor` is a part of, on its way to the host or kept; None if it just stays where it is."""
        assert self._transfer is not None
        assert self._memory is not None
        if not self._transfer.moves(tensor) or is_weight(tensor):
            return None
        memory = bytes_behind(tensor, at_least=self._min_bytes)
        if memory is None:
            return None
        layout, held = Layout.of(tensor), self._held()
        block = next((block for block in held if block.holds(layout, tensor._version)), None)
        if block is None:
            block = Block(memory)
        # The last use of a block is the first in backward, so it is the newest again.
        self._resident = [ref(other) for other in held if other is not block]
        self._resident.append(ref(block))
        if self._is_kept(self._forward.last_index):
            block.is_kept = True
        else:
            block.send(self._transfer, self._memory)
        return block

    def _is_kept(self, index: int) -> bool:
        return self._num_layers is not None and self._num_layers - self._keep_last <= index < self._num_layers

    def _held(self) -> list[Block]:
        """The blocks whose memory of the forward pass is held, oldest first."""
        blocks = (reference() for reference in self._resident)
        return [block for block in blocks if block is not None and block.source is not None]

    def _make_room(self) -> None:
        """Let go of the oldest blocks that are on their way to the host, until the rest fits the window."""
        held = self._held()
        excess = sum(block.nbytes for block in held) - self._window(self._forward)
        for block in held[:-1]:
            if excess <= 0:
                break
            if not block.is_kept:
                excess -= block.nbytes
                block.let_go()

    def _fetch_ahead(self, forward: "_Forward", position: int) -> None:
        """Begin to fetch what backward needs after `position` of the trail, as much as the window holds."""
        assert self._transfer is not None
        trail, room = forward.trail, self._window(forward)
        counted: list[Block] = []
        # An operation reads what it saved in the order of saving, so the rest of it lies behind, and is there already.
        for index in range(position + 1, len(trail)):
            block = trail[index]()
            if block is None or not block.is_on_device or room < 0:
                break
            if block not in counted:
                counted.append(block)
                room -= block.nbytes
        for index in range(position, -1, -1):
            block = trail[index]()
            if block is None or block in counted:
                continue
            if not block.is_on_device:
                if block.nbytes > room:
                    break
                block.fetch(self._transfer)
            counted.append(block)
            room -= block.nbytes

    def _window(self, forward: "_Forward") -> float:
        """Bytes that may be on the device; no limit before the first layer has shown how many it needs."""
        return self._resident_layers * forward.largest_layer if forward.largest_layer else float("inf")


class _Forward:
    """A forward pass.

    Attributes:
        last_index: of the layers so far.
        largest_layer: bytes of what a layer saved, the most so far.
        trail: the block of each saved tensor, in the order of saving, which backward reverses.
    """

    def __init__(self) -> None:
        self.last_index = -1
        self.largest_layer = 0
        self.trail: list[ref[Block]] = []
        self._layer: dict[int, int] = {}

    def add(self, block: Block) -> int:
        """Note a use of `block`; returns its place in the trail."""
        self._layer[block.address] = block.nbytes
        self.trail.append(ref(block))
        return len(self.trail) - 1

    def end_layer(self) -> None:
        self.largest_layer = max(self.largest_layer, sum(self._layer.values()))
        self._layer.clear()


@dataclass(frozen=True, slots=True)
class _Staying:
    """What autograd holds of a tensor that stays where it is, and the version it had."""

    tensor: Tensor
    version: int


@dataclass(frozen=True, slots=True)
class _Saved:
    """What autograd holds of a tensor that travels, or that counts as if it did.

    Attributes:
        block: its bytes.
        forward, position: the pass that saved it, and the place in its trail.
        layout: of the tensor, which is all or a part of the block.
        version: of the tensor when it was saved.
        witness: an empty tensor that shares the version of the one that was saved.
    """

    block: Block
    forward: _Forward
    position: int
    layout: Layout
    version: int
    witness: Tensor


def _check_version(tensor: Tensor, version: int, shape: torch.Size) -> None:
    """Autograd leaves this check to whoever packs its tensors."""
    if tensor._version != version:
        raise RuntimeError(
            f"a {tuple(shape)} {tensor.dtype} tensor that backward needs has been modified by an in-place operation: "
            f"it is at version {tensor._version}, and was saved at version {version}"
        )
