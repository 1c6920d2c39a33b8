"""Passes over a `KvCache` begun in one call, host's and device's share together."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slothcore.layers.kv_cache import KvCache


def begin_prompt(cache: KvCache, lengths: Mapping[int, int]) -> None:
    """Take packed texts: row -> its tokens."""
    device = cache.lengths.device
    cache.count_prompt(list(lengths), list(lengths.values()))
    rows = torch.cat([torch.full((length,), row, dtype=torch.int32) for row, length in lengths.items()])
    positions = torch.cat([torch.arange(length) for length in lengths.values()])
    cache.place_prompt(rows.to(device), positions.to(device))


def begin_tokens(cache: KvCache) -> Tensor:
    """Take one more token of every row in use; returns their positions [rows], -1 for idle rows."""
    cache.count_tokens(range(len(cache.lengths_on_host)))
    return cache.place_tokens(torch.arange(len(cache.lengths_on_host), dtype=torch.int32, device=cache.lengths.device))


def begin_chunk(cache: KvCache, row: int, count: int) -> Tensor:
    """Take `count` more tokens of one row; returns their positions [count]."""
    length, device = cache.lengths_on_host[row], cache.lengths.device
    cache.count_chunk(row, count)
    positions = torch.arange(length, length + count, device=device)
    cache.place_chunk(torch.full((count,), row, dtype=torch.int32, device=device), positions)
    return positions
