"""Eager twin of `rope_store.py`: the rotation of `rope_eager`, then keys and values into their pages by index."""

import torch
from torch import Tensor

from slothcore.kernels import rope_eager


def rope_store_(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    positions: Tensor,
    lengths: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """As `rope_store.rope_store_`."""
    page_size, num_kv_heads = keys.shape[1:3]
    normed = num_heads + num_kv_heads
    if cos is not None and sin is not None:
        rope_eager.rope_rotate_(qkv, cos, sin, num_heads=normed)
    rows, width = rows.long(), block_tables.shape[1]
    # One table entry serves several tokens of a text that is longer than its pages: only the last of them is written.
    is_kept = (positions >= 0) & (positions >= lengths[rows] - width * page_size)
    (kept,) = torch.nonzero(is_kept, as_tuple=True)
    positions = positions[kept]
    places = block_tables[rows[kept], positions // page_size % width].long(), positions % page_size
    keys[places] = qkv[kept, num_heads:normed]
    values[places] = qkv[kept, normed:]
    return qkv
