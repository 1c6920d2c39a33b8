"""Gradient of causal attention over packed documents (FlashAttention-2), deterministic.

With the symbols of `attention.py`, and g_i the gradient that reaches out_i:
          out_i = sum_j p_ij v_j           gives   dv_j = sum_i p_ij g_i   and   dp_ij = g_i . v_j
          p_i = softmax(s_i)               gives   ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij) = p_ij (dp_ij - delta_i),
                                           where   delta_i = sum_j p_ij g_i . v_j = g_i . out_i   needs no scores
          s_ij = c tanh(scale q_i.k_j / c) gives   dz_ij = scale ds_ij (1 - (s_ij / c)^2),   z_ij = q_i . k_j
                                                   (without a cap dz_ij = scale ds_ij)
          z_ij = q_i . k_j                 gives   dq_i = sum_j dz_ij k_j   and   dk_j = sum_i dz_ij q_i
          dk and dv sum over the Hq / Hkv query heads that read the key head.
Recompute p_ij = exp(s_ij - lse_i) comes from the saved lse; no score is ever stored.
Launches  Two. The first owns query tiles: it forms delta and dq. The second owns key tiles: it forms dk and dv of a key
          head, walking over its query heads and their blocks (`attention_key_gradient.py`). Scores are computed in
          both, so that every gradient is summed by one program in one order: no atomics, and the same bits on every
          run. Where a model has few key heads, several programs share the query heads of one, and a further launch
          adds their float32 sums.
          Where heads are so wide that the sums of dk and dv together leave no registers for a large block, each has a
          launch of its own: the scores are computed once more, in blocks that keep the tensor cores busier.
Shapes    dout, q, out [T, Hq, D]; k, v [T, Hkv, D]; lse [Hq, T]; dqkv [T, Hq + 2 Hkv, D];
          stats [Hq, T, 4] float32: lse (in base two for 16-bit inputs), delta, and two unused;
          parts [P, T, 2 Hkv, D] float32, the heads of dk, then dv.   P = programs that share a key tile.
Dtypes    as in `attention.py`; delta and all sums float32.
Rounding  p and ds are rounded to the input dtype before their products, as in FlashAttention.
Source    Dao 2023, arXiv:2307.08691, algorithm 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.attention_blocks import (
    add_weighted_rows,
    dot_rows,
    load_block,
    load_rows,
    locate_tile,
    row_products,
    scale_rows,
    store_rows,
    visible,
    zero_rows,
)
from slothcore.kernels.attention_key_gradient import (
    STATS,
    attention_key_gradient_kernel,
    attention_sum_parts_kernel,
)
from slothcore.kernels.attention_tiles import (
    Tile,
    attention_tiles,
    copied_pair,
    copy_engine_from,
    key_gradient_parts,
    score_arguments,
    tile_arguments,
)
from slothcore.kernels.gpu import device_capability
from slothcore.kernels.launch import next_power_of_2
from slothcore.kernels.math import LOG2_E, exponential, tanh


@triton.jit
def _add_query_gradient(
    dq, q, dout, lse, delta, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
    start, length, query, first_key, last_key, score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Add what the keys first_key ... last_key give to dq (unscaled); lse is in the units of `exponential`."""
    queries = query + tl.arange(0, BLOCK_Q)
    for key in tl.range(first_key, last_key, BLOCK_K, num_stages=STAGES):
        k = load_block(k_ptr, k_desc, k_column, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
        v = load_block(v_ptr, v_desc, v_column, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
        scores = dot_rows(q, k)
        dp = dot_rows(dout, v)
        if CAPPED:
            scores = tanh(scores * cap_scale)
        p = exponential(scores * score_scale - lse[:, None], q[0].dtype == tl.float32)
        if MASKED:
            keys = key + tl.arange(0, BLOCK_K)
            p = tl.where(visible(queries[:, None], keys[None, :], window, WINDOWED), p, 0.0)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds = ds * (1.0 - scores * scores)
        dq = add_weighted_rows(dq, ds.to(k[0].dtype), k)
    return dq


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_query_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, stats_ptr, dqkv_ptr, cu_seqlens_ptr,
    stride_dout_row, stride_dout_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head,
    documents, tiles, tokens, scale, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_Q rows of `stats` and of dq for one query head of one document.

    k_desc, v_desc: descriptors of k and v for the copy engine, or None for plain loads.
    """
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // NUM_HEADS
    start, length, query = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_Q, SEARCH)
    if query >= length:
        return
    key_head = head // GROUP
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    k_column = (key_head * stride_k_head).to(tl.int32)
    v_column = (key_head * stride_v_head).to(tl.int32)
    dout = load_rows(
        dout_ptr + head * stride_dout_head, start, query, length, stride_dout_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True
    )  # fmt: skip
    out = load_rows(
        out_ptr + head * HEAD_DIM, start, query, length, NUM_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True
    )  # fmt: skip
    queries = query + tl.arange(0, BLOCK_Q)
    row = head * tokens + start + queries
    # Rows past the end have dout = out = 0, hence delta = ds = 0; they need no mask.
    delta = row_products(dout, out)
    lse = tl.load(lse_ptr + row, mask=queries < length, other=0.0)
    if dout[0].dtype != tl.float32:
        lse = lse * LOG2_E
    tl.store(stats_ptr + row * STATS, lse, mask=queries < length)
    tl.store(stats_ptr + row * STATS + 1, delta, mask=queries < length)
    q = load_rows(
        q_ptr + head * stride_q_head, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True
    )  # fmt: skip
    dq = zero_rows(BLOCK_Q, WIDE, TAIL)

    first_whole, last_whole = 0, query // BLOCK_K * BLOCK_K
    if WINDOWED:
        first_key = tl.maximum(query - window + 1, 0) // BLOCK_K * BLOCK_K
        first_whole = tl.maximum(query + BLOCK_Q - window, 0)
        first_whole = tl.minimum((first_whole + BLOCK_K - 1) // BLOCK_K * BLOCK_K, last_whole)
        dq = _add_query_gradient(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
            start, length, query, first_key, first_whole, score_scale, cap_scale, window,
            True, True, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
        start, length, query, first_whole, last_whole, score_scale, cap_scale, window,
        False, False, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    last_key = tl.minimum(query + BLOCK_Q, length)
    rest = last_whole
    if k_desc is not None:
        # A block that sticks out of the document comes by masked loads, as in the forward kernel.
        rest = length // BLOCK_K * BLOCK_K
        dq = _add_query_gradient(
            dq, q, dout, lse, delta, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
            start, length, query, last_whole, tl.minimum(rest, last_key), score_scale, cap_scale, window,
            True, WINDOWED, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, None, None, k_column, v_column, stride_k_row, stride_v_row,
        start, length, query, rest, last_key, score_scale, cap_scale, window,
        True, WINDOWED, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K, 1 if k_desc is not None else None,
    )  # fmt: skip

    dq = scale_rows(dq, scale)
    stride_row = (NUM_HEADS + 2 * NUM_HEADS // GROUP) * HEAD_DIM
    store_rows(dqkv_ptr + head * HEAD_DIM, dq, start, query, length, stride_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Gradient of `attention_forward` with respect to q, k and v.

    Args:
        dout: [T, Hq, D], gradient of `out`, any strides.
        q, k, v: as given to the forward pass.
        out, lse: what the forward pass returned.
        cu_seqlens, max_seqlen, scale, window, softcap: as given to the forward pass.
    Returns: dqkv [T, Hq + 2 Hkv, D] contiguous, the heads of dq, dk and dv side by side.
    """
    # The last dimension is read as contiguous; a gradient that was expanded from a scalar, say, is not.
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    tokens, num_heads, head_dim = q.shape
    dqkv = torch.empty((tokens, num_heads + 2 * k.shape[1], head_dim), dtype=q.dtype, device=q.device)
    if tokens == 0:
        return dqkv
    stats = torch.empty((num_heads, tokens, STATS.value), dtype=torch.float32, device=q.device)
    capability = device_capability(q.device)
    tiles = attention_tiles(head_dim, q.dtype, capability, capped=softcap is not None)
    copies = copy_engine_from(head_dim, q.dtype, capability)
    problem = (cu_seqlens, max_seqlen, scale, window, softcap)
    copied = copies is not None and max_seqlen >= copies.query_gradient
    _launch_query_gradient(tiles.query_gradient, dout, q, k, v, out, lse, stats, dqkv, *problem, copied=copied)
    copied = copies is not None and max_seqlen >= copies.key_gradient
    parts = key_gradient_parts(num_heads, k.shape[1])
    _launch_key_gradient(
        tiles.key_gradient, tiles.value_gradient, parts, dout, q, k, v, stats, dqkv, *problem, copied=copied
    )
    return dqkv


def _launch_query_gradient(
    tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stats: Tensor, dqkv: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None, *,
    copied: bool = False,
) -> None:  # fmt: skip
    """Write `stats` and the query heads of `dqkv`.

    copied: the copy engine fetches the blocks of k and v, if it can read both.
    """
    num_heads = q.shape[1]
    k_desc, v_desc = copied_pair(k, v, tile.block_k) if copied else (None, None)
    tiles = tile_arguments(tile, tile.block_q, cu_seqlens, max_seqlen, q)
    attention_query_gradient_kernel[(tiles["tiles"] * num_heads,)](
        dout, q, k, v, k_desc, v_desc, out, lse, stats, dqkv, cu_seqlens,
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        scale=scale, NUM_HEADS=num_heads, GROUP=num_heads // k.shape[1],
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip


def _launch_key_gradient(
    tile: Tile, value_tile: Tile | None, parts: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor,
    dqkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None, *,
    copied: bool = False,
) -> None:  # fmt: skip
    """Write the key and value heads of `dqkv`, given `stats`; `parts` programs share the query heads of a key head.

    value_tile: dv has a launch of its own, with this tile.
    copied: the copy engine fetches the blocks of dout and q, if it can read both.
    """
    tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    dkv = dqkv[:, num_heads:]
    sums = dkv
    if parts > 1:
        sums = torch.empty((parts * tokens, 2 * num_key_heads, head_dim), dtype=torch.float32, device=q.device)
    launches = [(tile, True, True)] if value_tile is None else [(tile, True, False), (value_tile, False, True)]
    for one, with_dk, with_dv in launches:
        dout_desc, q_desc = copied_pair(dout, q, one.block_q) if copied else (None, None)
        tiles = tile_arguments(one, one.block_k, cu_seqlens, max_seqlen, q)
        attention_key_gradient_kernel[(tiles["tiles"] * num_key_heads * parts,)](
            dout, q, k, v, dout_desc, q_desc, stats, sums, cu_seqlens,
            dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), sums.stride(0),
            scale=scale, NUM_HEADS=num_heads, GROUP=num_heads // num_key_heads, PARTS=parts,
            WITH_DK=with_dk, WITH_DV=with_dv,
            **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
        )  # fmt: skip
    if parts > 1:
        width = 2 * num_key_heads * head_dim
        attention_sum_parts_kernel[(tokens,)](
            sums, dkv, dkv.stride(0), tokens, PARTS=parts, WIDTH=width, BLOCK=next_power_of_2(width)
        )
