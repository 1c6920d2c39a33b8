"""One layer's keys and values: where a forward pass writes them and reads them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slothcore.kernels import paged_attention, paged_attention_eager, rope_store, rope_store_eager


@dataclass(frozen=True)
class CachePass:
    """What a forward pass does with a cache, the same in every layer.

    Attributes:
        rows, positions: [T] integers, whose token each is, and which; position -1: none (an idle row, padding).
        lengths: [rows of the cache] int64, of each row with the tokens of this pass.
        is_prompt: it reads whole texts, whose tokens attend to the packed stream and not to the cache.
        is_chunk: its tokens are consecutive ones of one row.
    """

    rows: Tensor
    positions: Tensor
    lengths: Tensor
    is_prompt: bool = False
    is_chunk: bool = False


class LayerCache:
    """The share of one layer in a `KvCache`, for one pass."""

    def __init__(self, current: CachePass, keys: Tensor, values: Tensor, block_tables: Tensor) -> None:
        self.current = current
        self.keys = keys
        self.values = values
        self.block_tables = block_tables

    @property
    def is_prompt(self) -> bool:
        """Whether this pass reads the prompts, whose tokens attend to the packed stream and not to the cache."""
        return self.current.is_prompt

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
        current = self.current
        return ops.rope_store_(
            qkv,
            cos,
            sin,
            self.keys,
            self.values,
            self.block_tables,
            current.rows,
            current.positions,
            current.lengths,
            num_heads=num_heads,
        )

    def attend(self, query: Tensor, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
        """Attention of the tokens of this pass, [T, heads, D], over the rows they end; returns that shape."""
        ops = paged_attention if query.is_cuda else paged_attention_eager
        current = self.current
        return ops.paged_attention(
            query,
            self.keys,
            self.values,
            self.block_tables,
            current.rows,
            current.positions,
            scale=scale,
            window=window,
            softcap=softcap,
            one_row=current.is_chunk,
        )
