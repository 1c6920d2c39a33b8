"""Which pages of a pool hold the tokens of which row."""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

# A row wastes half a page on average.
PAGE_SIZE = 64


class PageTable:
    """Gives pages to rows and takes them back; the device reads the result from one tensor that never moves.

    Position p of a row lies in place p % page_size of page `on_device[row, p // page_size % width]`. Where a row may be
    longer than `width` pages, its pages form a ring: the newest tokens overwrite the oldest.

    Args:
        rows: how many rows share the pool.
        width: most pages of a row.
        pages: pages of the pool.
        page_size: tokens of a page.
    """

    def __init__(self, *, rows: int, width: int, pages: int, page_size: int, device: torch.device) -> None:
        self.width = width
        self.pages = pages
        self.page_size = page_size
        self.on_device = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._on_host = torch.zeros(rows, width, dtype=torch.int32, device="cpu")
        self._free = list(range(pages - 1, -1, -1))
        self._given: list[list[int]] = [[] for _ in range(rows)]
        self._has_changed = False

    @property
    def free_pages(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    @property
    def tokens_of_a_row(self) -> int:
        """How many of its newest tokens a row can keep."""
        return self.width * self.page_size

    def missing(self, row: int, length: int) -> int:
        """How many more pages the row needs to hold a text of `length` tokens."""
        return max(0, min(self.width, -(-length // self.page_size)) - len(self._given[row]))

    def give(self, row: int, length: int) -> None:
        """Give the row what it is missing for `length` tokens; so many pages must be free."""
        given = self._given[row]
        for _ in range(self.missing(row, length)):
            self._on_host[row, len(given)] = self._free[-1]
            given.append(self._free.pop())
            self._has_changed = True

    def take_back(self, row: int) -> None:
        """Free the row's pages. The table keeps their numbers, which nobody reads for a row without tokens."""
        self._free.extend(reversed(self._given[row]))
        self._given[row].clear()

    def upload(self) -> None:
        """Send what changed to the device, in stream order; the host does not wait."""
        if self._has_changed:
            send(self._on_host, self.on_device)
            self._has_changed = False


def send(source: Tensor, target: Tensor) -> None:
    """Overwrite `target` by `source`, a host tensor that may change as soon as this returns."""
    # The allocator of pinned memory keeps the copy until the device has read it.
    target.copy_(source.clone().pin_memory() if target.is_cuda else source, non_blocking=True)


def table_widths(windows: Sequence[int | None], capacity: int, page_size: int, largest_chunk: int) -> list[int]:
    """Most pages of a row in each layer."""
    whole = -(-capacity // page_size)
    # The first token of a chunk still sees a window's tokens when the last one is written.
    rings = (None if window is None else -(-(window + largest_chunk - 1) // page_size) for window in windows)
    return [whole if ring is None else min(ring, whole) for ring in rings]


def pages_within(
    nbytes: int,
    *,
    windows: Sequence[int | None],
    rows: int,
    capacity: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    page_size: int = PAGE_SIZE,
    largest_chunk: int = 1,
) -> int:
    """The most pages, up to what the rows could ever use, with which a `KvCache` takes at most `nbytes`; maybe 0."""
    widths = table_widths(windows, capacity, page_size, largest_chunk)
    page = 2 * page_size * num_kv_heads * head_dim * dtype.itemsize

    def cost(pages: int) -> int:
        return page * sum(min(pages, rows * width) for width in widths)

    return bisect_right(range(1, rows * max(widths) + 1), nbytes, key=cost)
