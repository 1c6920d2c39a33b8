"""DoRA's gated linear unit in plain torch: the same functions as `dora_glu`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded where the fused kernels round.
"""

import torch
from torch import Tensor

from slothcore.kernels.dora_scale_eager import wide_dtype
from slothcore.kernels.glu_eager import Activation, activate, halves, slope_of


def dora_glu_forward(z: Tensor, scale: Tensor, bias: Tensor | None, *, activation: Activation) -> Tensor:
    """h = f(gate) * up [T, I] with [gate | up] = scale * z + bias, for z [T, 2 I], scale and bias [2 I]."""
    gate, up = halves(_gate_up(z, scale, bias))
    return (activate(gate, activation).to(z.dtype) * up).to(z.dtype)


def dora_glu_backward(
    dh: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation,
    inplace: bool = False,
    output: bool = True,
    scale_grad: bool = True,
    bias_grad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz [T, 2 I] (over `z` itself if `inplace`); h [T, I], dc [2 I] and db [2 I], or None where not wanted."""
    gate, up = halves(_gate_up(z, scale, bias))
    wide_dh = dh.to(gate.dtype)
    activated = activate(gate, activation).to(z.dtype)
    h = (activated * up).to(z.dtype) if output else None
    d_gate_up = torch.cat((wide_dh * up * slope_of(gate, activation), wide_dh * activated), dim=-1)
    dc = (d_gate_up * z).sum(0) if scale_grad else None
    db = d_gate_up.sum(0) if bias_grad else None
    dz = (d_gate_up * scale).to(z.dtype)
    return z.copy_(dz) if inplace else dz, h, dc, db


def _gate_up(z: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    gate_up = z.to(wide_dtype(z)) * scale
    return gate_up if bias is None else gate_up.add_(bias)
