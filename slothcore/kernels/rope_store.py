"""RoPE of query and key heads, and keys and values written to their pages of the cache, in one launch.

Forward   q' = R q,   k' = R k   as `rope.py` turns them, in place;  K[place] = k',  V[place] = v
Place     of the token at position p of row r: place p % page_size of page block_tables[r, p // page_size % width].
          A row longer than width * page_size tokens overwrites its oldest; of several tokens with one place in the same
          launch only the last is written. A token at position -1 is none: nothing is written for it.
Shapes    qkv [T, heads, D]: Hq query, Hkv key, Hkv value heads; cos, sin [T, P/2]; K, V [pages, page_size, Hkv, D];
          block_tables [rows, width]; row, position [T]; lengths [rows].
          T = tokens, D = head_dim, P <= D rotated channels of a head.
Dtypes    qkv, K, V float32 or 16-bit, all alike; cos, sin and all arithmetic float32; one rounding.
Source    Su et al. 2021, arXiv:2104.09864; pages: Kwon et al. 2023, arXiv:2309.06180.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.launch import ROTARY_PAIRS, head_tile, with_contiguous_rows
from slothcore.kernels.qk_norm import paired_channels


@triton.jit(do_not_specialize=["table_width"])
def rope_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    block_tables_ptr,
    rows_ptr,
    positions_ptr,
    lengths_ptr,
    stride_qkv_token,
    stride_qkv_head,
    stride_cos_row,
    stride_sin_row,
    stride_page,
    stride_place,
    stride_head,
    table_width,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """This program takes all heads of one token, BLOCK_HEADS at a time, under one load of its angles."""
    signal_early(EARLY)
    dtype: tl.constexpr = qkv_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int32)
    oldest_kept = tl.load(lengths_ptr + row).to(tl.int32) - table_width * PAGE_SIZE
    is_kept = (position >= 0) & (position >= oldest_kept)
    column = tl.where(is_kept, position, 0) // PAGE_SIZE % table_width
    page = tl.load(block_tables_ptr + row * table_width + column, mask=is_kept, other=0).to(tl.int64)
    place = page * stride_page + (position % PAGE_SIZE).to(tl.int64) * stride_place

    first, second, pair_exists = paired_channels(HEAD_DIM, ROTARY_DIM, BLOCK_PAIRS)
    if cos_ptr is not None:
        pair = tl.arange(0, BLOCK_PAIRS)
        turns = pair < ROTARY_DIM // 2
        cos = tl.load(cos_ptr + token * stride_cos_row + pair, mask=turns, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * stride_sin_row + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
    wait_early(EARLY)
    # Asked for here, they come while the others are turned.
    kv_head = tl.arange(0, BLOCK_KV_HEADS)
    is_stored = (kv_head < NUM_KV_HEADS)[:, None] & pair_exists[None, :] & is_kept
    k_row = qkv_ptr + token * stride_qkv_token + (NUM_HEADS + kv_head)[:, None].to(tl.int64) * stride_qkv_head
    v_row = k_row + NUM_KV_HEADS * stride_qkv_head
    v_a = tl.load(v_row + first[None, :], mask=is_stored)
    v_b = tl.load(v_row + second[None, :], mask=is_stored)
    if cos_ptr is not None:
        for first_head in range(0, NUM_HEADS + NUM_KV_HEADS, BLOCK_HEADS):
            head = first_head + tl.arange(0, BLOCK_HEADS)
            exists = (head < NUM_HEADS + NUM_KV_HEADS)[:, None] & pair_exists[None, :]
            x_row = qkv_ptr + token * stride_qkv_token + head[:, None].to(tl.int64) * stride_qkv_head
            x_a = tl.load(x_row + first[None, :], mask=exists, other=0.0).to(tl.float32)
            x_b = tl.load(x_row + second[None, :], mask=exists, other=0.0).to(tl.float32)
            y_a = (x_a * cos - x_b * sin).to(dtype)
            y_b = (x_b * cos + x_a * sin).to(dtype)
            tl.store(x_row + first[None, :], y_a, mask=exists)
            tl.store(x_row + second[None, :], y_b, mask=exists)
            is_key = exists & (head >= NUM_HEADS)[:, None] & is_kept
            key_row = keys_ptr + place + (head - NUM_HEADS)[:, None].to(tl.int64) * stride_head
            tl.store(key_row + first[None, :], y_a, mask=is_key)
            tl.store(key_row + second[None, :], y_b, mask=is_key)

    to_head = place + kv_head[:, None].to(tl.int64) * stride_head
    if cos_ptr is None:
        tl.store(keys_ptr + to_head + first[None, :], tl.load(k_row + first[None, :], mask=is_stored), mask=is_stored)
        tl.store(keys_ptr + to_head + second[None, :], tl.load(k_row + second[None, :], mask=is_stored), mask=is_stored)
    tl.store(values_ptr + to_head + first[None, :], v_a, mask=is_stored)
    tl.store(values_ptr + to_head + second[None, :], v_b, mask=is_stored)


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
    """Rotate the query and key heads of `qkv` in place, and write its key and value heads to the cache.

    Args:
        qkv: [T, Hq + 2 Hkv, D], last dimension contiguous, any other strides; D even.
        cos, sin: [T, P/2] float32, P <= D; both None: the heads are rotated already.
        keys, values: [pages, page_size, Hkv, D], overwritten where the tokens go; strides alike, the last one 1.
        block_tables: [rows, width] integers, contiguous: the pages of each row.
        rows, positions: [T] integers: whose token it is, and which; position -1: none.
        lengths: [rows] integers, of each row with the tokens of this launch.
        num_heads: Hq.
    Returns: `qkv`.
    """
    num_tokens, heads, head_dim = qkv.shape
    _, page_size, num_kv_heads, _ = keys.shape
    assert heads == num_heads + 2 * num_kv_heads
    assert keys.shape == values.shape
    assert keys.stride() == values.stride(), "keys and values must be laid out alike"
    assert keys.shape[3] == head_dim
    assert qkv.stride(-1) == keys.stride(-1) == 1
    assert head_dim % 2 == 0, f"rotated heads need an even head_dim, got {head_dim}"
    assert block_tables.is_contiguous()
    rotary_dim = head_dim
    if cos is not None and sin is not None:
        rotary_dim = 2 * cos.shape[-1]
        assert rotary_dim <= head_dim, f"angles for {rotary_dim} channels, heads of {head_dim}"
        assert cos.shape == sin.shape == (num_tokens, rotary_dim // 2)
        cos, sin = with_contiguous_rows(cos), with_contiguous_rows(sin)
    if num_tokens == 0:
        return qkv
    tile = head_tile(num_heads + num_kv_heads, head_dim // 2, ROTARY_PAIRS)
    early = begins_early(qkv)
    rope_store_kernel[(num_tokens,)](
        qkv,
        cos,
        sin,
        keys,
        values,
        block_tables,
        rows,
        positions,
        lengths,
        qkv.stride(0),
        qkv.stride(1),
        0 if cos is None else cos.stride(0),
        0 if sin is None else sin.stride(0),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_tables.shape[1],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        PAGE_SIZE=page_size,
        BLOCK_HEADS=tile.rows,
        BLOCK_PAIRS=tile.columns,
        BLOCK_KV_HEADS=triton.next_power_of_2(num_kv_heads),
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return qkv
