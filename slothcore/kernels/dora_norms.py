"""Row norms of W + f B A, as DoRA divides by them, without that matrix.

Norms     n[i] = (sum_k (W[i, k] + f sum_r B[i, r] A[r, k])^2)^(1/2),  but at least 2^-126
Scales    c[i] = m[i] / n[i]
Shapes    W [N, K] dense or NF4; A [R, K]; B [N, R]; n, c, m [N].
          N = out_features, K = in_features, R = rank, f = a number that B lacks or has too much.
Dtypes    W float32 or 16-bit, or NF4, whose values are taken as they are before any rounding; A and B one dtype,
          float32 or 16-bit; m, n and c float32, and so all sums.
Order     a program owns whole rows and walks along them: no atomics, the same result every time.
Source    Liu et al. 2024, arXiv:2402.09353.

A tile of W is read (four bits a weight in NF4, decoded on the way), B A is added to it where it lies, in registers, and
the squares are summed: one read of W, nothing written but n and c. The expansion ||W||^2 + 2 f <W A^T, B> + f^2 <B, B A
A^T> would allow to keep ||W||^2, which is constant, but W A^T has to read W all the same, and where B A takes away from
W the sum cancels; so nothing is kept. A row of zeros has the smallest n that is a normal number, not zero: it begins
with m = n and so c = 1, where PEFT has 0 / 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.dora_norms_eager import SMALLEST_NORM
from slothcore.kernels.launch import ceil_div, next_power_of_2, with_contiguous_rows
from slothcore.kernels.nf4 import absmax_arguments, decode_nf4, load_absmax
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor, nf4_code

# Tensor cores take at least 16 ranks; longer sums go in steps, so that B and A fit beside the tile.
SMALLEST_DOT = 16
LARGEST_STEP = 64
LARGEST_STEP_OF_FLOAT = 32


class Tile(NamedTuple):
    """What one program holds at a time: [rows, columns] of W; columns are whole blocks of NF4."""

    rows: int
    columns: int
    warps: int
    stages: int


def choose_tile(out_features: int, rank: int, *, itemsize: int) -> Tile:
    """A tall tile reads A less often; with few rows it leaves multiprocessors without one, and where much of B or its
    products in float32 lie beside it, the registers run out.

    Args:
        itemsize: bytes of an element of A and B.
    """
    tall = out_features >= 4096 and rank <= 32 and itemsize == 2
    return Tile(rows=32 if tall else 16, columns=128, warps=4, stages=3)


@triton.jit
def _weights(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr,
    row, first, K, IS_NF4: tl.constexpr, NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    """W [TILE_N, TILE_K] from column `first` on, in float32; zero beyond the last column."""
    column = first + tl.arange(0, TILE_K)
    if not IS_NF4:
        index = row[:, None] * K + column[None, :]
        return tl.load(weight_ptr + index, mask=(column < K)[None, :], other=0.0).to(tl.float32)
    elif WHOLE_BLOCKS:
        blocks: tl.constexpr = TILE_K // 64
        byte = first // 2 + tl.arange(0, TILE_K // 2)
        packed = tl.load(weight_ptr + row[:, None] * (K // 2) + byte[None, :], mask=(byte < K // 2)[None, :], other=0)
        block = first // 64 + tl.arange(0, blocks)
        exists = (block < K // 64)[None, :]
        absmax = load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr,
            row[:, None] * (K // 64) + block[None, :], exists, NESTED,
        )  # fmt: skip
        absmax = tl.where(exists, absmax, 0.0)
        code = tl.reshape(tl.join(packed >> 4, packed & 15), [TILE_N, blocks, 64])
        return tl.reshape(decode_nf4(code, table_ptr, "gather") * absmax[:, :, None], [TILE_N, TILE_K])
    else:
        # Rows begin in the middle of a block, and perhaps of a byte.
        exists = (column < K)[None, :]
        index = row[:, None] * K + column[None, :]
        byte = tl.load(weight_ptr + index // 2, mask=exists, other=0)
        absmax = load_absmax(
            absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, index // 64, exists, NESTED
        )
        code = tl.where(index % 2 == 0, byte >> 4, byte & 15)
        return tl.where(exists, decode_nf4(code, table_ptr, "gather") * absmax, 0.0)


@triton.jit
def _add_product(
    delta, A_ptr, B_ptr, stride_A_row, stride_B_row, row, first, first_rank,
    K: tl.constexpr, R: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr,
):  # fmt: skip
    """delta + B A for TILE_K columns from `first` on and TILE_R ranks from `first_rank` on."""
    column = first + tl.arange(0, TILE_K)
    rank = first_rank + tl.arange(0, TILE_R)
    has_rank = rank < R
    B = tl.load(B_ptr + row[:, None] * stride_B_row + rank[None, :], mask=has_rank[None, :], other=0.0)
    A_ptrs = A_ptr + rank[:, None] * stride_A_row + column[None, :]
    A = tl.load(A_ptrs, mask=has_rank[:, None] & (column < K)[None, :], other=0.0)
    return tl.dot(B, A, delta, input_precision="ieee")


@triton.jit
def dora_norms_kernel(
    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr,
    A_ptr, B_ptr, magnitude_ptr, norm_ptr, scale_ptr,
    stride_A_row, stride_B_row, N, factor,
    K: tl.constexpr, R: tl.constexpr,
    IS_NF4: tl.constexpr, NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, SMALLEST: tl.constexpr,
    TILE_N: tl.constexpr, TILE_K: tl.constexpr, TILE_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program computes the norms, and the scales, of TILE_N rows."""
    row = tl.program_id(0).to(tl.int64) * TILE_N + tl.arange(0, TILE_N)
    # Rows beyond the weight repeat its last one, which costs no mask; they are never stored.
    weight_row = tl.minimum(row, N - 1)
    squares = tl.zeros([TILE_N, TILE_K], tl.float32)
    for first in tl.range(0, K, TILE_K, num_stages=STAGES):
        weight = _weights(
            weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr,
            weight_row, first, K, IS_NF4, NESTED, WHOLE_BLOCKS, TILE_N, TILE_K,
        )  # fmt: skip
        delta = tl.zeros([TILE_N, TILE_K], tl.float32)
        if R <= TILE_R:
            delta = _add_product(
                delta, A_ptr, B_ptr, stride_A_row, stride_B_row, weight_row, first, 0, K, R, TILE_K, TILE_R
            )
        else:
            # No unrolling: the compiler would load all of B ahead of both loops.
            for first_rank in tl.range(0, R, TILE_R, num_stages=1):
                delta = _add_product(
                    delta, A_ptr, B_ptr, stride_A_row, stride_B_row, weight_row, first, first_rank, K, R, TILE_K, TILE_R
                )
        total = weight + factor * delta
        squares += total * total
    # The roundings of torch: where m is n, the scale has to be 1, which the fast division does not promise.
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=1)), SMALLEST)
    exists = row < N
    tl.store(norm_ptr + row, norm, mask=exists)
    if magnitude_ptr is not None:
        magnitude = tl.load(magnitude_ptr + row, mask=exists, other=0.0).to(tl.float32)
        tl.store(scale_ptr + row, tl.div_rn(magnitude, norm), mask=exists)


