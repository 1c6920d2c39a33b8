"""The index of the largest number of each row in plain torch: the eager twin of largest.py."""

from torch import Tensor


def largest(x: Tensor) -> Tensor:
    """The index [M] int64 of the largest number of each row of x [M, N]."""
    return x.argmax(-1)
