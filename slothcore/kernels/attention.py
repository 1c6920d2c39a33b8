"""Causal attention over packed documents, grouped queries, forward (FlashAttention-2).

Forward   for every query i and its visible keys j in the same document
          s_ij = scale * q_i . k_j              with a soft cap c: s_ij = c * tanh(scale * q_i . k_j / c)
          lse_i = log(sum_j exp(s_ij)),   p_ij = exp(s_ij - lse_i),   out_i = sum_j p_ij v_j
Visible   0 <= i - j, and with a window w also i - j < w.
Tiles     A program owns BLOCK_Q queries of one head and walks over the keys in blocks of BLOCK_K, keeping a running
          maximum m and sum l per query; the old sum and output shrink by exp(m_old - m_new) when the maximum grows.
          16-bit inputs take exponents in base two: exp(s - m) = 2^(s log2(e) - m'), one multiply-add and one exp2 for
          each score. float32 subtracts in natural units first: a maximum of 20 rounded in base two costs 1e-6 of p.
          Blocks that every query of the tile sees whole skip the mask; blocks that none sees are never loaded.
Shapes    q, out [T, Hq, D]; k, v [T, Hkv, D]; lse [Hq, T]; cu_seqlens [documents + 1].
          T = tokens, Hq and Hkv = query and key heads, D = head_dim; query head h reads key head h // (Hq / Hkv).
Columns   A tile's width is a power of two. A head of 96 is held as pieces of 64 and 32 rather than padded to 128: q . k
          is the sum over the pieces, and each piece of v gives its own piece of out. WIDE and TAIL are the widths.
cuDNN     may compute the same where all documents are equally long: see `attention_cudnn.py`.
Dtypes    q, k, v, out float32 or 16-bit; lse, softmax and sums float32.
Rounding  exp(s - m) is rounded to v.dtype before the product with v, as in FlashAttention.
Source    Dao 2023, arXiv:2307.08691; windows: Beltagy et al. 2020, arXiv:2004.05150; soft cap: arXiv:2408.00118.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.attention_blocks import (
    HIDDEN,
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
from slothcore.kernels.attention_cudnn import cudnn_fits, cudnn_forward
from slothcore.kernels.attention_tiles import (
    Tile,
    attention_tiles,
    copied_pair,
    copy_engine_from,
    score_arguments,
    tile_arguments,
)
from slothcore.kernels.gpu import device_capability
from slothcore.kernels.math import LN_2, exponential, tanh


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
    start, length, query, first_key, last_key, score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """Take the keys first_key ... last_key into the running output, sum and maximum of a query tile.

    STAGES: of the loop's pipeline, if not those of the launch.
    """
    queries = query + tl.arange(0, BLOCK_Q)
    for key in tl.range(first_key, last_key, BLOCK_K, num_stages=STAGES):
        k = load_block(k_ptr, k_desc, k_column, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
        scores = dot_rows(q, k)
        if CAPPED:
            scores = tanh(scores * cap_scale)
        if MASKED:
            keys = key + tl.arange(0, BLOCK_K)
            # Finite, so that a row that sees nothing yet has a maximum; a later real score erases what it summed.
            # Scaled before it is masked: the compiler fuses the product below with the subtraction, and HIDDEN times
            # the scale, unrounded, would not cancel against its own rounded maximum.
            shown = visible(queries[:, None], keys[None, :], window, WINDOWED)
            scores = tl.where(shown, scores * score_scale, HIDDEN)
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
            p = exponential(scores - new_max[:, None], q[0].dtype == tl.float32)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, axis=1) * score_scale)
            p = exponential(scores * score_scale - new_max[:, None], q[0].dtype == tl.float32)
        shrink = exponential(row_max - new_max, q[0].dtype == tl.float32)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        acc = scale_rows(acc, shrink[:, None])
        v = load_block(v_ptr, v_desc, v_column, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, WIDE, TAIL, MASKED)
        acc = add_weighted_rows(acc, p.to(v[0].dtype), v)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, cu_seqlens_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    documents, tiles, tokens, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_Q rows of `out` and of `lse` for one query head of one document.

    k_desc, v_desc: descriptors of k and v for the copy engine, or None for plain loads.
    """
    # Heads that share keys run side by side, and late tiles, which see the most keys, run first.
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
    q = load_rows(
        q_ptr + head * stride_q_head, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, WIDE, TAIL, True
    )  # fmt: skip
    acc = zero_rows(BLOCK_Q, WIDE, TAIL)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    row_max = tl.full([BLOCK_Q], HIDDEN, dtype=tl.float32)

    first_whole, last_whole = 0, query // BLOCK_K * BLOCK_K
    if WINDOWED:
        first_key = tl.maximum(query - window + 1, 0) // BLOCK_K * BLOCK_K
        first_whole = tl.maximum(query + BLOCK_Q - window, 0)
        first_whole = tl.minimum((first_whole + BLOCK_K - 1) // BLOCK_K * BLOCK_K, last_whole)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
            start, length, query, first_key, first_whole, score_scale, cap_scale, window,
            True, True, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
        start, length, query, first_whole, last_whole, score_scale, cap_scale, window,
        False, False, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    last_key = tl.minimum(query + BLOCK_Q, length)
    rest = last_whole
    if k_desc is not None:
        # The last block may stick out of the document, where the copy engine would fetch the neighbour's rows: masked
        # loads, and with them no pipeline, which is code and registers for nothing around a single block.
        rest = length // BLOCK_K * BLOCK_K
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, k_desc, v_desc, k_column, v_column, stride_k_row, stride_v_row,
            start, length, query, last_whole, tl.minimum(rest, last_key), score_scale, cap_scale, window,
            True, WINDOWED, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, None, None, k_column, v_column, stride_k_row, stride_v_row,
        start, length, query, rest, last_key, score_scale, cap_scale, window,
        True, WINDOWED, CAPPED, HEAD_DIM, WIDE, TAIL, BLOCK_Q, BLOCK_K, 1 if k_desc is not None else None,
    )  # fmt: skip

    queries = query + tl.arange(0, BLOCK_Q)
    if q[0].dtype == tl.float32:
        lse = row_max + tl.log(row_sum)
    else:
        # The maximum turns into natural units inside the addition, which rounds once for both.
        lse = tl.fma(row_max, LN_2, tl.log(row_sum))
    tl.store(lse_ptr + head * tokens + start + queries, lse, mask=queries < length)
    store_rows(
        out_ptr + head * HEAD_DIM, scale_rows(acc, 1.0 / row_sum[:, None]), start, query, length, NUM_HEADS * HEAD_DIM,
        HEAD_DIM, BLOCK_Q, WIDE, TAIL,
    )  # fmt: skip


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args:
        q: [T, Hq, D], any strides with the last dimension contiguous; D at most 256.
        k: [T, Hkv, D], likewise, as is v; Hkv divides Hq.
        cu_seqlens: [documents + 1] int32 on the same device, from 0 to T; documents may be empty.
        max_seqlen: length of the longest document, or any bound on it.
        scale: positive factor of the scores.
        window: a query sees this many keys, itself included; None for all.
        softcap: positive bound on the magnitude of the scores; None for no bound.
    Returns: out [T, Hq, D] contiguous in q.dtype; lse [Hq, T] float32, the natural log of the softmax denominator.
    """
    documents = cu_seqlens.numel() - 1
    if cudnn_fits(q, k, v, documents, max_seqlen, window=window, softcap=softcap):
        return cudnn_forward(q, k, v, documents, scale=scale)
    capability = device_capability(q.device)
    tiles = attention_tiles(q.shape[-1], q.dtype, capability, capped=softcap is not None)
    copies = copy_engine_from(q.shape[-1], q.dtype, capability)
    copied = copies is not None and max_seqlen >= copies.forward
    return _launch_forward(tiles.forward, q, k, v, cu_seqlens, max_seqlen, scale, window, softcap, copied=copied)


def _launch_forward(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, softcap: float | None, *, copied: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`copied`: the copy engine fetches the blocks of k and v, if it can read both."""
    tokens, num_heads, head_dim = q.shape
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    k_desc, v_desc = copied_pair(k, v, tile.block_k) if copied else (None, None)
    tiles = tile_arguments(tile, tile.block_q, cu_seqlens, max_seqlen, q)
    attention_forward_kernel[(tiles["tiles"] * num_heads,)](
        q, k, v, k_desc, v_desc, out, lse, cu_seqlens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        NUM_HEADS=num_heads, GROUP=num_heads // k.shape[1],
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip
    return out, lse
