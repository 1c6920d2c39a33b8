"""Keys and values of tokens already seen, so that generation reads each token once."""

import torch
from torch import Tensor

from slothcore.layers.packed import Documents

SCORES_AT_ONCE = 2**26


class KvCache:
    """Keys and values of every layer, [rows, capacity, kv heads, head_dim] each; row r is one sequence.

    A forward pass with a cache is one of three kinds: `begin_prompt` (texts from their first token on, packed, each
    into a row of its own), `begin_token` (the next token of every row) or `begin_chunk` (several more tokens of the
    only row). Each says where the new keys and values go.
    """

    def __init__(
        self,
        *,
        layers: int,
        rows: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (rows, capacity, num_kv_heads, head_dim)
        # Zeros, not empty: a masked score is multiplied by the value beside it, and 0 * NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity = capacity
        self.row_starts = torch.arange(rows, device=device) * capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.longest = 0  # the largest of `lengths`, kept on the host
        self.slots = self.row_starts  # [T]: where this pass writes, in [rows * capacity]
        self.is_prompt = True
        self.is_chunk = False

    def layer(self, index: int) -> "LayerCache":
        """The share of one layer; made anew, because kept here it would be a cycle, and free its memory late."""
        return LayerCache(self, self.keys[index], self.values[index])

    def begin_prompt(self, documents: Documents, num_tokens: int, rows: Tensor | None = None) -> None:
        """Take packed texts, `num_tokens` in all, one document a row; what the row held is gone.

        Args:
            rows: [documents] int64, the row of each; default: every row in order. Other rows stay as they are.
        """
        boundaries = documents.cu_seqlens.long()
        lengths = boundaries.diff()
        row_starts = self.row_starts if rows is None else self.row_starts[rows]
        shifts = torch.repeat_interleave(row_starts - boundaries[:-1], lengths, output_size=num_tokens)
        self.slots = torch.arange(num_tokens, device=shifts.device) + shifts
        self.lengths = lengths if rows is None else self.lengths.index_copy(0, rows, lengths)
        self.longest = max(self.longest, documents.max_seqlen)
        self.is_prompt, self.is_chunk = True, False

    def begin_token(self) -> Tensor:
        """Take one more token of every row; returns their positions [rows]."""
        assert self.longest < self.capacity, "the cache is full"
        positions = self.lengths
        self.slots = self.row_starts + positions
        self.lengths, self.longest = positions + 1, self.longest + 1
        self.is_prompt = self.is_chunk = False
        return positions

    def begin_chunk(self, count: int) -> Tensor:
        """Take `count` more tokens of the only row; returns their positions [count]."""
        assert len(self.row_starts) == 1, "only one row can be continued by several tokens"
        assert self.longest + count <= self.capacity, "the cache is full"
        self.slots = torch.arange(self.longest, self.longest + count, device=self.lengths.device)
        self.lengths, self.longest = self.lengths + count, self.longest + count
        self.is_prompt, self.is_chunk = False, True
        return self.slots

    def shorten(self, length: int) -> None:
        """Forget what stands behind the first `length` tokens of the only row."""
        assert len(self.row_starts) == 1, "only one row can be shortened"
        self.lengths, self.longest = torch.full_like(self.lengths, length), length

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` tokens in the only row; what it holds stays."""
        assert len(self.row_starts) == 1, "only one row can grow"
        if capacity <= self.capacity:
            return
        for stacks in (self.keys, self.values):
            for index, stack in enumerate(stacks):
                stacks[index] = torch.cat([stack, stack.new_zeros(1, capacity - self.capacity, *stack.shape[2:])], 1)
        self.capacity = capacity


class LayerCache:
    """The share of one layer in a `KvCache`."""

    def __init__(self, cache: KvCache, keys: Tensor, values: Tensor) -> None:
        self.cache = cache
        self.keys = keys
        self.values = values

    @property
    def is_prompt(self) -> bool:
        """Whether this pass reads the prompts, whose tokens attend to the packed stream and not to the cache."""
        return self.cache.is_prompt

    def store(self, keys: Tensor, values: Tensor) -> None:
        """Write [T, kv heads, head_dim] to the slots of this pass."""
        self.keys.flatten(0, 1).index_copy_(0, self.cache.slots, keys)
        self.values.flatten(0, 1).index_copy_(0, self.cache.slots, values)

    def attend(self, query: Tensor, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """Attention of the tokens of this pass, [T, heads, head_dim], over the rows they end; returns that shape."""
        longest = self.cache.longest
        if self.cache.is_chunk:
            return attend_to_text(
                query, self.keys[0, :longest], self.values[0, :longest], scale=scale, window=window, softcap=softcap
            )
        return attend_to_rows(
            query,
            self.keys[:, :longest],
            self.values[:, :longest],
            self.cache.lengths,
            scale=scale,
            window=window,
            softcap=softcap,
        )


def attend_to_rows(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of one query a row, which is the row's newest token, over the row's keys.

    Args:
        query: [rows, heads, head_dim].
        keys, values: [rows, L, kv heads, head_dim]; heads must be a multiple of kv heads.
        lengths: [rows]; row r sees keys 0 .. lengths[r] - 1, of those at most the last `window`.
        softcap: scores s become softcap * tanh(s / softcap).
    Returns: [rows, heads, head_dim] in query's dtype; scores and sums are float32 (float64 for float64).
    """
    rows, heads, head_dim = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).view(rows, keys.shape[2], -1, head_dim)
    scores = torch.einsum("rkgd,rlkd->rkgl", grouped, keys.to(wide)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(keys.shape[1], device=keys.device)
    visible = position < lengths[:, None]
    if window is not None:
        visible &= position >= lengths[:, None] - window
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    return torch.einsum("rkgl,rlkd->rkgd", weights, values.to(wide)).reshape(rows, heads, head_dim).to(query.dtype)


def attend_to_text(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the last tokens of a text over all of it.

    Args:
        query: [T, heads, head_dim], of the last T of L tokens.
        keys, values: [L, kv heads, head_dim]; heads must be a multiple of kv heads.
        scale, window, softcap: as `attend_to_rows` has them.
    Returns: [T, heads, head_dim] in query's dtype; scores and sums are float32 (float64 for float64).
    """
    length = len(keys)
    first = length - len(query)
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = keys.to(wide), values.to(wide)
    position = torch.arange(length, device=keys.device)
    mixed = []
    # Scores of all tokens at once would take heads * T * L numbers.
    for part in query.split(max(1, SCORES_AT_ONCE // (length * query.shape[1]))):
        own = position[first : first + len(part), None]
        first += len(part)
        grouped = part.to(wide).unflatten(1, (keys.shape[1], -1))
        scores = torch.einsum("tkgd,lkd->kgtl", grouped, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = position <= own
        if window is not None:
            visible &= position > own - window
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        mixed.append(torch.einsum("kgtl,lkd->tkgd", weights, values).flatten(1, 2))
    return torch.cat(mixed).to(query.dtype)
