"""Gated linear unit of routed rows in plain torch: the same functions as `expert_glu`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded where the fused kernels round.
"""

import torch
from torch import Tensor

from slothcore.kernels.glu_eager import Activation, activate, halves, slope_of


def expert_glu_forward(gate_up: Tensor, weights: Tensor, order: Tensor, *, activation: Activation) -> Tensor:
    """`weights[order] * f(gate) * up` for gate_up [M, 2 I], weights and order [M]. Returns [M, I]."""
    gate, up = halves(gate_up)
    weight = weights.to(gate.dtype)[order, None]
    return (activate(gate, activation).to(gate_up.dtype) * up * weight).to(gate_up.dtype)


def expert_glu_backward(
    ds: Tensor, gate_up: Tensor, weights: Tensor, order: Tensor, *, activation: Activation, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `expert_glu_forward` against ds [M, I], and its output once more.

    Returns: d_gate_up [M, 2 I], which is `gate_up` if `inplace`; d_weights [M] in the order of the pairs; s [M, I].
    """
    gate, up = halves(gate_up)
    weight, wide_ds = weights.to(gate.dtype)[order, None], ds.to(gate.dtype)
    activated = activate(gate, activation).to(gate_up.dtype)
    h, dh = activated * up, wide_ds * weight
    d_weights = torch.empty_like(weights)
    d_weights[order] = (wide_ds * h).sum(dim=-1).to(weights.dtype)
    s = (h * weight).to(gate_up.dtype)
    d_gate_up = torch.cat((dh * up * slope_of(gate, activation), dh * activated), dim=-1).to(gate_up.dtype)
    return (gate_up.copy_(d_gate_up) if inplace else d_gate_up), d_weights, s
