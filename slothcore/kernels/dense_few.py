"""Products of few rows with a large 16-bit weight, which is what choosing the next token waits for.

Forward   y = x W^T
Shapes    x [M, K]; W [N, K], K a multiple of 128; y [M, N].  M = rows, at most MOST_ROWS.
Dtypes    x, W, y bfloat16 or float16, alike; sums float32, one rounding.
Order     A row's bits do not depend on the other rows, but whether there are any: a single row has a kernel of its own.
Early     A single row's kernel has its part of W in registers when x comes, see early.py.
Source    cuBLAS reads such a weight at 2.8 TB/s on an H100, these at 3.15 (1 row) and 3.0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.launch import ceil_div, next_power_of_2

MOST_ROWS = 16
FEWEST_OUTPUTS = 32768
"""With fewer, what is lost while a kernel begins and ends counts for more than the rate; that was not measured."""
LONGEST_ROW = 8192
ELEMENTS = 16384
"""Of the weight in a program for a single row; eight warps hold them in registers."""
# Microseconds for 128256x4096 and 16 rows, rows x columns of a tile: 64x256 349, 128x128 348, 128x256 349, 64x128 353.
BLOCK_N, BLOCK_K, STAGES = 128, 128, 4


@triton.jit
def dense_one_row_kernel(
    x_ptr, weight_ptr, out_ptr, N, K, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr
):
    """This program computes ROWS outputs of the only token."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < K
    # Rows beyond the last repeat it; they are never stored. No row is read again, so none stays in the cache.
    weight_ptrs = weight_ptr + tl.minimum(row, N - 1)[:, None] * K + column[None, :]
    weight = tl.load(weight_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
    wait_early(EARLY)
    # By now this program's place is the next kernel's for the taking: it waits for memory only.
    signal_early(EARLY)
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    y = tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=row < N)


@triton.jit(do_not_specialize=["M"])
def dense_few_kernel(
    x_ptr, weight_ptr, out_ptr, stride_x_row, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_N outputs of all tokens, which are the second operand of the tensor cores."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + tl.minimum(row, N - 1)[:, None] * K + column[None, :]
    x_ptrs = x_ptr + tl.minimum(token, M - 1)[:, None].to(tl.int64) * stride_x_row + column[None, :]
    wait_early(EARLY)
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
        x = tl.load(x_ptrs + start)
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    out_ptrs = out_ptr + token[None, :].to(tl.int64) * N + row[:, None]
    tl.store(out_ptrs, sums.to(out_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row < N)[:, None])


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these operands, on a GPU on which it is the faster way."""
    (rows, in_features), out_features = x.shape, weight.shape[0]
    if not 0 < rows <= MOST_ROWS or out_features < FEWEST_OUTPUTS or in_features > LONGEST_ROW:
        return False
    alike = x.dtype == weight.dtype and x.itemsize == 2 and weight.is_contiguous() and x.stride(1) == 1
    aligned = in_features % BLOCK_K == 0 and all(t.data_ptr() % 16 == 0 for t in (x, weight)) and x.stride(0) % 8 == 0
    return alike and aligned and begins_early(x)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T [M, N] of x.dtype, for x [M, K] and weight [N, K] which `takes` takes."""
    (rows, in_features), out_features = x.shape, weight.shape[0]
    out = torch.empty(rows, out_features, dtype=x.dtype, device=x.device)
    early = begins_early(x)
    if rows == 1:
        columns = next_power_of_2(in_features)
        tile = ELEMENTS // columns
        dense_one_row_kernel[(ceil_div(out_features, tile),)](
            x, weight, out, out_features, in_features, ROWS=tile, COLUMNS=columns, EARLY=early,
            num_warps=8, launch_pdl=early,
        )  # fmt: skip
    else:
        dense_few_kernel[(ceil_div(out_features, BLOCK_N),)](
            x, weight, out, x.stride(0), rows, out_features, in_features,
            BLOCK_M=MOST_ROWS, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STAGES=STAGES, EARLY=early,
            num_warps=4, launch_pdl=early,
        )  # fmt: skip
    return out
