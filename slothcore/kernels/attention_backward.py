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
          head, walking over its query heads and their blocks. Scores are computed in both, so that every gradient
          is summed by one program in one order: no atomics, and the same bits on every run. Where a model has few
          key heads, several programs share the query heads of one, and a further launch adds their float32 sums.
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

from slothcore.kernels.attention import (
    add_rows,
    add_weighted_rows,
    dot_rows,
    load_rows,
    locate_tile,
    row_products,
    scale_rows,
    store_rows,
    visible,
    zero_rows,
)
from slothcore.kernels.attention_tiles import (
    Tile,
    attention_tiles,
    device_capability,
    key_gradient_parts,
    score_arguments,
    tile_arguments,
)
from slothcore.kernels.launch import next_power_of_2
from slothcore.kernels.math import LOG2_E, exponential, tanh

# Two numbers a row would do. But Triton copies a block in wide vectors only if it has at least as many elements as the
# program has threads; a smaller one every thread fetches for itself, address by address: a third of the loop's code.
STATS = tl.constexpr(4)


@triton.jit
def _add_query_gradient(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query, first_key, last_key,
    score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what the keys first_key ... last_key give to dq (unscaled); lse is in the units of `exponential`."""
    queries = query + tl.arange(0, BLOCK_Q)
    for key in range(first_key, last_key, BLOCK_K):
        k = load_rows(k_ptr, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
        v = load_rows(v_ptr, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
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
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stats_ptr, dqkv_ptr, cu_seqlens_ptr,
    stride_dout_row, stride_dout_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head,
    documents, tiles, tokens, scale, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_Q rows of `stats` and of dq for one query head of one document."""
    head = (tl.program_id(0) % NUM_HEADS).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) // NUM_HEADS
    start, length, query = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_Q, SEARCH)
    if query >= length:
        return
    key_head = head // GROUP
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
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
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
            first_key, first_whole, score_scale, cap_scale, window,
            True, True, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        first_whole, last_whole, score_scale, cap_scale, window,
        False, False, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        last_whole, tl.minimum(query + BLOCK_Q, length), score_scale, cap_scale, window,
        True, WINDOWED, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
    )  # fmt: skip

    dq = scale_rows(dq, scale)
    stride_row = (NUM_HEADS + 2 * NUM_HEADS // GROUP) * HEAD_DIM
    store_rows(dqkv_ptr + head * HEAD_DIM, dq, start, query, length, stride_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL)


@triton.jit
def _add_key_gradient(
    dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, stride_q_row, stride_dout_row, start, length, key,
    first_query, last_query, score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WITH_DK: tl.constexpr, WITH_DV: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add what the queries first_query ... last_query of one head give to dk (unscaled) and dv, as far as asked for.

    Scores are held transposed, keys by queries, so that p and ds feed their products from registers.
    """
    keys = key + tl.arange(0, BLOCK_K)
    for query in range(first_query, last_query, BLOCK_Q):
        # Rows past the end need no mask: they have q = dout = delta = 0, so p multiplies zeros and ds is zero.
        queries = query + tl.arange(0, BLOCK_Q)
        q = load_rows(q_ptr, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True)
        dout = load_rows(dout_ptr, start, query, length, stride_dout_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True)
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
    dout_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dkv_ptr, cu_seqlens_ptr,
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
    first_head = key_head * GROUP + part * HEADS_EACH
    for head in range(first_head, tl.minimum(first_head + HEADS_EACH, key_head * GROUP + GROUP)):
        q_head_ptr = q_ptr + head * stride_q_head
        dout_head_ptr = dout_ptr + head * stride_dout_head
        stats_head_ptr = stats_ptr + (head * tokens + start) * STATS
        if k[0].dtype == tl.float32:
            # A sum for each head: one over all of them is so long that its rounding would show.
            dk_head = zero_rows(BLOCK_K, WIDE, TAIL)
            dv_head = zero_rows(BLOCK_K, WIDE, TAIL)
        else:
            dk_head, dv_head = dk, dv
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
            start, length, key, key, tl.minimum(first_whole, last_query), score_scale, cap_scale, window,
            True, WINDOWED, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
            start, length, key, first_whole, last_whole, score_scale, cap_scale, window,
            False, False, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
        if WINDOWED:
            dk_head, dv_head = _add_key_gradient(
                dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
                start, length, key, tl.maximum(first_whole, last_whole), last_query, score_scale, cap_scale, window,
                True, True, CAPPED, WITH_DK, WITH_DV, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
            )  # fmt: skip
        if k[0].dtype == tl.float32:
            dk = add_rows(dk, dk_head)
            dv = add_rows(dv, dv_head)
        else:
            dk, dv = dk_head, dv_head

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
    tiles = attention_tiles(head_dim, q.dtype, device_capability(q.device), capped=softcap is not None)
    problem = (cu_seqlens, max_seqlen, scale, window, softcap)
    _launch_query_gradient(tiles.query_gradient, dout, q, k, v, out, lse, stats, dqkv, *problem)
    parts = key_gradient_parts(num_heads, k.shape[1])
    _launch_key_gradient(tiles.key_gradient, tiles.value_gradient, parts, dout, q, k, v, stats, dqkv, *problem)
    return dqkv


def _launch_query_gradient(
    tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stats: Tensor, dqkv: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """Write `stats` and the query heads of `dqkv`."""
    num_heads = q.shape[1]
    tiles = tile_arguments(tile, tile.block_q, cu_seqlens, max_seqlen, q)
    attention_query_gradient_kernel[(tiles["tiles"] * num_heads,)](
        dout, q, k, v, out, lse, stats, dqkv, cu_seqlens,
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        scale=scale, NUM_HEADS=num_heads, GROUP=num_heads // k.shape[1],
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip


def _launch_key_gradient(
    tile: Tile, value_tile: Tile | None, parts: int, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor,
    dqkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """Write the key and value heads of `dqkv`, given `stats`; `parts` programs share the query heads of a key head.

    With a `value_tile`, dv has a launch of its own.
    """
    tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    dkv = dqkv[:, num_heads:]
    sums = dkv
    if parts > 1:
        sums = torch.empty((parts * tokens, 2 * num_key_heads, head_dim), dtype=torch.float32, device=q.device)
    launches = [(tile, True, True)] if value_tile is None else [(tile, True, False), (value_tile, False, True)]
    for one, with_dk, with_dv in launches:
        tiles = tile_arguments(one, one.block_k, cu_seqlens, max_seqlen, q)
        attention_key_gradient_kernel[(tiles["tiles"] * num_key_heads * parts,)](
            dout, q, k, v, stats, sums, cu_seqlens,
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
