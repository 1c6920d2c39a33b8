"""LoRA over frozen linear maps: one linear, several over one input, and the whole gated MLP.

The equations of one group of projections (forward, dx, dA, dB, db) stand in `lora_projection.py`. The gated MLP is

    [g | u] = x [W_g; W_u]^T + LoRA        h = act(g) * u        y = h W_d^T + LoRA
    dh = dy W_d + LoRA                     [dg | du], h = glu_backward(dh, [g | u])
    dx = [dg | du] [W_g; W_u] + LoRA       the factors' gradients from (dy, h) and ([dg | du], x)

so the backward recomputes h instead of keeping it. Gate and up are two projections, or one whose rows are those of the
gate and then those of up (Phi-3).

Kept for backward: x, and x A^T of every projection, the factors joined in the compute dtype, and for the MLP [g | u].
Never kept: a decoded NF4 weight, a dropout mask, h. What only a frozen factor or input would need is neither kept nor
computed. The joined factors have sum r (K + sum N) elements, as many as 1% of the activations of 8192 tokens.

Shapes    x [T, H]; y [T, sum of out_features]; g, u, h [T, I].
          T = tokens, H = in_features, I = intermediate_size.
Source    Hu et al. 2021, arXiv:2106.09685; the recomputation of h follows Chen et al. 2016, arXiv:1604.06174.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.autocast import check_autocast
from slothcore.autograd.first_order import once_differentiable
from slothcore.autograd.lora_group import Group, Projection, joined_factors
from slothcore.autograd.lora_projection import bias_grads, factor_grads, input_grad, project
from slothcore.kernels import glu, glu_eager
from slothcore.kernels.glu import Activation

__all__ = ["Projection", "lora_fused", "lora_linear", "lora_mlp"]


def lora_linear(x: Tensor, projection: Projection) -> Tensor:
    """y = x W^T + scaling * dropout(x) A^T B^T + bias for one frozen W.

    Args:
        x: [T, in], in the compute dtype.
        projection: the weight with its LoRA term.
    Returns: [T, out] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    return lora_fused(x, (projection,))


def lora_fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """Several projections of one input, such as q/k/v, their outputs side by side.

    Args:
        x: [T, in], in the compute dtype.
        projections: at least one; each has its own dropout mask.
    Returns: [T, sum of out_features] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    _check(x, projections)
    return _LoraFused.apply(x, *_factors(projections), Group.of(projections))


def lora_mlp(
    x: Tensor, gate_up: Sequence[Projection], down: Projection, *, activation: Activation, inplace: bool = True
) -> Tensor:
    """down(act(gate(x)) * up(x)) over frozen weights.

    Args:
        x: [T, H], in the compute dtype.
        gate_up: gate and up, [I, H] each; or one projection [2I, H] that holds the rows of both, in this order.
        down: [H, I].
        activation: of the gate.
        inplace: let backward overwrite the kept gate and up with their gradient, which saves [T, 2I]; a second backward
            through the same graph then raises.
    Returns: [T, H] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    _check(x, gate_up)
    _check_dtype(x, (down,))
    rows = [p.weight.shape[0] for p in gate_up]
    if len(rows) > 2 or len(set(rows)) != 1 or 2 * down.weight.shape[1] != sum(rows):
        shapes = [tuple(p.weight.shape) for p in (*gate_up, down)]
        raise ValueError(f"gate and up must have the out_features that down takes; got weights {shapes}")
    groups = Group.of(gate_up), Group.of((down,))
    return _LoraMlp.apply(x, *_factors((*gate_up, down)), *groups, activation, inplace)


