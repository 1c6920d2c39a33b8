"""The index of the largest number of each row: the greedy choice of a token.

torch's reduction takes 27 us for a row of 128256 on an H100, of a step of 3,400.

Shapes    x [M, N] of any floating dtype, the result [M] int64.  M = rows, N = columns.
Ties      The first of several. A NaN counts as infinity, so that it is found.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.launch import next_power_of_2, with_contiguous_rows

COLUMNS = 8192
"""That a program looks at together, in 16 warps."""


@triton.jit
def largest_kernel(x_ptr, out_ptr, stride_x_row, N, COLUMNS: tl.constexpr, EARLY: tl.constexpr):
    """This program takes one row."""
    signal_early(EARLY)
    wait_early(EARLY)
    x_ptr += tl.program_id(0).to(tl.int64) * stride_x_row
    column = tl.arange(0, COLUMNS)
    largest = tl.full([COLUMNS], -float("inf"), dtype=tl.float32)
    # Where all are -inf, the first.
    index = column
    for start in tl.range(0, N, COLUMNS, num_stages=1):
        x = tl.load(x_ptr + start + column, mask=start + column < N, other=-float("inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        # Of equal ones a lane keeps the first.
        index = tl.where(x > largest, start + column, index)
        largest = tl.maximum(x, largest)
    top = tl.max(largest, axis=0)
    first = tl.min(tl.where(largest == top, index, 2147483647), axis=0)
    tl.store(out_ptr + tl.program_id(0), first.to(tl.int64))


def largest(x: Tensor) -> Tensor:
    """The index [M] int64 of the largest number of each row of x [M, N], N at least 1."""
    rows, columns = x.shape
    x, early = with_contiguous_rows(x), begins_early(x)
    out = torch.empty(rows, dtype=torch.int64, device=x.device)
    if rows:
        largest_kernel[(rows,)](
            x, out, x.stride(0), columns, COLUMNS=min(COLUMNS, next_power_of_2(columns)), EARLY=early,
            num_warps=16, launch_pdl=early,
        )  # fmt: skip
    return out
