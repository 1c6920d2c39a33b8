"""Keys and values of tokens already seen, in pages, so that generation reads each token once.

A row is one text. Its tokens lie in pages of `page_size` tokens, which are given to it as it grows and taken back when
it ends, so that rows of unequal length share one pool. A layer with a window keeps no more than the window: its pages
are a ring, whose oldest tokens are overwritten. What the device reads (page tables, lengths) stands in tensors that are
changed in place and never move, so that a captured CUDA graph goes on reading them.

What the host knows and what the device knows are counted apart: the host reserves pages ahead (`reserve`,
`count_tokens`), the device alone turns lengths into positions (`place_tokens`), and neither waits for the other.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from slothcore.layers.layer_cache import CachePass, LayerCache
from slothcore.layers.page_table import PAGE_SIZE, PageTable, send, table_widths


class KvCache:
    """Keys and values of every layer, [pages, page_size, kv heads, head_dim] each.

    A forward pass with a cache is one of three kinds: `prompt` (texts from their first token on, packed, each into a
    row of its own), `tokens` (the next token of several rows) or `chunk` (several more tokens of one row). Before it
    come the host's share, `count_prompt`, .., and the device's, `place_prompt`, .., which says where the new keys and
    values go, and which keys the new queries see. To capture a pass as a CUDA graph, capture the device's share and the
    pass behind it; the host's comes before each replay, and before the capture.

    Args:
        windows: of each layer: how many tokens one of its tokens sees, itself included; None: all.
        rows: most texts at a time.
        capacity: most tokens of one text.
        pages: of a layer without a window, shared by all rows; default: enough for every row to be full. With fewer,
            ask `room_for` before a row grows.
        largest_chunk: most tokens that a chunk may have, where a layer has a window.

    Attributes:
        lengths: [rows] int64 on the device, tokens of each row; 0: the row is idle, is given no token by
            `place_tokens`, and costs nothing in attention.
        lengths_on_host: the same, as the host knows it: ahead of the device by what was launched.
    """

    def __init__(
        self,
        *,
        windows: Sequence[int | None],
        rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        pages: int | None = None,
        page_size: int = PAGE_SIZE,
        largest_chunk: int = 1,
    ) -> None:
        widths = table_widths(windows, capacity, page_size, largest_chunk)
        pages = rows * max(widths) if pages is None else pages
        self.capacity = capacity
        self.page_size = page_size
        self.largest_chunk = largest_chunk if min(widths) * page_size < capacity else capacity
        self._tables = {
            width: PageTable(rows=rows, width=width, pages=min(pages, rows * width), page_size=page_size, device=device)
            for width in sorted(set(widths), reverse=True)
        }
        # Whatever the rows hold, narrower tables run out of pages no earlier than the widest.
        self._widest = self._tables[max(widths)]
        self._layer_tables = [self._tables[width] for width in widths]
        self._windows = tuple(windows)
        # Not zeros: nothing reads what no token wrote.
        shapes = [(table.pages, page_size, num_kv_heads, head_dim) for table in self._layer_tables]
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths_on_host = [0] * rows
        self._longest_on_host = [0] * rows  # since the row's prompt: `shorten` brings nothing overwritten back
        self._lengths_differ = False
        self._current = CachePass(self.lengths[:0], self.lengths[:0], self.lengths, is_prompt=True)

    # Pages

    @property
    def nbytes_per_token(self) -> int:
        """What one token takes in all layers, as long as no window has forgotten it."""
        return sum(2 * keys[0, 0].nbytes for keys in self.keys)

    @property
    def nbytes(self) -> int:
        """Of the keys and values of all layers."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths_on_host)

    @property
    def free_tokens(self) -> int:
        """Tokens that the pages of no row could hold."""
        return self._widest.free_pages * self.page_size

    def room_for(self, row: int, length: int) -> bool:
        """Whether enough pages are free for the row to hold `length` tokens."""
        return length <= self.capacity and self._widest.missing(row, length) <= self._widest.free_pages

    def reserve(self, row: int, length: int) -> None:
        """Give the row pages for `length` tokens in all; what it has stays.

        Raises: ValueError if too few are free, or if no row can be so long.
        """
        if length > self.capacity:
            raise ValueError(f"a row of the cache holds at most {self.capacity} tokens, got {length}; make it larger")
        missing, free = self._widest.missing(row, length), self._widest.free_pages
        if missing == 0:
            return
        if missing > free:
            raise ValueError(
                f"{length} tokens need {missing} more pages of the cache, but {free} are free; release a row, or give "
                "the cache more pages"
            )
        for table in self._tables.values():
            table.give(row, length)

    def release(self, row: int) -> None:
        """Take the row's pages back; the row is idle from the next pass on."""
        for table in self._tables.values():
            table.take_back(row)
        self._set_length(row, 0, longest=0)

    def grow(self, capacity: int) -> None:
        """Let the only row hold `capacity` tokens; what it holds stays, but everything moves to new addresses."""
        assert len(self.lengths_on_host) == 1, "only one row can grow"
        assert len(self._tables) == 1, "only a row of whole texts can grow"
        if capacity <= self.capacity:
            return
        old, width = self._widest, -(-capacity // self.page_size)
        device = self.lengths.device
        self._widest = PageTable(rows=1, width=width, pages=width, page_size=self.page_size, device=device)
        # Pages are given in order, so those of the only row keep their numbers.
        self._widest.give(0, self._longest_on_host[0])
        self._tables = {width: self._widest}
        self._layer_tables = [self._widest for _ in self._layer_tables]
        for stacks in (self.keys, self.values):
            for index, stack in enumerate(stacks):
                stacks[index] = torch.cat([stack, stack.new_empty(width - old.pages, *stack.shape[1:])])
        self.capacity = self.largest_chunk = capacity

    # Passes

    @property
    def is_prompt(self) -> bool:
        """Whether this pass reads whole texts, whose tokens attend to the packed stream and not to the cache."""
        return self._current.is_prompt

    @property
    def is_chunk(self) -> bool:
        """Whether the tokens of this pass are consecutive ones of one row."""
        return self._current.is_chunk

    def count_prompt(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """The host's share of a pass over texts: pages for as many tokens in each of `rows`, whose text is gone.

        Raises: ValueError if too few pages are free.
        """
        for row, length in zip(rows, lengths, strict=True):
            self.reserve(row, length)
            self._set_length(row, length, longest=length)
        self._upload()

    def place_prompt(self, rows: Tensor, positions: Tensor) -> None:
        """The device's share: no host work, so it can be captured. `count_prompt` comes first.

        Args:
            rows, positions: [T] int32 and int64 on the device, of each token of the packed texts; at position -1 there
                is none, whatever its row.
        """
        self._current = CachePass(rows, positions, self.lengths, is_prompt=True)

    def count_tokens(self, rows: Iterable[int]) -> None:
        """The host's share of a decode pass: pages for one more token of each of `rows` that is in use.

        Raises: ValueError if too few pages are free.
        """
        in_use = [row for row in rows if self.lengths_on_host[row]]
        for row in in_use:
            self.reserve(row, self.lengths_on_host[row] + 1)
        self._upload()
        for row in in_use:
            self.lengths_on_host[row] += 1
            self._longest_on_host[row] = max(self._longest_on_host[row], self.lengths_on_host[row])

    def place_tokens(self, rows: Tensor) -> Tensor:
        """The device's share of a decode pass: no host work, so it can be captured. `count_tokens` comes first.

        Args:
            rows: [T] int32 on the device, the row of each token of this pass. A row in use may be named once; idle rows
                may fill the rest.
        Returns: positions [T] int64, -1 for idle rows.
        """
        before = self.lengths.index_select(0, rows)
        added = before.sign()
        self.lengths.index_add_(0, rows, added)
        self._current = CachePass(rows, before + added - 1, self.lengths)
        return self._current.positions

    def count_chunk(self, row: int, count: int, *, padding: int = 0) -> None:
        """The host's share of a pass over `count` more tokens of one row.

        Args:
            padding: tokens behind them that are written, but do not count: the row's next ones overwrite them.
        Raises: ValueError if too few pages are free.
        """
        assert count + padding <= self.largest_chunk, f"a window keeps too little for {count + padding} tokens at once"
        length = self.lengths_on_host[row] + count
        self.reserve(row, length + padding)
        self._set_length(row, length, longest=max(self._longest_on_host[row], length + padding))
        self._upload()

    def place_chunk(self, rows: Tensor, positions: Tensor) -> None:
        """The device's share: no host work, so it can be captured. `count_chunk` comes first.

        Args:
            rows, positions: [T] int32 and int64 on the device, consecutive tokens of one row.
        """
        self._current = CachePass(rows, positions, self.lengths, is_chunk=True)

    def shorten(self, row: int, length: int) -> None:
        """Forget what stands behind the first `length` tokens of a row; its pages stay reserved."""
        longest = self._longest_on_host[row]
        assert length <= self.lengths_on_host[row], "a row cannot be shortened to more than it holds"
        for window, table in zip(self._windows, self._layer_tables, strict=True):
            overwritten = max(0, longest - table.tokens_of_a_row)
            seen_from = 0 if window is None else max(0, length + 1 - window)
            assert length == 0 or seen_from >= overwritten, f"the window behind token {length} is overwritten"
        self._set_length(row, length, longest=longest if length else 0)

    def _set_length(self, row: int, length: int, *, longest: int) -> None:
        self._longest_on_host[row] = longest
        if self.lengths_on_host[row] != length:
            self.lengths_on_host[row] = length
            self._lengths_differ = True

    def _upload(self) -> None:
        """Send what the host decided since the last pass. Here, not later: what it counts, the device adds itself."""
        for table in self._tables.values():
            table.upload()
        if self._lengths_differ:
            send(torch.tensor(self.lengths_on_host, device="cpu"), self.lengths)
            self._lengths_differ = False

    def layer(self, index: int) -> LayerCache:
        """The share of one layer; made anew, because kept here it would be a cycle, and free its memory late."""
        return LayerCache(self._current, self.keys[index], self.values[index], self._layer_tables[index].on_device)
