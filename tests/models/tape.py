"""What a CUDA graph is to launches, for operations of torch on any device: the same ones again, on the same memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Tape(TorchDispatchMode):
    """Notes every operation with the very tensors that it reads and writes.

    Python is not run again by `play`: a number that came from a tensor, a branch, or a tensor that was replaced stays
    what it was, as in a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self._calls.append((func, args, kwargs or {}, outputs))
        return result

    def play(self) -> None:
        """Do it all again; what was new memory then is overwritten."""
        for func, args, kwargs, outputs in self._calls:
            results = [leaf for leaf in tree_flatten(func(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
            for place, value in zip(outputs, results, strict=True):
                if place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """Put back what is written to these: recording is not running."""
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, values in zip(tensors, before, strict=True):
        tensor.copy_(values)


def taped(function: Callable[[], None], *written: Tensor) -> Callable[[], None]:
    """`function` as a tape plays it; `written` is all old memory that it changes."""
    tape = Tape()
    with torch.no_grad(), unchanged(*written), tape:
        function()
    return tape.play
