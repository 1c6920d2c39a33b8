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
Dtypes    q, k, v, out float32 or 16-bit; lse, softmax and sums float32. D is padded to a power of two.
Rounding  exp(s - m) is rounded to v.dtype before the product with v, as in FlashAttention.
Source    Dao 2023, arXiv:2307.08691; windows: Beltagy et al. 2020, arXiv:2004.05150; soft cap: arXiv:2408.00118.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.launch import ceil_div, next_power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)


class Tile(NamedTuple):
    """How one kernel cuts its work: queries and keys of a block, and the launch options that go with them."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


@cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability, asked once for each device; None for the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def shared_memory_kib(capability: tuple[int, int]) -> int:
    """Shared memory that one program may use, from the table of compute capabilities in the CUDA C++ guide."""
    if capability < (8, 0):
        return 64
    if capability in ((8, 0), (8, 7)):
        return 163
    return 227 if capability[0] in (9, 10) else 99


def padded_head_dim(head_dim: int) -> int:
    """Width of a tile: a power of two, at least what a tensor core takes."""
    return max(16, next_power_of_2(head_dim))


def scalar_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile | None:
    """Tile of every kernel where Triton multiplies without tensor cores; None where it has them.

    That is exact float32 anywhere, and every dtype before Ampere. Such products hold whole rows in registers, so the
    blocks are small. One case fits no tile: the backward pass for float32, head_dim 256, before Ampere.
    """
    if capability is None:
        # Triton's interpreter: small blocks, so that small tests meet whole, masked and ragged ones.
        return Tile(32, 16, 4, 1)
    before_ampere = capability < (8, 0)
    if dtype != torch.float32 and not before_ampere:
        return None
    widest = 64 if dtype == torch.float32 and before_ampere else 128
    return Tile(32, 32, 8, 1) if padded_head_dim(head_dim) <= widest else Tile(16, 16, 4, 1)


@cache
def forward_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """Tile of the forward kernel; fits the shared memory of every device of that capability."""
    if scalar := scalar_tile(head_dim, dtype, capability):
        return scalar
    width = padded_head_dim(head_dim)
    if shared_memory_kib(capability) == 227:
        return Tile(128, 64, 8, 2) if width == 256 else Tile(64, 64, 4, 3)
    if width == 256:
        return Tile(64, 32, 4, 2)
    return Tile(128, 64, 4 if width <= 64 else 8, 2)


@triton.jit
def locate_tile(cu_seqlens_ptr, tile, documents, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """First row of the document that owns `tile` (int64), its length, and the tile's first row inside it.

    SEARCH is off where documents are about equally long: tile numbers run over the documents first, so that blocks
    of equal cost are neighbours. With SEARCH, document d owns the numbers from cu_seqlens[d] // BLOCK + d on: enough
    for its blocks, at most one too many. A number too many gets a row beyond the length.
    """
    if SEARCH:
        document = tl.full((), -1, tl.int32)
        for first in range(0, documents, 256):
            candidates = first + tl.arange(0, 256)
            starts = tl.load(cu_seqlens_ptr + candidates, mask=candidates < documents, other=2**30)
            document += tl.sum((starts // BLOCK + candidates <= tile).to(tl.int32), axis=0)
        start = tl.load(cu_seqlens_ptr + document)
        row = (tile - start // BLOCK - document) * BLOCK
    else:
        document = tile % documents
        start = tl.load(cu_seqlens_ptr + document)
        row = tile // documents * BLOCK
    length = tl.load(cu_seqlens_ptr + document + 1) - start
    return start.to(tl.int64), length, row


@triton.jit
def load_tile(
    ptr, start, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    CHECK_ROWS: tl.constexpr
):  # fmt: skip
    """[BLOCK, BLOCK_D] rows of one head from `row` of the document at `start`; zero outside document and head.

    Without CHECK_ROWS all rows lie in the document. Reading a neighbour's rows, even to multiply them by zero, would
    let its infinities and NaNs through.
    """
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + (start + row) * stride_row + rows[:, None] * stride_row + columns[None, :]
    if HEAD_DIM < BLOCK_D:
        if CHECK_ROWS:
            tile = tl.load(pointers, mask=(row + rows < length)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=(row + rows < length)[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(
    ptr, tile, start, row, length, stride_row, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Write the part of `tile` that lies in document and head, rounded to the dtype of `ptr`."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    pointers = ptr + (start + row) * stride_row + rows[:, None] * stride_row + columns[None, :]
    mask = (row + rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def visible(queries, keys, window, WINDOWED: tl.constexpr):
    """Which keys each query sees; the two broadcast against each other. Keys past the end lie after every query."""
    seen = keys <= queries
    if WINDOWED:
        seen = seen & (queries - keys < window)
    return seen


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """e^x to float32 precision, or 2^x where scores are in units of base two."""
    if NATURAL:
        # e^x = 2^t with t = x log2(e); what rounding t loses, relative to e^x, grows with |x| and is put back.
        t = x * LOG2_E
        y = tl.exp2(t)
        y += y * (tl.fma(x, LOG2_E, -t) / LOG2_E)
    else:
        y = tl.exp2(x)
    return y


@triton.jit
def tanh(x):
    """tanh to float32 precision, which the hardware's tanh.approx and 1 - 2 / (1 + e^2x) near zero do not have."""
    square = x * x
    # Least-squares fit of (tanh(x) / x - 1) / x^2 on [0, 0.6]; off by 3e-9 of the result.
    series = -0.0058939452
    series = series * square + 0.020794617
    series = series * square - 0.053783293
    series = series * square + 0.13331915
    series = series * square - 0.33333299
    series = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, series, tl.where(x < 0.0, -large, large))


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query, first_key, last_key,
    score_scale, cap_scale, window,
    MASKED: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Take the keys first_key ... last_key into the running output, sum and maximum of a query tile."""
    queries = query + tl.arange(0, BLOCK_Q)
    for key in range(first_key, last_key, BLOCK_K):
        k = load_tile(k_ptr, start, key, length, stride_k_row, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
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
            p = exponential(scores - new_max[:, None], q.dtype == tl.float32)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, axis=1) * score_scale)
            p = exponential(scores * score_scale - new_max[:, None], q.dtype == tl.float32)
        shrink = exponential(row_max - new_max, q.dtype == tl.float32)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None]
        v = load_tile(v_ptr, start, key, length, stride_v_row, HEAD_DIM, BLOCK_K, BLOCK_D, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=["documents", "tiles", "tokens", "window"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_ptr,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_v_row, stride_v_head,
    documents, tiles, tokens, score_scale, cap_scale, window,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_Q rows of `out` and of `lse` for one query head of one document."""
    # Heads that share keys run side by side, and late tiles, which see the most keys, run first.
    head = tl.program_id(0) % NUM_HEADS
    tile = tiles - 1 - tl.program_id(0) // NUM_HEADS
    start, length, query = locate_tile(cu_seqlens_ptr, tile, documents, BLOCK_Q, SEARCH)
    if query >= length:
        return
    key_head = head // GROUP
    k_ptr += key_head * stride_k_head
    v_ptr += key_head * stride_v_head
    q = load_tile(
        q_ptr + head * stride_q_head, start, query, length, stride_q_row, HEAD_DIM, BLOCK_Q, BLOCK_D, True
    )  # fmt: skip
    acc = tl.zeros([BLOCK_Q, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    row_max = tl.full([BLOCK_Q], HIDDEN, dtype=tl.float32)

    first_whole, last_whole = 0, query // BLOCK_K * BLOCK_K
    if WINDOWED:
        first_key = tl.maximum(query - window + 1, 0) // BLOCK_K * BLOCK_K
        first_whole = tl.maximum(query + BLOCK_Q - window, 0)
        first_whole = tl.minimum((first_whole + BLOCK_K - 1) // BLOCK_K * BLOCK_K, last_whole)
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
            first_key, first_whole, score_scale, cap_scale, window,
            True, True, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        first_whole, last_whole, score_scale, cap_scale, window,
        False, False, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, stride_k_row, stride_v_row, start, length, query,
        last_whole, tl.minimum(query + BLOCK_Q, length), score_scale, cap_scale, window,
        True, WINDOWED, CAPPED, HEAD_DIM, BLOCK_Q, BLOCK_K, BLOCK_D,
    )  # fmt: skip

    queries = query + tl.arange(0, BLOCK_Q)
    if q.dtype == tl.float32:
        lse = row_max + tl.log(row_sum)
    else:
        lse = (row_max + tl.log2(row_sum)) / LOG2_E
    tl.store(lse_ptr + head * tokens.to(tl.int64) + start + queries, lse, mask=queries < length)
    store_tile(
        out_ptr + head * HEAD_DIM, acc / row_sum[:, None], start, query, length, NUM_HEADS * HEAD_DIM,
        HEAD_DIM, BLOCK_Q, BLOCK_D,
    )  # fmt: skip


def score_arguments(
    dtype: torch.dtype, max_seqlen: int, scale: float, window: int | None, softcap: float | None
) -> dict[str, object]:
    """Kernel arguments that say how scores are scaled, capped and masked; a window that hides nothing is dropped."""
    unit = 1.0 if dtype == torch.float32 else LOG2_E.value
    windowed = window is not None and window < max_seqlen
    capped = softcap is not None
    return {
        "score_scale": unit * (softcap if capped else scale),
        "cap_scale": scale / softcap if capped else 0.0,
        "window": window if windowed else 0,
        "WINDOWED": windowed,
        "CAPPED": capped,
    }


def tile_arguments(cu_seqlens: Tensor, max_seqlen: int, tokens: int, block: int) -> dict[str, int | bool]:
    """Number of tiles, and whether to search for a tile's document; see `locate_tile`."""
    documents = cu_seqlens.numel() - 1
    if_equal, if_searched = documents * ceil_div(max_seqlen, block), tokens // block + documents
    return {
        "documents": documents,
        "tiles": min(if_equal, if_searched),
        "tokens": tokens,
        "SEARCH": if_searched < if_equal,
    }


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
    tile = forward_tile(q.shape[-1], q.dtype, device_capability(q.device))
    return _launch_forward(tile, q, k, v, cu_seqlens, max_seqlen, scale, window, softcap)


def _launch_forward(
    tile: Tile, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, num_heads, head_dim = q.shape
    out = torch.empty((tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((num_heads, tokens), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    tiles = tile_arguments(cu_seqlens, max_seqlen, tokens, tile.block_q)
    attention_forward_kernel[(tiles["tiles"] * num_heads,)](
        q, k, v, out, lse, cu_seqlens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        NUM_HEADS=num_heads, GROUP=num_heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
        BLOCK_Q=tile.block_q, BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        **tiles, **score_arguments(q.dtype, max_seqlen, scale, window, softcap),
    )  # fmt: skip
    return out, lse
