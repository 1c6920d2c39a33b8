"""Linear maps that share one input, each a frozen base with a LoRA term: forward and backward as plain functions.

The Functions in `lora.py` are compositions of what stands here; nothing in this file touches autograd. How the factors
of several projections are joined stands in `lora_group.py`.

Forward   y_i  = x W_i^T + c_i (m_i * x) A_i^T B_i^T + b_i,     c_i = scaling_i / (1 - p_i)
Backward  with v_i = c_i dy_i B_i and u_i = (m_i * x) A_i^T
          dx   = sum_i dy_i W_i + m_i * (v_i A_i)
          dA_i = v_i^T (m_i * x),   dB_i = c_i dy_i^T u_i,   db_i = sum over tokens of dy_i
Side by side: with y = [y_1 | y_2 | ..], A = [A_1; A_2; ..] and the block-diagonal B = diag(c_i B_i), each line above is
one matrix product over all projections: u = x A^T, v = dy B, and dA = v^T x. The zeros of B cost nothing that is felt,
because these products are bound by reading x and dy.

Shapes    x [T, K]; y_i, dy_i [T, N_i]; W_i [N_i, K]; A_i [r_i, K]; B_i [N_i, r_i]; b_i [N_i]; m_i [T, K] of 0 and 1.
          T = tokens, K = in_features, N_i = out_features, r_i = rank, p_i = dropout probability.
Dtypes    x, y and dense W share one dtype, the compute dtype. Factors may be wider: they are rounded to the compute
          dtype once, and their gradients have their own dtype, summed in float32.
Source    Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slothcore.autograd.lora_group import (
    Factors,
    Group,
    block_diagonal_B,
    dense_blocks,
    dropout_masks,
    joined_bias,
    present,
    stacked_A,
)
from slothcore.kernels import lora_gemm, lora_gemm_eager, nf4_gemm
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor

# Up to this many rows the NF4 weight is decoded inside the matrix product; above, once into a scratch tile.
NF4_IN_KERNEL_ROWS = 256


def project(x: Tensor, group: Group, lora_A: Factors, lora_B: Factors, bias: Factors) -> tuple[Tensor, Tensor | None]:
    """All projections of x, side by side.

    Args:
        x: [T, K].
        lora_A, lora_B, bias: one entry for each projection, None where it has none.
    Returns: y [T, sum N] and u [T, sum r] (padded; None without LoRA).
    """
    gemm = lora_gemm if x.is_cuda else lora_gemm_eager
    B = block_diagonal_B(group, lora_B, x)
    u = lora_input(x, group, lora_A)
    y = x.new_empty(x.shape[0], group.out_features)
    b = joined_bias(bias, group, x)
    in_kernel = decodes_in_kernel(x, group)
    linear: Callable[..., Tensor] = nf4_gemm.nf4_linear if in_kernel else gemm.linear_add
    blocks = zip(group.weights, group.rows, strict=True) if in_kernel else dense_blocks(group, x)
    for weight, rows in blocks:
        linear(
            x,
            weight,
            lora_x=u,
            lora_B=None if B is None else B[rows],
            bias=None if b is None else b[rows],
            out=y[:, rows],
        )
    return y, u


def decodes_in_kernel(x: Tensor, group: Group) -> bool:
    """Whether x has so few rows that decoding a weight costs more than multiplying by it."""
    few = x.is_cuda and x.shape[0] <= NF4_IN_KERNEL_ROWS and x.shape[1] % BLOCK == 0
    return few and all(isinstance(w, Nf4Tensor) for w in group.weights)


def lora_input(x: Tensor, group: Group, lora_A: Factors) -> Tensor | None:
    """u = (m * x) A^T of all projections, [T, sum r]; None without LoRA."""
    A = stacked_A(group, lora_A, x)
    if A is None:
        return None
    if group.seed is None:
        return torch.mm(x, A.t())
    u = x.new_zeros(x.shape[0], group.ranks)
    for mask, columns in zip(dropout_masks(group, x), group.columns, strict=True):
        torch.mm(x if mask is None else x * mask, A[columns].t(), out=u[:, columns])
    return u


def lora_output_grad(dy: Tensor, group: Group, lora_B: Factors) -> Tensor | None:
    """v = dy B of all projections, [T, sum r]; None without LoRA."""
    B = block_diagonal_B(group, lora_B, dy)
    return None if B is None else torch.mm(dy, B)


def input_grad(dy: Tensor, v: Tensor | None, group: Group, lora_A: Factors) -> Tensor:
    """dx [T, K] from dy [T, sum N] and v of `lora_output_grad`."""
    gemm = lora_gemm if dy.is_cuda else lora_gemm_eager
    A = stacked_A(group, lora_A, dy)
    masked = group.seed is not None
    (weight, rows), *others = dense_blocks(group, dy)
    dx = gemm.linear_input_grad(dy[:, rows], weight, lora_dy=None if masked else v, lora_A=None if masked else A)
    for weight, rows in others:
        dx.addmm_(dy[:, rows], weight)
    if masked:
        assert v is not None
        assert A is not None
        for mask, columns in zip(dropout_masks(group, dx), group.columns, strict=True):
            if mask is None:
                dx.addmm_(v[:, columns], A[columns])
            else:
                dx.addcmul_(torch.mm(v[:, columns], A[columns]), mask)
    return dx


def factor_grads(
    dy: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, group: Group, lora_A: Factors, lora_B: Factors
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA_i and dB_i of all projections, each in its factor's dtype; None for a projection without LoRA.

    Args:
        dy: [T, sum N].
        x: [T, K], the shared input; read only if `v` is given.
        u: [T, sum r] as `project` returned it, or None if no dB is wanted.
        v: [T, sum r] as `lora_output_grad` returned it, or None if no dA is wanted.
    """
    dA: list[Tensor | None] = [None] * len(lora_A)
    dB: list[Tensor | None] = [None] * len(lora_B)
    if v is not None and group.seed is None:
        every_dA = transposed_product(v, x, lora_A)
        dA = [None if A is None else every_dA[c].to(A.dtype) for A, c in zip(lora_A, group.columns, strict=True)]
    elif v is not None:
        for i, mask in enumerate(dropout_masks(group, x)):
            A = lora_A[i]
            if A is not None:
                hidden = x if mask is None else x * mask
                dA[i] = transposed_product(v[:, group.columns[i]], hidden, lora_A).to(A.dtype)
    if u is not None:
        every_dB = transposed_product(dy, u, lora_B)
        for i, (B, scaling) in enumerate(zip(lora_B, group.scalings, strict=True)):
            if B is not None:
                block = every_dB[group.rows[i], group.columns[i]]
                dB[i] = (block if scaling == 1.0 else block * scaling).to(B.dtype)
    return dA, dB


def bias_grads(dy: Tensor, group: Group, bias: Factors) -> list[Tensor | None]:
    """db_i, each in its bias's dtype; None where there is no bias or it is frozen."""
    if not any(b is not None and b.requires_grad for b in bias):
        return [None] * len(bias)
    summed = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return [
        summed[rows].to(b.dtype) if b is not None and b.requires_grad else None
        for b, rows in zip(bias, group.rows, strict=True)
    ]


def transposed_product(left: Tensor, right: Tensor, factors: Factors) -> Tensor:
    """left^T right, kept in the float32 of its sums if the product is 16-bit and a factor is float32."""
    wide = left.dtype.itemsize == 2 and any(f.dtype == torch.float32 for f in present(factors))
    if wide and left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.mm(left.t().float(), right.float()) if wide else torch.mm(left.t(), right)
