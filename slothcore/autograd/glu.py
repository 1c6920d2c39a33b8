"""Gated linear unit with a hand-derived backward; the derivation stands in `slothcore.kernels.glu`.

Saved for backward: gate_up alone; the activation is computed again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import glu as fused
from slothcore.kernels import glu_eager as eager
from slothcore.kernels.glu_eager import Activation


class GatedUnit(Function):
    """y = f(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation, inplace: bool) -> Tensor:
        ops = fused if gate_up.is_cuda else eager
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.inplace = activation, inplace
        return ops.glu_forward(gate_up, activation=activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        ops = fused if gate_up.is_cuda else eager
        d_gate_up, _ = ops.glu_backward(dy, gate_up, activation=ctx.activation, inplace=ctx.inplace, output=False)
        if ctx.inplace:
            # torch does not see what a Triton kernel writes; once told, it refuses a second backward.
            torch.autograd.graph.increment_version(gate_up)
        return d_gate_up, None, None


def glu(gate_up: Tensor, *, activation: Activation, inplace: bool = False) -> Tensor:
    """Multiply the activated gate by the linear branch.

    Args:
        gate_up: [T, 2 I], the gate in the first half of each row.
        activation: "silu" or "gelu_pytorch_tanh".
        inplace: let backward overwrite `gate_up` with its gradient. A second backward then raises RuntimeError, as
            does any other operation that saved `gate_up`.
    Returns: [T, I].
    Source: Shazeer 2020, arXiv:2002.05202.
    """
    return GatedUnit.apply(gate_up, activation, inplace)
