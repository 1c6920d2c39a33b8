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
          is summed by one program in one order: no atomics, and the same bits on every run.
Shapes    dout, q, out [T, Hq, D]; k, v [T, Hkv, D]; lse [Hq, T]; dqkv [T, Hq + 2 Hkv, D];
          stats [Hq, T, 4] float32: lse (in base two for 16-bit inputs), delta, and two unused.
Dtypes    as in `attention.py`; delta and all sums float32.
Rounding  p and ds are rounded to the input dtype before their products, as in FlashAttention.
Source    Dao 2023, arXiv:2307.08691, algorithm 2.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.attention import (
    LOG2_E,
    Tile,
    device_capability,
    exponential,
    load_tile,
    locate_tile,
    padded_head_dim,
    scalar_tile,
    score_arguments,
    shared_memory_kib,
    store_tile,
    tanh,
    tile_arguments,
    visible,
)

# Two numbers a row would do. But Triton copies a block in wide vectors only if it has at least as many elements as the
# program has threads; a smaller one every thread fetches for itself, address by address: a third of the loop's code.
STATS = tl.constexpr(4)


@cache
def query_gradient_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """Tile of the kernel that forms dq; fits the shared memory of every device of that capability."""
    if scalar := scalar_tile(head_dim, dtype, capability):
        return scalar
    width = padded_head_dim(head_dim)
    if shared_memory_kib(capability) == 227:
        return Tile(64, 64, 8, 2) if width == 256 else Tile(128, 64, 8, 3)
    if width == 256:
        return Tile(64, 32, 8, 1)
    return Tile(64, 64 if width <= 64 else 32, 4, 2)


@cache
def key_gradient_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """Tile of the kernel that forms dk and dv; fits the shared memory of every device of that capability."""
    if scalar := scalar_tile(head_dim, dtype, capability):
        return scalar
    width, memory = padded_head_dim(head_dim), shared_memory_kib(capability)
    if memory == 227:
        return Tile(32, 64, 8, 2) if width == 256 else Tile(32, 64, 4, 3)
    if width == 256:
        return Tile(32, 32 if memory == 99 else 64, 8, 1)
    return Tile(64 if width <= 64 else 32, 64, 4, 2)


