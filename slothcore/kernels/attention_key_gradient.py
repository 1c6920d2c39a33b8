"""Kernels of dk and dv, the second launch of attention's backward pass.

`attention_backward.py` has the derivation, the shapes, the first launch, and launches these too.
"""

import triton
import triton.language as tl

from slothcore.kernels.attention_blocks import (
    add_rows,
    add_weighted_rows,
    dot_rows,
    load_block,
    load_rows,
    locate_tile,
    scale_rows,
    store_rows,
    visible,
    zero_rows,
)
from slothcore.kernels.math import exponential, tanh

# Two numbers a row would do. But Triton copies a block in wide vectors only if it has at least as many elements as the
# program has threads; a smaller one every thread fetches for itself, address by address: a third of the loop's code.
STATS = tl.constexpr(4)


@triton.jit
def _add_key_gradient(
    dk, dv, k, v, q_ptr, dout_ptr, q_desc, dout_desc, q_column, dout_column, stats_ptr, stride_q_row, stride_dout_row,
    start, length, key, first_query, last_query, score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Add what the queries first_query ... last_query of one head give to dk (unscaled) and dv, as far as asked for.

    Scores are held transposed, keys by queries, so that p and ds feed their products from registers.
    """
    keys = key + tl.arange(0, BLOCK_K)
    for query in tl.range(first_query, last_query, BLOCK_Q, num_stages=STAGES):
        # Rows past the end need no mask: they have q = dout = delta = 0, so p multiplies zeros and ds is zero.
        queries = query + tl.arange(0, BLOCK_Q)
        q = load_block(q_ptr, q_desc, q_column, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True)
        dout = load_block(
            dout_ptr, dout_desc, dout_column, start, query, length, stride_dout_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True
        )
        stats = tl.load(
            stats_ptr + queries[:, None] * STATS + tl.arange(0, STATS)[None, :],
            mask=(queries < length)[:, None], other=0.0,
        )  # fmt: skip
        even, odd = tl.split(tl.reshape(stats, (BLOCK_Q, STATS // 2, 2)))
        lse, _ = tl.split(even)
        delta, _ = tl.split(odd)
        scores = dot_rows(k, q)
        if WITH_DK:
            dp = dot_rows(v, dout)
        if CAPPED:
            scores = tanh(scores * cap_scale)
        p = exponential(scores * score_scale - lse[None, :], q[0].dtype == tl.float32)
        if MASKED:
            p = tl.where(visible(queries[None, :], keys[:, None], window, WINDOWED), p, 0.0)
        if WITH_DV:
            dv = add_weighted_rows(dv, p.to(dout[0].dtype), dout)
        if WITH_DK:
            ds = p * (dp - delta[None, :])
            if CAPPED:
                ds = ds * (1.0 - scores * scores)
            dk = add_weighted_rows(dk, ds.to(q[0].dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, dout_desc, q_desc, stats_ptr, dkv_ptr, cu_seqlens_ptr,
    stride_dout_row, stride_dout_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_dkv_row,
    documents, tiles, tokens, scale, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_K rows of dk and of dv, or of only one of them, for one key head of one document.

    With PARTS > 1, it sums over its share of the query heads only, and `dkv` is the buffer of the parts.
    dout_desc, q_desc: descriptors of dout and q for the copy engine, or None for plain loads.
    """
    # Early tiles, which the most queries see, run first.
    NUM_KEY_HEADS: tl.constexpr = NUM_HEADS // GROUP
    HEADS_EACH: tl.constexpr = (GROUP + PARTS - 1) // PARTS
    part = tl.program_id(0) % PARTS
    key_head = (tl.program_id(0) // PARTS % NUM_KEY_HEADS).to(tl.int64)
    tile = tl.program_id(0) // (PARTS * NUM_KEY_HEADS)
    start, length, key = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_K, SEARCH)
    if key >= length:
        return
    k = load_rows(
        k_ptr + key_head * stride_k_head, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, True
    )  # fmt: skip
    v = load_rows(
        v_ptr + key_head * stride_v_head, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, True
    )  # fmt: skip
    dk = zero_rows(BLOCK_K, WIDE, TAIL)
    dv = zero_rows(BLOCK_K, WIDE, TAIL)

    # Query blocks start at the first key: those that overlap the keys need the causal mask, the later ones do not.
    first_whole = key + (BLOCK_K + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    last_query = length
    last_whole = length
    if WINDOWED:
        last_query = tl.minimum(length, key + BLOCK_K - 1 + window)
        last_whole = tl.minimum(
            last_query, first_whole + tl.maximum(key + window - first_whole, 0) // BLOCK_Q * BLOCK_Q
        )
    # Up to here the copy engine may fetch; a block that sticks out of the document comes by masked loads.
    inside = last_query
    if q_desc is not None:
        inside = key + (length - key) // BLOCK_Q * BLOCK_Q
    first_head = key_head * GROUP + part * HEADS_EACH
    last_head = tl.minimum(first_head + HEADS_EACH, key_head * GROUP + GROUP)
    for head in range(first_head, last_head):
        q_head_ptr = q_ptr + head * stride_q_head
        dout_head_ptr = dout_ptr + head * stride_dout_head
        q_column = (head * stride_q_head).to(tl.int32)
        dout_column = (head * stride_dout_head).to(tl.int32)
        stats_head_ptr = stats_ptr + (head * tokens + start) * STATS
        if k[0].dtype == tl.float32:
            # A sum for each head: one over all of them is so long that its rounding would show.
            dk_head = zero_rows(BLOCK_K, WIDE, TAIL)
            dv_head = zero_rows(BLOCK_K, WIDE, TAIL)
        else:
            dk_head, dv_head = dk, dv
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, q_desc, dout_desc, q_column, dout_column,
            stats_head_ptr, stride_q_row, stride_dout_row, start, length, key,
            key, tl.minimum(first_whole, tl.minimum(last_query, inside)), score_scale, cap_scale, window,
            True, WINDOWED, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, q_desc, dout_desc, q_column, dout_column,
            stats_head_ptr, stride_q_row, stride_dout_row, start, length, key,
            first_whole, tl.minimum(last_whole, inside), score_scale, cap_scale, window,
            False, False, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        if WINDOWED:
            dk_head, dv_head = _add_key_gradient(
                dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, q_desc, dout_desc, q_column, dout_column,
                stats_head_ptr, stride_q_row, stride_dout_row, start, length, key,
                tl.maximum(first_whole, last_whole), tl.minimum(last_query, inside), score_scale, cap_scale, window,
                True, True, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        if k[0].dtype == tl.float32:
            dk = add_rows(dk, dk_head)
            dv = add_rows(dv, dv_head)
        else:
            dk, dv = dk_head, dv_head
    if q_desc is not None:
        # In a loop of their own: beside the copied blocks, the addresses of these cost registers that those need.
        for head in range(first_head, last_head):
            dk, dv = _add_key_gradient(
                dk, dv, k, v, q_ptr + head * stride_q_head, dout_ptr + head * stride_dout_head, None, None, 0, 0,
                stats_ptr + (head * tokens + start) * STATS, stride_q_row, stride_dout_row, start, length, key,
                inside, last_query, score_scale, cap_scale, window,
                True, WINDOWED, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K, 1,
            )  # fmt: skip

    dk = scale_rows(dk, scale)
    dk_ptr = dkv_ptr + part * tokens.to(tl.int64) * stride_dkv_row + key_head * HEAD_DIM
    dv_ptr = dk_ptr + NUM_KEY_HEADS * HEAD_DIM
    if WITH_DK:
        store_rows(dk_ptr, dk, start, key, length, stride_dkv_row, HEAD_DIM, BLOCK_K, WIDE, TAIL)
    if WITH_DV:
        store_rows(dv_ptr, dv, start, key, length, stride_dkv_row, HEAD_DIM, BLOCK_K, WIDE, TAIL)


@triton.jit(do_not_specialize=["tokens"])
def attention_sum_parts_kernel(
    parts_ptr, dkv_ptr, stride_dkv_row, tokens, PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """This program computes one row of dk and dv, all key heads: the sum of the parts, in their order."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        part_row_ptr = parts_ptr + (part * tokens.to(tl.int64) + row) * WIDTH
        total += tl.load(part_row_ptr + columns, mask=columns < WIDTH, other=0.0)
    total = total.to(dkv_ptr.dtype.element_ty)
    tl.store(dkv_ptr + row * stride_dkv_row + columns, total, mask=columns < WIDTH)
