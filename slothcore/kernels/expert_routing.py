"""Tokens sorted by the experts that they go to, and back.

A token goes to k experts; its pair number token * k + choice names one of these visits. Rows are the pairs sorted by
expert, so that each expert's rows lie together:
    gather    rows[i] = x[order[i] // k]
    combine   y[t] = sum_j rows[position[t k + j]],   position the inverse of order
Each is the other's backward. Every element is written by one program, its sum in the order of the choices: nothing is
atomic, and the result is the same every time.

Shapes    x, y [T, H]; rows [T k, H]; order, position [T k] int64; offsets [E + 1] int32.
          T = tokens, k = experts of a token, H = hidden_size, E = experts.
Dtypes    x, y, rows float32 or 16-bit, all alike; sums float32, rounded once.
Source    Gale et al. 2022 (MegaBlocks), arXiv:2211.15841.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels import expert_routing_eager
from slothcore.kernels.expert_routing_eager import Routing
from slothcore.kernels.launch import ceil_div, partial_row_tile, with_contiguous_rows

__all__ = ["Routing", "combine_rows", "gather_rows", "sort_by_expert"]


@triton.jit(do_not_specialize=["choices"])
def expert_gather_kernel(
    x_ptr, order_ptr, rows_ptr, stride_x_row, choices, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """This program copies BLOCK_COLUMNS values of one row."""
    # One grid dimension, because the second may not exceed 65535; neighbours share a row.
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    token = tl.load(order_ptr + row) // choices
    values = tl.load(x_ptr + token * stride_x_row + column, mask=exists, other=0.0)
    tl.store(rows_ptr + row * WIDTH + column, values, mask=exists)


@triton.jit
def expert_combine_kernel(
    rows_ptr, position_ptr, y_ptr, stride_rows_row, CHOICES: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """This program sums BLOCK_COLUMNS values of one token."""
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    token = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    sums = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        row = tl.load(position_ptr + token * CHOICES + choice)
        sums += tl.load(rows_ptr + row * stride_rows_row + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * WIDTH + column, sums.to(y_ptr.dtype.element_ty), mask=exists)


# A radix sort of one-byte keys and a binary search are what torch has; there is nothing to fuse.
sort_by_expert = expert_routing_eager.sort_by_expert


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """The row of x [T, H] that each pair of `order` [T * k] reads: x[order // k], [T * k, H]."""
    num_tokens, width = x.shape
    pairs = order.numel()
    rows = x.new_empty((pairs, width))
    if pairs == 0:
        return rows
    x = with_contiguous_rows(x)
    tile = partial_row_tile(width)
    expert_gather_kernel[(pairs * ceil_div(width, tile.columns),)](
        x, order, rows, x.stride(0), pairs // num_tokens,
        WIDTH=width, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return rows


def combine_rows(rows: Tensor, position: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows [T * k, H] of each token's pairs, in the order of its choices: [T, H], rounded once."""
    pairs, width = rows.shape
    y = rows.new_empty((num_tokens, width))
    if num_tokens == 0:
        return y
    rows = with_contiguous_rows(rows)
    tile = partial_row_tile(width)
    expert_combine_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        rows, position, y, rows.stride(0),
        CHOICES=pairs // num_tokens, WIDTH=width, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return y
