"""Linear maps that share one input, each a frozen base with a LoRA term: forward and backward as plain functions.

The Functions in `lora.py` are compositions of what stands here; nothing in this file touches autograd. How the factors
of several projections are joined stands in `lora_group.py`, how dA does without x in `lora_source.py`.

Forward   y_i  = x W_i^T + c_i (m_i * x) A_i^T B_i^T + b_i,     c_i = scaling_i / (1 - p_i)
Backward  with v_i = c_i dy_i B_i and u_i = (m_i * x) A_i^T
          dx   = sum_i dy_i W_i + m_i * (v_i A_i)
          dA_i = v_i^T (m_i * x),   dB_i = c_i dy_i^T u_i,   db_i = sum over tokens of dy_i
Side by side: with y = [y_1 | y_2 | ..], A = [A_1; A_2; ..] and the block-diagonal B = diag(c_i B_i), each line above is
one matrix product over all projections: u = x A^T, v = dy B, dA = v^T x, and dy^T u, whose diagonal blocks are dB_i /
c_i. The zeros of B cost nothing that is felt, because these products are bound by reading x and dy.

Shapes    x [T, K]; y_i, dy_i [T, N_i]; W_i [N_i, K]; A_i [r_i, K]; B_i [N_i, r_i]; b_i [N_i]; m_i [T, K] of 0 and 1.
          T = tokens, K = in_features, N_i = out_features, r_i = rank, p_i = dropout probability.
Dtypes    x, y and dense W share one dtype, the compute dtype. Factors may be wider: they are rounded to the compute
          dtype once, and their gradients have their own dtype, summed in float32.
Source    Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.lora_group import Dtypes, Group, dense_blocks, dropout_masks, has_copies
from slothcore.autograd.lora_source import JoinedA, Source
from slothcore.kernels import (
    lora_gemm,
    lora_gemm_eager,
    lora_grads,
    lora_grads_eager,
    lora_grads_few,
    nf4_gemm,
    nf4_gemm_group,
)
from slothcore.kernels.gpu import has_tensor_cores
from slothcore.kernels.lora_grads_eager import transposed_product
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor

# Up to this many rows the NF4 weight is decoded inside the matrix product; above, once into a scratch tile.
NF4_IN_KERNEL_ROWS = 256

# Before Ampere only cuBLAS has tensor cores. There sums of more rows do not fit a program's registers: of 32 rows a
# thread spills 240 bytes, of 64 2,900; and the tile for 256 needs twice the shared memory of a T4.
NF4_IN_KERNEL_ROWS_BEFORE_AMPERE = 16

# The same where a decoded copy is kept: a product of so few rows is bound by reading the weight, and NF4 is a quarter.
NF4_OVER_COPY_ROWS = 16

# Where large weights are decoded by permutes, NF4 wins for longer. Microseconds at 64 rows on an H100, with the LoRA
# term, against cuBLAS's for the copy without it: 14336 x 4096 38.6 against 44.2, 4096 x 14336 33.9 against 47.3, and
# 4096 x 4096 15.1 against 14.8. Smaller weights have less to read, and their copies may lie together as one product.
NF4_OVER_COPY_ROWS_OF_LARGE = 64
NF4_LARGE = 4096 * 4096


def project(x: Tensor, u: Tensor | None, group: Group, B: Tensor | None, bias: Tensor | None) -> Tensor:
    """All projections of x, side by side.

    Args:
        x: [T, K].
        u: [T, sum r] as `lora_input` makes it; None without LoRA.
        B: [sum N, sum r] as `joined_factors` makes it; None without LoRA.
        bias: [sum N] as `joined_bias` makes it; None if no projection has one.
    Returns: y [T, sum N].
    """
    weights = decoded_beside_products(x, group, (u, B), backward=False)
    if weights is not None:
        return nf4_gemm_group.nf4_linear_group(x, weights, lora_x=u, lora_B=B, bias=bias)
    linear, blocks = _linear_and_blocks(x, group)
    if len(blocks) == 1:
        return linear(x, blocks[0][0], lora_x=u, lora_B=B, bias=bias)
    y = x.new_empty(x.shape[0], group.layout.outputs.stop)
    for weight, rows in blocks:
        linear(
            x,
            weight,
            lora_x=u,
            lora_B=None if B is None else B[rows],
            bias=None if bias is None else bias[rows],
            out=y[:, rows],
        )
    return y


def _linear_and_blocks(
    x: Tensor, group: Group
) -> tuple[Callable[..., Tensor], Sequence[tuple[Tensor | Nf4Tensor, slice]]]:
    """The function to multiply with, and the weights that it takes, each with the outputs that it makes."""
    if decodes_in_kernel(x, group):
        return nf4_gemm.nf4_linear, list(zip(group.weights, group.layout.rows, strict=True))
    gemm = lora_gemm if x.is_cuda else lora_gemm_eager
    return gemm.linear_add, dense_blocks(group, x)


def decodes_in_kernel(x: Tensor, group: Group) -> bool:
    """Whether x has so few rows that decoding a weight costs more than multiplying by it."""
    rows, in_features = x.shape
    if not x.is_cuda or rows > _most_rows_in_kernel(x) or in_features % BLOCK != 0:
        return False
    weights = [w for w in group.weights if isinstance(w, Nf4Tensor)]
    if len(weights) < len(group.weights):
        return False
    if rows <= NF4_OVER_COPY_ROWS or not has_copies(group, x.dtype):
        return True
    large = all(w.shape[0] * in_features >= NF4_LARGE and nf4_gemm.can_permute(x, w) for w in weights)
    return large and rows <= NF4_OVER_COPY_ROWS_OF_LARGE


def _most_rows_in_kernel(x: Tensor) -> int:
    if x.itemsize == 2 and not has_tensor_cores(x.device):
        return NF4_IN_KERNEL_ROWS_BEFORE_AMPERE
    return NF4_IN_KERNEL_ROWS


def decoded_beside_products(
    left: Tensor, group: Group, factors: Sequence[Tensor | None], *, backward: bool
) -> list[Nf4Tensor] | None:
    """The weights of the group, if they are decoded while others of their rows are multiplied; None where another way
    is faster.

    Args:
        left: x, or dy for the gradient of x.
        factors: of the LoRA term, and what they are multiplied with.
    """
    weights = [w for w in group.weights if isinstance(w, Nf4Tensor)]
    if not left.is_cuda or len(weights) < len(group.weights) or has_copies(group, left.dtype):
        return None
    return weights if nf4_gemm_group.takes(left, weights, factors, backward=backward) else None


def lora_input(x: Tensor, group: Group, A: Tensor | None) -> Tensor | None:
    """u = (m * x) A^T of all projections, [T, sum r]; None without LoRA."""
    if A is None:
        return None
    if group.seed is None:
        return torch.mm(x, A.t())
    u = x.new_zeros(x.shape[0], group.layout.total_rank)
    for mask, columns in zip(dropout_masks(group, x), group.layout.columns, strict=True):
        torch.mm(x if mask is None else x * mask, A[columns].t(), out=u[:, columns])
    return u


def input_grad(dy: Tensor, v: Tensor | None, group: Group, A: Tensor | None) -> Tensor:
    """dx [T, K] from dy [T, sum N] and v = dy B [T, sum r]; v and A are None without LoRA."""
    gemm = lora_gemm if dy.is_cuda else lora_gemm_eager
    masked = group.seed is not None
    lora = (None, None) if masked else (v, A)
    weights = decoded_beside_products(dy, group, lora, backward=True)
    if weights is not None:
        dx = nf4_gemm_group.nf4_input_grad_group(dy, weights, lora_dy=lora[0], lora_A=lora[1])
    else:
        (weight, rows), *others = dense_blocks(group, dy)
        dx = gemm.linear_input_grad(dy[:, rows] if others else dy, weight, lora_dy=lora[0], lora_A=lora[1])
        for weight, rows in others:
            dx.addmm_(dy[:, rows], weight)
    if masked:
        assert v is not None
        assert A is not None
        for mask, columns in zip(dropout_masks(group, dx), group.layout.columns, strict=True):
            if mask is None:
                dx.addmm_(v[:, columns], A[columns])
            else:
                dx.addcmul_(torch.mm(v[:, columns], A[columns]), mask)
    return dx


def v_and_dB(dy: Tensor, B: Tensor | None, u: Tensor | None, group: Group) -> tuple[Tensor | None, Tensor | None]:
    """v = dy B [T, sum r]; and dy^T u [sum N, sum r] where one pass over dy makes both, else None.

    Args:
        dy: [T, sum N].
        B: as `joined_factors` makes it, or None if v is not wanted.
        u: as `lora_input` made it, or None if no dB is wanted.
    """
    if B is None:
        return None, None
    out_features, ranks = group.layout.out_features, group.layout.ranks
    if u is not None and dy.is_cuda and lora_grads.takes_one_pass(dy, B, u, out_features=out_features, ranks=ranks):
        return lora_grads.v_and_dB(dy, B, u, out_features=out_features, ranks=ranks)
    return torch.mm(dy, B), None


def joined_dA(v: Tensor | None, source: Source, group: Group) -> JoinedA | None:
    """v^T (m * x) of all projections, [sum r, K], from v [T, sum r] and what tells x; None without v."""
    if v is None:
        return None
    if group.seed is None:
        return source.times(v)
    x = source.input()
    dA = torch.zeros(v.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for mask, columns in zip(dropout_masks(group, x), group.layout.columns, strict=True):
        if columns.start < columns.stop:
            dA[columns] = transposed_product(v[:, columns], x if mask is None else x * mask)
    return JoinedA(dA)


def factor_grads(
    dy: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    source: Source,
    group: Group,
    *,
    dA: JoinedA | None = None,
    dB: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA_i and dB_i of all projections, each in its factor's dtype; None for a projection without LoRA.

    Args:
        dy: [T, sum N].
        u: as `lora_input` made it, or None if no dB is wanted.
        v: dy B, or None if no dA is wanted.
        source: what tells x; not asked where v is None or `dA` is given.
        dA: v^T x, if another pass over x has summed it already; overwritten.
        dB: dy^T u, if another pass over dy has summed it already.
    """
    layout: dict[str, Any] = {
        "out_features": group.layout.out_features,
        "ranks": group.layout.ranks,
        "scalings": group.scalings,
    }
    h, dy_of_B = None if v is None else source.base, None if u is None else dy
    if dA is None and dB is None and in_one_launch(h, dy_of_B, group):
        every_dA, every_dB = lora_grads_few.factor_grads(
            h, v, dy_of_B, u, rstd=source.rstd, scale=source.scale, **layout
        )
    else:
        dA = joined_dA(v, source, group) if dA is None else dA
        dB = transposed_product(dy, u) if dB is None and u is not None else dB
        ops = lora_grads if dy.is_cuda else lora_grads_eager
        joined, scale = (None, None) if dA is None else dA
        every_dA, every_dB = ops.grads_apart(joined, dB, scale=scale, **layout)
    return _in_dtypes(every_dA, group.A_dtypes), _in_dtypes(every_dB, group.B_dtypes)


def in_one_launch(h: Tensor | None, dy: Tensor | None, group: Group) -> bool:
    """Whether one kernel makes dA, from h, and dB, from dy, because the tokens are few; either may be None."""
    wide = h if dy is None else dy
    if wide is None or not wide.is_cuda or group.seed is not None:
        return False
    return lora_grads_few.takes_one_launch(h, dy, ranks=group.layout.ranks)


def bias_grads(dy: Tensor, group: Group, wanted: Sequence[bool]) -> list[Tensor | None]:
    """db_i, each in its bias's dtype; None where it is not `wanted`."""
    if not any(wanted):
        return [None] * len(wanted)
    summed = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return [
        summed[rows].to(dtype) if need and dtype is not None else None
        for need, dtype, rows in zip(wanted, group.bias_dtypes, group.layout.rows, strict=True)
    ]


def _in_dtypes(grads: Sequence[Tensor | None], dtypes: Dtypes) -> list[Tensor | None]:
    return [None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True)]