def row_norms(
    weight: Tensor | Nf4Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    factor: float = 1.0,
    magnitude: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    _tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norms of the rows of W + factor * B A, and what DoRA multiplies them with.

    Args:
        weight: [N, K] dense, or NF4.
        lora_A: [R, K], contiguous rows.
        lora_B: [N, R], contiguous rows, in the dtype of A.
        factor: of B A.
        magnitude: m [N], or None.
        out: where n and c go, [N] float32 contiguous each.
        _tile: for tests and sweeps.
    Returns: n [N]; c [N], or None without m.
    """
    out_features, in_features = weight.shape
    tile = _tile or choose_tile(out_features, lora_A.shape[0], itemsize=lora_A.itemsize)
    norm, scale = out or (lora_A.new_empty(out_features, dtype=torch.float32), None)
    if magnitude is not None and scale is None:
        scale = torch.empty_like(norm)
    lora_A, lora_B = with_contiguous_rows(lora_A), with_contiguous_rows(lora_B)
    rank = lora_A.shape[0]
    is_nf4 = isinstance(weight, Nf4Tensor)
    if isinstance(weight, Nf4Tensor):
        parts = (weight.packed, *absmax_arguments(weight), nf4_code(lora_A.device))
        assert tile.columns % BLOCK == 0, f"{tile.columns} columns are no whole blocks of NF4"
    else:
        parts = (weight.contiguous(), None, None, None, None, None)
    most = LARGEST_STEP if lora_A.itemsize == 2 else LARGEST_STEP_OF_FLOAT
    dora_norms_kernel[(ceil_div(out_features, tile.rows),)](
        *parts,
        lora_A, lora_B, None if magnitude is None else magnitude.contiguous(), norm, scale,
        lora_A.stride(0), lora_B.stride(0), out_features, factor,
        K=in_features, R=rank,
        IS_NF4=is_nf4, NESTED=isinstance(weight, Nf4Tensor) and weight.is_nested,
        WHOLE_BLOCKS=in_features % BLOCK == 0, SMALLEST=SMALLEST_NORM,
        TILE_N=tile.rows, TILE_K=tile.columns, TILE_R=min(most, max(SMALLEST_DOT, next_power_of_2(rank))),
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return norm, None if magnitude is None else scale
