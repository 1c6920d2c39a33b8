"""Joined factors kept for many passes, where nobody changes a factor: when a model writes token by token.

To join those of a group of projections (`lora_group.py`) is a launch of its own. A training pass does it once for two
large passes; a decode step would do it for a pass over one token, in which it is a tenth of the time.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.kernels.lora_factors_eager import Factors

Joined = tuple[Tensor, Tensor]
How = tuple[torch.dtype, tuple[float, ...]]
"""The dtype of a pair, and the scalings in it."""

_here = threading.local()


class _Kept(NamedTuple):
    """A pair A, B, the factors that it was made of, and how."""

    joined: Joined
    sources: tuple[Tensor, ...]
    join: Callable[[], Joined]


class KnownFactors:
    """While entered, passes on this thread join each group of factors once. Not for passes that learn.

    A kept pair never moves, so that a captured graph goes on reading it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[How, tuple[int, ...]], _Kept] = {}

    def __enter__(self) -> "KnownFactors":
        _here.current = self
        return self

    def __exit__(self, *unused: object) -> None:
        _here.current = None

    def joined(self, lora_A: Factors, lora_B: Factors, how: How, join: Callable[[], Joined]) -> Joined:
        """The kept pair of these factors; or what `join` makes of them, which is kept from now on."""
        sources = tuple(factor for factor in (*lora_A, *lora_B) if factor is not None)
        key = how, tuple([factor.data_ptr() for factor in sources])
        if key in self._kept:
            return self._kept[key].joined
        pair = join()
        # The memory of a pass that is being captured is the graph's.
        if not (pair[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            self._kept[key] = _Kept(pair, sources, join)
        return pair

    def refresh(self) -> None:
        """Join anew, into the same memory, because factors may be others by now."""
        for key, kept in list(self._kept.items()):
            if key[1] != tuple(factor.data_ptr() for factor in kept.sources):
                del self._kept[key]  # moved: what lies there now belongs to somebody else
                continue
            for place, values in zip(kept.joined, kept.join(), strict=True):
                if place.data_ptr() != values.data_ptr():
                    place.copy_(values)

    def forget(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()


def known_factors() -> KnownFactors | None:
    """Those of the passes on this thread, if somebody vouches for them."""
    return getattr(_here, "current", None)
