"""The LoRA factors of several projections as one pair of matrices, written in one launch.

    A = [A_1; A_2; ..]  [R, K]     B = diag(c_1 B_1, c_2 B_2, ..)  [N, R]

Shapes    A_i [r_i, K]; B_i [N_i, r_i]; R = sum of the ranks r_i, each rounded up to a multiple of 8 by zero rows of A
          and zero columns of B; N = sum N_i. A projection without factors has r_i = 0, and zero rows in B.
          K = in_features, N_i = out_features, c_i = scaling.
Dtypes    factors float32 or 16-bit, not necessarily the same; A and B float32 or 16-bit; products float32.
Rounding  each value, with its scaling, rounds once to the dtype of A and B.
Source    Hu et al. 2021, arXiv:2106.09685.

The matrices are a few megabytes, so what counts is the number of launches. To cast, join and scale one pair takes torch
two, two pairs seven, three pairs nine; one pair that needs a single operation or none is left to it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels import lora_factors_eager
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.lora_factors_eager import Factors, padded_rank, single_pair

LARGEST_GROUP = 3
BLOCK = 1024
WARPS = 4


@triton.jit
def _place(values, factor_ptr, row, column, scaling, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """`values` with those elements replaced that lie in one factor; row and column are relative to its corner."""
    if factor_ptr is not None:
        inside = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
        factor = tl.load(factor_ptr + row * COLUMNS + column, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, factor * scaling, values)
    return values


@triton.jit
def lora_factors_kernel(
    A_0_ptr, A_1_ptr, A_2_ptr, B_0_ptr, B_1_ptr, B_2_ptr, joined_A_ptr, joined_B_ptr,
    scaling_0, scaling_1, scaling_2,
    WIDTH: tl.constexpr,
    ROWS_0: tl.constexpr, ROWS_1: tl.constexpr, ROWS_2: tl.constexpr,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr,
    COLUMN_1: tl.constexpr, COLUMN_2: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program writes BLOCK consecutive elements of A, or of B after the programs of A.

    Factor i has RANK_i ranks from COLUMN_i on (COLUMN_0 is 0), and its B has ROWS_i rows.
    """
    programs_of_A: tl.constexpr = (RANKS * WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    values = tl.zeros([BLOCK], dtype=tl.float32)
    if program < programs_of_A:
        element = program * BLOCK + tl.arange(0, BLOCK)
        row, column = element // WIDTH, element % WIDTH
        values = _place(values, A_0_ptr, row, column, 1.0, RANK_0, WIDTH)
        values = _place(values, A_1_ptr, row - COLUMN_1, column, 1.0, RANK_1, WIDTH)
        values = _place(values, A_2_ptr, row - COLUMN_2, column, 1.0, RANK_2, WIDTH)
        tl.store(joined_A_ptr + element, values.to(joined_A_ptr.dtype.element_ty), mask=element < RANKS * WIDTH)
    else:
        element = (program - programs_of_A) * BLOCK + tl.arange(0, BLOCK)
        row, column = element // RANKS, element % RANKS
        values = _place(values, B_0_ptr, row, column, scaling_0, ROWS_0, RANK_0)
        values = _place(values, B_1_ptr, row - ROWS_0, column - COLUMN_1, scaling_1, ROWS_1, RANK_1)
        values = _place(values, B_2_ptr, row - ROWS_0 - ROWS_1, column - COLUMN_2, scaling_2, ROWS_2, RANK_2)
        exists = element < (ROWS_0 + ROWS_1 + ROWS_2) * RANKS
        tl.store(joined_B_ptr + element, values.to(joined_B_ptr.dtype.element_ty), mask=exists)


def pack_factors(
    lora_A: Factors,
    lora_B: Factors,
    *,
    scalings: Sequence[float],
    out_features: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Join the factors of projections over one input; more than three take torch's operations.

    Args:
        lora_A: [r_i, K] of each projection, or None; at least one is given. Below 2^31 elements in all, as lora_B.
        lora_B: [N_i, r_i], None where `lora_A` is.
        scalings: c_i of each.
        out_features: N_i of each, with or without factors.
        dtype: of the result.
    Returns: A [R, K]; B [N, R]. What needs no change is returned as it is, not copied.
    """
    count = len(lora_A)
    first = next(A for A in lora_A if A is not None)
    # With A as it is wanted, at most B has to be scaled or cast.
    if first.dtype == dtype and (pair := single_pair(lora_A, lora_B, scalings, dtype)):
        return pair
    if count > LARGEST_GROUP:
        return lora_factors_eager.pack_factors(
            lora_A, lora_B, scalings=scalings, out_features=out_features, dtype=dtype
        )
    width = first.shape[1]
    absent = LARGEST_GROUP - count
    A_0, A_1, A_2 = [None if A is None else A.contiguous() for A in lora_A] + [None] * absent
    B_0, B_1, B_2 = [None if B is None else B.contiguous() for B in lora_B] + [None] * absent
    rank_0, rank_1, rank_2 = [0 if A is None else A.shape[0] for A in (A_0, A_1, A_2)]
    column_1 = padded_rank(rank_0)
    column_2 = column_1 + padded_rank(rank_1)
    ranks = column_2 + padded_rank(rank_2)
    rows_0, rows_1, rows_2 = [*out_features] + [0] * absent
    scaling_0, scaling_1, scaling_2 = [*scalings] + [1.0] * absent

    joined_A = torch.empty((ranks, width), dtype=dtype, device=first.device)
    joined_B = torch.empty((rows_0 + rows_1 + rows_2, ranks), dtype=dtype, device=first.device)
    lora_factors_kernel[(ceil_div(joined_A.numel(), BLOCK) + ceil_div(joined_B.numel(), BLOCK),)](
        A_0, A_1, A_2, B_0, B_1, B_2, joined_A, joined_B,
        scaling_0, scaling_1, scaling_2,
        WIDTH=width, ROWS_0=rows_0, ROWS_1=rows_1, ROWS_2=rows_2, RANK_0=rank_0, RANK_1=rank_1, RANK_2=rank_2,
        COLUMN_1=column_1, COLUMN_2=column_2, RANKS=ranks, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return joined_A, joined_B
