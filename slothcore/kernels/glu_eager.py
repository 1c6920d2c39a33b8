"""Gated linear unit in plain torch: the same functions as `glu`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded where the fused kernels round.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.kernels.lora_grads_eager import transposed_product

Activation = Literal["silu", "gelu_pytorch_tanh"]


def glu_forward(gate_up: Tensor, *, activation: Activation, early: bool = False) -> Tensor:
    """`f(gate) * up` for gate_up [T, 2 I], the gate in the first half of a row. Returns [T, I]."""
    gate, up = halves(gate_up)
    return (activate(gate, activation).to(gate_up.dtype) * up).to(gate_up.dtype)


def glu_backward(
    dy: Tensor, gate_up: Tensor, *, activation: Activation, inplace: bool = False, output: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradient [T, 2 I] of `glu_forward` against dy [T, I] (over `gate_up` itself if `inplace`), and y or None."""
    gate, up = halves(gate_up)
    wide_dy = dy.to(gate.dtype)
    activated = activate(gate, activation).to(gate_up.dtype)
    y = (activated * up).to(gate_up.dtype) if output else None
    d_gate_up = torch.cat((wide_dy * up * slope_of(gate, activation), wide_dy * activated), dim=-1).to(gate_up.dtype)
    return (gate_up.copy_(d_gate_up) if inplace else d_gate_up), y


def glu_backward_and_dA(
    dy: Tensor, gate_up: Tensor, v: Tensor, *, activation: Activation, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient [T, 2 I] of `glu_forward` as `glu_backward` gives it, and dA = v^T y [R, I] for v [T, R]."""
    d_gate_up, y = glu_backward(dy, gate_up, activation=activation, inplace=inplace)
    assert y is not None
    return d_gate_up, transposed_product(v, y)


def halves(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up [T, I] of gate_up [T, 2 I], in at least float32."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, up


def activate(gate: Tensor, activation: Activation) -> Tensor:
    """f(gate)."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def slope_of(gate: Tensor, activation: Activation) -> Tensor:
    """f'(gate), with f(g) = g * sigmoid(t(g)); see `glu` for t."""
    if activation == "silu":
        sigmoid, slope_t = torch.sigmoid(gate), torch.ones_like(gate)
    else:
        scale = math.sqrt(2 / math.pi)
        sigmoid = torch.sigmoid(2 * scale * (gate + 0.044715 * gate**3))
        slope_t = 2 * scale * (1 + 3 * 0.044715 * gate**2)
    return sigmoid + gate * sigmoid * (1 - sigmoid) * slope_t