class _LoraFused(torch.autograd.Function):
    """A group of projections; the equations stand at the top of `lora_projection.py`.

    Inputs: x; every lora_A, every lora_B, every bias (None where absent); then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, group = inputs
        lora_A, lora_B, bias = _by_kind(factors)
        A, B = joined_factors(group, lora_A, lora_B, x)
        y, u = project(x, group, A, B, bias)
        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _ = (any(kind) for kind in _by_kind(ctx.needs_input_grad[1:-1]))
        ctx.group = group
        ctx.save_for_backward(
            x if needs_A else None,
            u if needs_B else None,
            A if needs_x else None,
            B if needs_x or needs_A else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B = ctx.saved_tensors
        v = None if B is None else torch.mm(dy, B)
        dx = input_grad(dy, v, ctx.group, A) if ctx.needs_input_grad[0] else None
        dA, dB = factor_grads(dy, x, u, None if x is None else v, ctx.group)
        _, _, needs_bias = _by_kind(ctx.needs_input_grad[1:-1])
        return dx, *dA, *dB, *bias_grads(dy, ctx.group, needs_bias), None


class _LoraMlp(torch.autograd.Function):
    """The gated MLP; the equations stand at the top of this file.

    Inputs: x; every lora_A, every lora_B, every bias of (gate, up, down) or (gate_up, down); then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, first, last, activation, inplace = inputs
        lora_A, lora_B, bias = _by_kind(factors)
        ops = glu if x.is_cuda else glu_eager
        A, B = joined_factors(first, lora_A[:-1], lora_B[:-1], x)
        gate_up, u = project(x, first, A, B, bias[:-1])
        h = ops.glu_forward(gate_up, activation=activation)
        A_down, B_down = joined_factors(last, lora_A[-1:], lora_B[-1:], x)
        y, u_down = project(h, last, A_down, B_down, bias[-1:])

        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _ = _by_kind(ctx.needs_input_grad[1:-4])
        needs_first_A, needs_first_B = any(needs_A[:-1]), any(needs_B[:-1])
        ctx.first, ctx.last, ctx.activation, ctx.inplace = first, last, activation, inplace
        ctx.needs_down_A = needs_A[-1]
        ctx.save_for_backward(
            x if needs_first_A else None,
            u if needs_first_B else None,
            u_down if needs_B[-1] else None,
            gate_up,
            A if needs_x else None,
            B if needs_x or needs_first_A else None,
            A_down,
            B_down,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, u_down, gate_up, A, B, A_down, B_down = ctx.saved_tensors
        ops = glu if dy.is_cuda else glu_eager
        _, _, needs_bias = _by_kind(ctx.needs_input_grad[1:-4])

        v_down = None if B_down is None else torch.mm(dy, B_down)
        dh = input_grad(dy, v_down, ctx.last, A_down)
        d_gate_up, h = ops.glu_backward(dh, gate_up, activation=ctx.activation, inplace=ctx.inplace)
        if ctx.inplace:
            # A kernel's writes are invisible to autograd; this makes a second backward raise instead of lie.
            torch.autograd.graph.increment_version(gate_up)
        dA_down, dB_down = factor_grads(dy, h, u_down, v_down if ctx.needs_down_A else None, ctx.last)
        db_down = bias_grads(dy, ctx.last, needs_bias[-1:])
        del dh, h

        v = None if B is None else torch.mm(d_gate_up, B)
        dA, dB = factor_grads(d_gate_up, x, u, None if x is None else v, ctx.first)
        db = bias_grads(d_gate_up, ctx.first, needs_bias[:-1])
        dx = input_grad(d_gate_up, v, ctx.first, A) if ctx.needs_input_grad[0] else None
        return dx, *dA, *dA_down, *dB, *dB_down, *db, *db_down, None, None, None, None


def _factors(projections: Sequence[Projection]) -> list[Tensor | None]:
    """Every lora_A, then every lora_B, then every bias."""
    return [
        *(p.lora_A for p in projections),
        *(p.lora_B for p in projections),
        *(p.bias for p in projections),
    ]


def _by_kind(factors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Undo `_factors`: (lora_A, lora_B, bias), each with one entry for each projection."""
    n = len(factors) // 3
    return factors[:n], factors[n : 2 * n], factors[2 * n :]


def _check(x: Tensor, projections: Sequence[Projection]) -> None:
    """Raise ValueError unless x fits every weight."""
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, in_features], got shape {tuple(x.shape)}")
    for projection in projections:
        if projection.weight.shape[1] != x.shape[1]:
            shape = tuple(projection.weight.shape)
            raise ValueError(f"x has {x.shape[1]} features, but the weight is {shape} (out, in)")
    _check_dtype(x, projections)


def _check_dtype(x: Tensor, projections: Sequence[Projection]) -> None:
    """Raise ValueError unless every dense weight has x's dtype; NF4 is decoded in it, and autocast must not object."""
    check_autocast(x)
    for projection in projections:
        weight = projection.weight
        if isinstance(weight, Tensor) and weight.dtype != x.dtype:
            raise ValueError(f"x is {x.dtype} but the weight is {weight.dtype}; cast x to the model's dtype")
