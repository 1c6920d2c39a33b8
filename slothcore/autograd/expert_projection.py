"""Routed experts' linear maps with their LoRA terms: forward and backward as plain functions over sorted rows.

The Function in `experts.py` is a composition of what stands here; nothing in this file touches autograd. For every row
i of expert e, and a projection with weight W, factors A and B, scaling c and dropout mask m (c holds the 1 / (1 - p)):

Forward   y_i  = x_i W_e^T + c u_i B_e^T,   u_i = (m_i * x_i) A_e^T
Backward  dx_i = dy_i W_e + m_i * (v_i A_e),   v_i = c dy_i B_e
          dA_e = sum_i v_i^T (m_i * x_i),   dB_e = c sum_i dy_i^T u_i,   dW_e = sum_i dy_i^T x_i    over the rows of e

Shapes    x, m [M, K]; y, dy [M, N]; u, v [M, r]; W [E, N, K]; A [E, r, K]; B [E, N, r]; offsets [E + 1].
          M = rows, E = experts, K = in_features, N = out_features, r = rank, p = dropout probability.
Dtypes    x, y and dense W share one dtype, the compute dtype. Factors may be wider: they are rounded to the compute
          dtype once, and their gradients have their own dtype, summed in float32.
Source    Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.kernels import grouped_gemm, grouped_gemm_eager
from slothcore.kernels.nf4_experts import Nf4Experts


@dataclass(frozen=True)
class ExpertProjection:
    """One linear map of every expert, with an optional LoRA term: y = x W_e^T + scaling * dropout(x) A_e^T B_e^T.

    Attributes:
        weight: [E, out, in], dense in the compute dtype (it may require a gradient) or NF4.
        lora_A: [E, r, in], float32 or the compute dtype; None for no LoRA term.
        lora_B: [E, out, r]; None exactly if `lora_A` is.
        scaling: lora_alpha / r, or what the user chose.
        dropout: probability that an element of x is hidden from the LoRA term; 0 in evaluation.
    """

    weight: Tensor | Nf4Experts
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if (self.lora_A is None) != (self.lora_B is None):
            raise ValueError("a LoRA term needs both lora_A and lora_B; one of them is None")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"LoRA dropout must be at least 0 and below 1, got {self.dropout}")
        if self.lora_A is None or self.lora_B is None:
            return
        experts, out_features, in_features = self.weight.shape
        rank = self.lora_A.shape[-2]
        shapes = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        if shapes != ((experts, rank, in_features), (experts, out_features, rank)):
            raise ValueError(
                f"LoRA factors of experts {tuple(self.weight.shape)} must be [E, r, in] and [E, out, r], got {shapes}"
            )


class Operands(NamedTuple):
    """A projection as the products take it; a LoRA term that is absent is None.

    Attributes:
        weight: [E, N, K], dense or NF4.
        A: [E, r, K] in the compute dtype.
        B: [E, N, r] in the compute dtype, times `scaling`.
        scaling: c.
        dropout: p; 0 without a LoRA term.
        seed: of the dropout mask.
    """

    weight: Tensor | Nf4Experts
    A: Tensor | None
    B: Tensor | None
    scaling: float
    dropout: float
    seed: int


class Wanted(NamedTuple):
    """Which gradients of a projection's tensors are wanted."""

    weight: bool
    lora_A: bool
    lora_B: bool


def ops_for(x: Tensor) -> ModuleType:
    return grouped_gemm if x.is_cuda else grouped_gemm_eager


def scaled_factor(lora_B: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """scaling * lora_B, rounded to `dtype` once."""
    if scaling == 1.0:
        return lora_B.to(dtype)
    wide = torch.promote_types(lora_B.dtype, dtype)
    if wide == lora_B.dtype:
        return torch.mul(lora_B, scaling, out=torch.empty(lora_B.shape, dtype=dtype, device=lora_B.device))
    # torch would round the product to the factor's own dtype first.
    return (lora_B.to(wide) * scaling).to(dtype)


def dropout_mask(like: Tensor, operands: Operands) -> Tensor:
    """m, of 0 and 1 and shaped as `like`. The same operands give the same mask, so none outlives its line."""
    generator = torch.Generator(like.device).manual_seed(operands.seed)
    # Random numbers fill memory in order: rows and their gradient must not differ in their strides.
    mask = torch.empty_like(like, memory_format=torch.contiguous_format)
    return mask.bernoulli_(1.0 - operands.dropout, generator=generator)


def lora_inputs(rows: Tensor, offsets: Tensor, group: Sequence[Operands]) -> list[Tensor | None]:
    """u [M, r] of every projection of `rows`; None for one without a LoRA term.

    These products are bound by reading the rows, so one pass serves all projections that have no dropout.
    """
    ops = ops_for(rows)
    factors = [p.A for p in group if p.A is not None]
    if len(factors) > 1 and not any(p.dropout for p in group):
        joined = ops.grouped_linear(rows, torch.cat(factors, dim=1), offsets)
        parts = iter(joined.split([A.shape[1] for A in factors], dim=1))
        return [None if p.A is None else next(parts) for p in group]
    u: list[Tensor | None] = []
    for p in group:
        hidden = rows * dropout_mask(rows, p) if p.dropout else rows
        u.append(None if p.A is None else ops.grouped_linear(hidden, p.A, offsets))
    return u


def output_grad_times_B(dy: Tensor, operands: Operands, offsets: Tensor) -> Tensor | None:
    """v [M, r]; None without a LoRA term."""
    return None if operands.B is None else ops_for(dy).grouped_input_grad(dy, operands.B, offsets)


def input_grad(
    output_grads: Sequence[Tensor], v: Sequence[Tensor | None], group: Sequence[Operands], offsets: Tensor
) -> Tensor:
    """dx [M, K] of the rows that all projections share, from each one's dy [M, N] and v [M, r]."""
    ops = ops_for(output_grads[0])
    total: Tensor | None = None
    for dy, v_p, p in zip(output_grads, v, group, strict=True):
        lora = (None, None) if p.dropout else (v_p, p.A)
        total = ops.grouped_input_grad(dy, p.weight, offsets, lora_dy=lora[0], lora_A=lora[1], add_to=total)
        if p.dropout:
            total.addcmul_(ops.grouped_input_grad(v_p, p.A, offsets), dropout_mask(total, p))
    assert total is not None, "a group has at least one projection"
    return total


def parameter_grads(
    dy: Tensor,
    rows: Tensor | None,
    u: Tensor | None,
    v: Tensor | None,
    projection: ExpertProjection,
    operands: Operands,
    offsets: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dW, dA and dB in their parameters' dtypes; None for what is not `wanted`, whose inputs may then be None."""
    ops = ops_for(dy)
    dW = dA = dB = None
    if wanted.weight and isinstance(projection.weight, Tensor):
        dW = ops.grouped_outer(dy, rows, offsets, dtype=projection.weight.dtype)
    if wanted.lora_A and projection.lora_A is not None:
        assert rows is not None
        hidden = rows * dropout_mask(rows, operands) if operands.dropout else rows
        dA = ops.grouped_outer(v, hidden, offsets, dtype=projection.lora_A.dtype)
    if wanted.lora_B and projection.lora_B is not None:
        dB = ops.grouped_outer(dy, u, offsets, dtype=projection.lora_B.dtype, scaling=operands.scaling)
    return dW, dA, dB
