"""The LoRA factors of several projections as one pair of matrices, in plain torch; the twin of `lora_factors.py`.

    A = [A_1; A_2; ..]  [R, K]     B = diag(c_1 B_1, c_2 B_2, ..)  [N, R]

Shapes    A_i [r_i, K]; B_i [N_i, r_i]; R = sum of the ranks r_i, each rounded up to a multiple of 8 by zero rows of A
          and zero columns of B; N = sum N_i. A projection without factors has r_i = 0, and zero rows in B.
          K = in_features, N_i = out_features, c_i = scaling.
Dtypes    factors of any floating dtype, not necessarily the same; A and B of the dtype asked for.
Rounding  each value, with its scaling, rounds once to that dtype.
Source    Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RANK_MULTIPLE = 8
"""Gives 16-bit factors rows of 16 bytes: what tensor cores and TMA descriptors need."""

Factors = Sequence[Tensor | None]


def padded_rank(rank: int) -> int:
    """`rank` rounded up to a multiple of `RANK_MULTIPLE`."""
    return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE


def pack_factors(
    lora_A: Factors,
    lora_B: Factors,
    *,
    scalings: Sequence[float],
    out_features: Sequence[int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Join the factors of projections over one input.

    Args:
        lora_A: [r_i, K] of each projection, or None; at least one is given.
        lora_B: [N_i, r_i], None where `lora_A` is.
        scalings: c_i of each.
        out_features: N_i of each, with or without factors.
        dtype: of the result.
    Returns: A [R, K]; B [N, R]. What needs no change is returned as it is, not copied.
    """
    if pair := single_pair(lora_A, lora_B, scalings, dtype):
        return pair
    first = next(A for A in lora_A if A is not None)
    ranks = sum(padded_rank(A.shape[0]) for A in lora_A if A is not None)
    joined_A = torch.zeros(ranks, first.shape[1], dtype=dtype, device=first.device)
    joined_B = torch.zeros(sum(out_features), ranks, dtype=dtype, device=first.device)
    row = column = 0
    for A, B, scaling, rows in zip(lora_A, lora_B, scalings, out_features, strict=True):
        if A is not None and B is not None:
            rank = A.shape[0]
            joined_A[column : column + rank] = A
            wide = torch.promote_types(torch.promote_types(B.dtype, dtype), torch.float32)
            joined_B[row : row + rows, column : column + rank] = B.to(wide) * scaling
            column += padded_rank(rank)
        row += rows
    return joined_A, joined_B


def single_pair(
    lora_A: Factors, lora_B: Factors, scalings: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """The factors of one projection whose rank needs no padding, each by one of torch's operations or by none.

    None for everything else, also for factors that are not as wide as `dtype`, where torch would round twice.
    """
    A, B = lora_A[0], lora_B[0]
    if len(lora_A) > 1 or A is None or B is None or A.shape[0] % RANK_MULTIPLE:
        return None
    if torch.promote_types(B.dtype, dtype) != B.dtype:
        return None
    if scalings[0] == 1.0:
        return A.to(dtype), B.to(dtype)
    return A.to(dtype), torch.mul(B, scalings[0], out=torch.empty(B.shape, dtype=dtype, device=B.device))