@triton.jit
def _add_query_gradient(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query, first_key, last_key,
    score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what the keys first_key ... last_key give to dq (unscaled); lse is in the units of `exponential`."""
    queries = query + tl.arange(0, BLOCK_Q)
    for key in range(first_key, last_key, BLOCK_K):
        k = load_tile(k_ptr, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
        v = load_tile(v_ptr, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if CAPPED:
            scores = tanh(scores * cap_scale)
        p = exponential(scores * score_scale - lse[:, None], q.dtype == tl.float32)
        if MASKED:
            keys = key + tl.arange(0, BLOCK_K)
            p = tl.where(visible(queries[:, None], keys[None, :], window, WINDOWED), p, 0.0)
        ds = p * (dp - delta[:, None])
        if CAPPED:
            ds = ds * (1.0 - scores * scores)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_query_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stats_ptr, dqkv_ptr, cu_seqlens_ptr,
    stride_dout_row, stride_dout_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head,
    documents, tiles, tokens, scale, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_Q rows of `stats` and of dq for one query head of one document."""
    head = tl.program_id(0) % NUM_HEADS
    tile = tiles - 1 - tl.program_id(0) // NUM_HEADS
    start, length, query = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_Q, SEARCH)
    if query >= length:
        return
    key_head = head // GROUP
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    dout = load_tile(
        dout_ptr + head * stride_dout_head, start, query, length, stride_dout_row, HEAD_DIM, BLOCK_Q, BLOCK_D, True
    )  # fmt: skip
    out = load_tile(
        out_ptr + head * HEAD_DIM, start, query, length, NUM_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_Q, BLOCK_D, True
    )  # fmt: skip
    queries = query + tl.arange(0, BLOCK_Q)
    row = head * tokens.to(tl.int64) + start + queries
    # Rows past the end have dout = out = 0, hence delta = ds = 0; they need no mask.
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + row, mask=queries < length, other=0.0)
    if dout.dtype != tl.float32:
        lse = lse * LOG2_E
    tl.store(stats_ptr + row * STATS, lse, mask=queries < length)
    tl.store(stats_ptr + row * STATS + 1, delta, mask=queries < length)
    q = load_tile(
        q_ptr + head * stride_q_head, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, BLOCK_D, True
    )  # fmt: skip
    dq = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)

    first_whole, last_whole = 0, query // BLOCK_K * BLOCK_K
    if WINDOWED:
        first_key = tl.maximum(query - window + 1, 0) // BLOCK_K * BLOCK_K
        first_whole = tl.maximum(query + BLOCK_Q - window, 0)
        first_whole = tl.minimum((first_whole + BLOCK_K - 1) // BLOCK_K * BLOCK_K, last_whole)
        dq = _add_query_gradient(
            dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
            first_key, first_whole, score_scale, cap_scale, window,
            True, True, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        first_whole, last_whole, score_scale, cap_scale, window,
        False, False, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    dq = _add_query_gradient(
        dq, q, dout, lse, delta, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        last_whole, tl.minimum(query + BLOCK_Q, length), score_scale, cap_scale, window,
        True, WINDOWED, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    stride_row = (NUM_HEADS + 2 * NUM_HEADS // GROUP) * HEAD_DIM
    store_tile(
        dqkv_ptr + head * HEAD_DIM, dq * scale, start, query, length, stride_row, HEAD_DIM, BLOCK_Q, BLOCK_D
    )  # fmt: skip


@triton.jit
def _add_key_gradient(
    dk, dv, k, v, q_ptr, dout_ptr, stats_ptr, stride_q_row, stride_dout_row, start, length, key,
    first_query, last_query, score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add what the queries first_query ... last_query of one head give to dk (unscaled) and dv.

    Scores are held transposed, keys by queries, so that p and ds feed their products from registers.
    """
    keys = key + tl.arange(0, BLOCK_K)
    for query in range(first_query, last_query, BLOCK_Q):
        # Rows past the end need no mask: they have q = dout = delta = 0, so p multiplies zeros and ds is zero.
        queries = query + tl.arange(0, BLOCK_Q)
        q = load_tile(q_ptr, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, BLOCK_D, True)
        dout = load_tile(dout_ptr, start, query, length, stride_dout_row, HEAD_DIM, BLOCK_Q, BLOCK_D, True)
        stats = tl.load(
            stats_ptr + queries[:, None] * STATS + tl.arange(0, STATS)[None, :],
            mask=(queries < length)[:, None], other=0.0,
        )  # fmt: skip
        even, odd = tl.split(tl.reshape(stats, (BLOCK_Q, STATS // 2, 2)))
        lse, _ = tl.split(even)
        delta, _ = tl.split(odd)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        if CAPPED:
            scores = tanh(scores * cap_scale)
        p = exponential(scores * score_scale - lse[None, :], q.dtype == tl.float32)
        if MASKED:
            p = tl.where(visible(queries[None, :], keys[:, None], window, WINDOWED), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        if CAPPED:
            ds = ds * (1.0 - scores * scores)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_key_gradient_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, dqkv_ptr, cu_seqlens_ptr,
    stride_dout_row, stride_dout_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head,
    documents, tiles, tokens, scale, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_K rows of dk and of dv for one key head of one document."""
    # Early tiles, which the most queries see, run first.
    NUM_KEY_HEADS: tl.constexpr = NUM_HEADS // GROUP
    key_head = tl.program_id(0) % NUM_KEY_HEADS
    tile = tl.program_id(0) // NUM_KEY_HEADS
    start, length, key = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_K, SEARCH)
    if key >= length:
        return
    k = load_tile(
        k_ptr + key_head * stride_k_head, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, BLOCK_D, True
    )  # fmt: skip
    v = load_tile(
        v_ptr + key_head * stride_v_head, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, BLOCK_D, True
    )  # fmt: skip
    dk = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)

    # Query blocks start at the first key: those that overlap the keys need the causal mask, the later ones do not.
    first_whole = key + (BLOCK_K + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
    last_query = length
    last_whole = length
    if WINDOWED:
        last_query = tl.minimum(length, key + BLOCK_K - 1 + window)
        last_whole = tl.minimum(
            last_query, first_whole + tl.maximum(key + window - first_whole, 0) // BLOCK_Q * BLOCK_Q
        )
    for head in range(key_head * GROUP, key_head * GROUP + GROUP):
        q_head_ptr = q_ptr + head * stride_q_head
        dout_head_ptr = dout_ptr + head * stride_dout_head
        stats_head_ptr = stats_ptr + (head * tokens.to(tl.int64) + start) * STATS
        if k.dtype == tl.float32:
            # A sum for each head: one over all of them is so long that its rounding would show.
            dk_head = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
            dv_head = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        else:
            dk_head, dv_head = dk, dv
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
            start, length, key, key, tl.minimum(first_whole, last_query), score_scale, cap_scale, window,
            True, WINDOWED, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        dk_head, dv_head = _add_key_gradient(
            dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
            start, length, key, first_whole, last_whole, score_scale, cap_scale, window,
            False, False, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        if WINDOWED:
            dk_head, dv_head = _add_key_gradient(
                dk_head, dv_head, k, v, q_head_ptr, dout_head_ptr, stats_head_ptr, stride_q_row, stride_dout_row,
                start, length, key, tl.maximum(first_whole, last_whole), last_query, score_scale, cap_scale, window,
                True, True, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
            )  # fmt: skip
        if k.dtype == tl.float32:
            dk += dk_head
            dv += dv_head
        else:
            dk, dv = dk_head, dv_head

    stride_row = (NUM_HEADS + 2 * NUM_KEY_HEADS) * HEAD_DIM
    dk_ptr = dqkv_ptr + (NUM_HEADS + key_head) * HEAD_DIM
    store_tile(dk_ptr, dk * scale, start, key, length, stride_row, HEAD_DIM, BLOCK_K, BLOCK_D)
    dv_ptr = dk_ptr + NUM_KEY_HEADS * HEAD_DIM
    store_tile(dv_ptr, dv, start, key, length, stride_row, HEAD_DIM, BLOCK_K, BLOCK_D)


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
    problem = (cu_seqlens, max_seqlen, scale, window, softcap)
    tile = query_gradient_tile(head_dim, q.dtype, capability)
    _launch_query_gradient(tile, dout, q, k, v, out, lse, stats, dqkv, *problem)
    tile = key_gradient_tile(head_dim, q.dtype, capability)
    _launch_key_gradient(tile, dout, q, k, v, stats, dqkv, *problem)
    return dqkv


def _launch_query_gradient(
    tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, stats: Tensor, dqkv: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """Write `stats` and the query heads of `dqkv`."""
    tokens, num_heads, head_dim = q.shape
    tiles = tile_arguments(cu_seqlens, max_seqlen, tokens, tile.block_q)
    attention_query_gradient_kernel[(tiles["tiles"] * num_heads,)](
        dout, q, k, v, out, lse, stats, dqkv, cu_seqlens,
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        scale=scale, NUM_HEADS=num_heads, GROUP=num_heads // k.shape[1],
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip


def _launch_key_gradient(
    tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, stats: Tensor, dqkv: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, softcap: float | None,
) -> None:  # fmt: skip
    """Write the key and value heads of `dqkv`, given `stats`."""
    tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    tiles = tile_arguments(cu_seqlens, max_seqlen, tokens, tile.block_k)
    attention_key_gradient_kernel[(tiles["tiles"] * num_key_heads,)](
        dout, q, k, v, stats, dqkv, cu_seqlens,
        dout.stride(0), dout.stride(1), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        scale=scale, NUM_HEADS=num_heads, GROUP=num_heads // num_key_heads,
        HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip
