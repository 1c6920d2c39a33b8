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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from slothcore.autograd.lora_group import Dtypes, Group, dense_blocks, dropout_masks, joined_bias
from slothcore.kernels import lora_gemm, lora_gemm_eager, nf4_gemm
from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor

# Up to this many rows the NF4 weight is decoded inside the matrix product; above, once into a scratch tile.
NF4_IN_KERNEL_ROWS = 256


def project(x: Tensor, group: Group, A: Tensor | None, B: Tensor | None, bias: Factors) -> tuple[Tensor, Tensor | None]:
    """All projections of x, side by side.

    Args:
        x: [T, K].
        A, B: [sum r, K] and [sum N, sum r] as `joined_factors` makes them; None without LoRA.
        bias: one entry for each projection, None where it has none.
    Returns: y [T, sum N] and u [T, sum r] (padded; None without LoRA).
    """
    u = None if A is None else lora_input(x, group, A)
    b = joined_bias(bias, group, x)
    linear, blocks = _linear_and_blocks(x, group)
    if len(blocks) == 1:
        return linear(x, blocks[0][0], lora_x=u, lora_B=B, bias=b), u
    y = x.new_empty(x.shape[0], group.layout.outputs.stop)
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
    few = x.is_cuda and x.shape[0] <= NF4_IN_KERNEL_ROWS and x.shape[1] % BLOCK == 0
    return few and all(isinstance(w, Nf4Tensor) for w in group.weights)


def lora_input(x: Tensor, group: Group, A: Tensor) -> Tensor:
    """u = (m * x) A^T of all projections, [T, sum r]."""
    if group.seed is None:
        return torch.mm(x, A.t())
    u = x.new_zeros(x.shape[0], group.layout.ranks)
    for mask, columns in zip(dropout_masks(group, x), group.layout.columns, strict=True):
        torch.mm(x if mask is None else x * mask, A[columns].t(), out=u[:, columns])
    return u


def input_grad(dy: Tensor, v: Tensor | None, group: Group, A: Tensor | None) -> Tensor:
    """dx [T, K] from dy [T, sum N] and v = dy B [T, sum r]; v and A are None without LoRA."""
    gemm = lora_gemm if dy.is_cuda else lora_gemm_eager
    masked = group.seed is not None
    lora = (None, None) if masked else (v, A)
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


def factor_grads(
    dy: Tensor, x: Tensor, u: Tensor | None, v: Tensor | None, group: Group
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA_i and dB_i of all projections, each in its factor's dtype; None for a projection without LoRA.

    Args:
        dy: [T, sum N].
        x: [T, K], the shared input; read only if `v` is given.
        u: [T, sum r] as `project` returned it, or None if no dB is wanted.
        v: dy B [T, sum r], or None if no dA is wanted.
    """
    _, rows, columns, _ = group.layout
    dA: list[Tensor | None] = [None] * len(rows)
    dB: list[Tensor | None] = [None] * len(rows)
    if v is not None and group.seed is None:
        every_dA = transposed_product(v, x, group.A_dtypes)
        for i, dtype in enumerate(group.A_dtypes):
            if dtype is not None:
                dA[i] = every_dA[columns[i]].to(dtype)
    elif v is not None:
        for i, mask in enumerate(dropout_masks(group, x)):
            dtype = group.A_dtypes[i]
            if dtype is not None:
                hidden = x if mask is None else x * mask
                dA[i] = transposed_product(v[:, columns[i]], hidden, group.A_dtypes).to(dtype)
    if u is not None:
        every_dB = transposed_product(dy, u, group.B_dtypes)
        for i, dtype in enumerate(group.B_dtypes):
            if dtype is not None:
                # Scaling makes the contiguous copy that a parameter's gradient has to be anyway.
                block, scaling = every_dB[rows[i], columns[i]], group.scalings[i]
                dB[i] = (block if scaling == 1.0 else block * scaling).to(dtype)
    return dA, dB


def bias_grads(dy: Tensor, group: Group, wanted: Sequence[bool]) -> list[Tensor | None]:
    """db_i, each in its bias's dtype; None where it is not `wanted`."""
    if not any(wanted):
        return [None] * len(wanted)
    summed = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
    return [
        summed[rows].to(dtype) if need and dtype is not None else None
        for need, dtype, rows in zip(wanted, group.bias_dtypes, group.layout.rows, strict=True)
    ]


def transposed_product(left: Tensor, right: Tensor, dtypes: Dtypes) -> Tensor:
    """left^T right, kept in the float32 of its sums if the product is 16-bit and a gradient is wanted in float32."""
    if left.dtype.itemsize != 2 or torch.float32 not in dtypes:
        return torch.mm(left.t(), right)
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.mm(left.t().float(), right.float())
