"""Gradients of the LoRA factors in plain torch: the same functions as `lora_grads`, where the equations stand.

Takes float64 too. Sums of 16-bit products are float32.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.kernels.lora_factors_eager import padded_rank


class ColumnScale(NamedTuple):
    """The columns' factor of a norm, s = weight + offset.

    Attributes:
        weight: [K], in any floating dtype.
        offset: 1 for the Gemma family, else 0.
    """

    weight: Tensor
    offset: float


def v_and_dB(
    dy: Tensor, B: Tensor, u: Tensor, *, out_features: Sequence[int], ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """v = dy B [T, R] in dy's dtype and dB = dy^T u [N, R], for dy [T, N], B [N, R] and u [T, R]."""
    return torch.mm(dy, B), transposed_product(dy, u)


def grads_apart(
    dA: Tensor | None,
    dB: Tensor | None,
    *,
    out_features: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    scale: ColumnScale | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA_i = s * dA[ranks of i] and dB_i = c_i dB[rows of i, ranks of i], each contiguous; None without LoRA."""
    if dA is not None and scale is not None:
        dA = dA * (scale.weight.to(dA.dtype) + scale.offset)
    every_dA: list[Tensor | None] = []
    every_dB: list[Tensor | None] = []
    row = column = 0
    for rows, rank, scaling in zip(out_features, ranks, scalings, strict=True):
        here = slice(column, column + rank)
        every_dA.append(dA[here] if dA is not None and rank else None)
        block = dB[row : row + rows, here] if dB is not None and rank else None
        if block is not None:
            block = block.contiguous() if scaling == 1.0 else torch.mul(block, scaling).contiguous()
        every_dB.append(block)
        row += rows
        column += padded_rank(rank)
    return every_dA, every_dB


def ranks_apart(dA: Tensor, ranks: Sequence[int]) -> list[Tensor | None]:
    """dA_i [r_i, K] out of dA [R, K], without the padding of each; None where r_i is 0."""
    starts = accumulate(map(padded_rank, ranks), initial=0)
    return [dA[start : start + rank] if rank else None for start, rank in zip(starts, ranks, strict=False)]


def blocks_apart(dB: Tensor, out_features: Sequence[int], ranks: Sequence[int]) -> list[Tensor | None]:
    """dB_i [N_i, r_i] out of one vector in which they lie end to end; None where r_i is 0."""
    blocks = dB.split([n * rank for n, rank in zip(out_features, ranks, strict=True)])
    shapes = zip(blocks, out_features, ranks, strict=True)
    return [block.view(n, rank) if rank else None for block, n, rank in shapes]


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, kept in the float32 of its sums if the factors are 16-bit."""
    if left.dtype.itemsize != 2:
        return torch.mm(left.t(), right)
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.mm(left.t().float(), right.float())
