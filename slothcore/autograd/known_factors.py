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

PAIRS_AT_ONCE = 16

_here = threading.local()


class _Kept(NamedTuple):
    """A pair A, B, the factors that it was made of, and how."""

    joined: Joined
    sources: tuple[Tensor, ...]
    join: Callable[[], Joined]


class KnownFactors:
    """While entered, passes on this thread join each group of factors once. Not for passes that learn.

    A kept pair never moves, so that a captured graph goes on reading it.

    Attributes:
        changes: how often pairs have come or gone. A graph of `join_again` is of these pairs alone; other ones may lie
            at the same places, with other scalings.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[How, tuple[int, ...]], _Kept] = {}
        self.changes = 0

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
            self.changes += 1
        return pair

    def refresh(self) -> None:
        """Join anew, into the same memory, because factors may be others by now."""
        self.drop_moved()
        self.join_again()

    def drop_moved(self) -> None:
        """Forget the pairs of factors that moved: what lies there now belongs to somebody else."""
        for key, kept in list(self._kept.items()):
            if key[1] != tuple([factor.data_ptr() for factor in kept.sources]):
                del self._kept[key]
                self.changes += 1

    def join_again(self) -> None:
        """Join every kept pair anew, into the same memory; tensor operations only, for a graph."""
        every = list(self._kept.values())
        # A few launches for all copies; but what is to be copied takes memory meanwhile.
        for begin in range(0, len(every), PAIRS_AT_ONCE):
            copies = [
                (place, values)
                for kept in every[begin : begin + PAIRS_AT_ONCE]
                for place, values in zip(kept.joined, kept.join(), strict=True)
                # What needs no change is joined without a copy: it is the factor itself.
                if place.data_ptr() != values.data_ptr()
            ]
            if copies:
                torch._foreach_copy_([place for place, _ in copies], [values for _, values in copies])

    @property
    def are_copied(self) -> bool:
        """Whether `join_again` has anything to do: a pair that needs no change is the factors themselves."""
        return any(place.data_ptr() not in key[1] for key, kept in self._kept.items() for place in kept.joined)

    def forget(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()
        self.changes += 1


def known_factors() -> KnownFactors | None:
    """Those of the passes on this thread, if somebody vouches for them."""
    return getattr(_here, "current", None)
