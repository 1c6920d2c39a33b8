"""One layer's keys and values: where a forward pass writes them and reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothcore.kernels import paged_attention, paged_attention_eager, rope_store, rope_store_eager

if TYPE_CHECKING:
    from slothcore.layers.kv_cache import KvCache


class LayerCache:
    """The share of one layer in a `KvCache`."""

    def __init__(self, cache: KvCache, keys: Tensor, values: Tensor, block_tables: Tensor) -> None:
        self.cache = cache
        self.keys = keys
        self.values = values
        self.block_tables = block_tables

    @property
    def is_prompt(self) -> bool:
        """Whether this pass reads the prompts, whose tokens attend to the packed stream and not to the cache."""
        return self.cache.is_prompt

    def store_(self, qkv: Tensor, angles: tuple[Tensor, Tensor] | None, *, num_heads: int) -> Tensor:
        """Rotate query and key heads of qkv [T, heads, D] in place, and write its keys and values to the cache.

        Args:
            angles: cos and sin, [T, P / 2] float32; None: the heads are rotated already.
            num_heads: query heads, which come first.
        Returns: `qkv`.
        """
        # Written to in place, qkv would mislead the backward pass of whatever made it.
        assert not (torch.is_grad_enabled() and qkv.requires_grad), "a pass with a cache has no gradients"
        cos, sin = (None, None) if angles is None else angles
        ops = rope_store if qkv.is_cuda else rope_store_eager
        cache = self.cache
        return ops.rope_store_(
            qkv,
            cos,
            sin,
            self.keys,
            self.values,
            self.block_tables,
            cache.rows,
            cache.positions,
            cache.lengths,
            num_heads=num_heads,
        )

    def attend(self, query: Tensor, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """Attention of the tokens of this pass, [T, heads, D], over the rows they end; returns that shape."""
        ops = paged_attention if query.is_cuda else paged_attention_eager
        cache = self.cache
        return ops.paged_attention(
            query,
            self.keys,
            self.values,
            self.block_tables,
            cache.rows,
            cache.positions,
            scale=scale,
            window=window,
            softcap=softcap,
            one_row=cache.is_chunk,
        )
