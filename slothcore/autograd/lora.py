"""LoRA over frozen linear maps: one linear, several over one input, and the whole gated MLP.

The equations of one group of projections (forward, dx, dA, dB, db) stand in `lora_projection.py`. The gated MLP is

    [g | u] = x [W_g; W_u]^T + LoRA        h = act(g) * u        y = h W_d^T + LoRA
    dh = dy W_d + LoRA                     [dg | du], h = glu_backward(dh, [g | u]), h for dA of down alone
    dx = [dg | du] [W_g; W_u] + LoRA       the factors' gradients from (dy, h) and ([dg | du], x)

so the backward recomputes h instead of keeping it. Gate and up are two projections, or one whose rows are those of the
gate and then those of up (Phi-3).

Projections with a magnitude go to `dora.py`, which composes the same functions; a few rows of which nothing needs a
gradient go to `lora_few.py`.

Kept for backward: x, and x A^T of every projection, the factors joined in the compute dtype, and for the MLP [g | u]
unless it is to be multiplied again. If x is the output of a norm, that norm's input and deviations are kept in its
place, which the norm keeps anyway: `lora_source.py`. Never kept: a decoded NF4 weight, a dropout mask, h. What only a
frozen factor or input would need is neither kept nor computed. The joined factors have sum r (K + sum N) elements, as
many as 1% of the activations of 8192 tokens.

Shapes    x [T, H]; y [T, sum of out_features]; g, u, h [T, I].
          T = tokens, H = in_features, I = intermediate_size.
Source    Hu et al. 2021, arXiv:2106.09685; the recomputations follow Chen et al. 2016, arXiv:1604.06174.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd import lora_few
from slothcore.autograd.autocast import check_autocast
from slothcore.autograd.dora import dora_fused, dora_mlp
from slothcore.autograd.first_order import once_differentiable
from slothcore.autograd.lora_group import (
    LORA_KINDS,
    Group,
    MlpChoices,
    Projection,
    by_kind,
    in_kinds,
    joined_bias,
    joined_factors,
)
from slothcore.autograd.lora_projection import (
    bias_grads,
    factor_grads,
    input_grad,
    lora_input,
    project,
    v_and_dB,
)
from slothcore.autograd.lora_source import JoinedA, Source
from slothcore.autograd.rms_norm import Normed
from slothcore.kernels import glu, glu_eager
from slothcore.kernels.glu import Activation

__all__ = ["Projection", "lora_fused", "lora_linear", "lora_mlp"]


def lora_linear(x: Tensor | Normed, projection: Projection) -> Tensor:
    """y = x W^T + scaling * dropout(x) A^T B^T + bias for one frozen W.

    Args:
        x: [T, in], in the compute dtype, or the norm that made it.
        projection: the weight with its LoRA term.
    Returns: [T, out] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    return lora_fused(x, (projection,))


def lora_fused(x: Tensor | Normed, projections: Sequence[Projection]) -> Tensor:
    """Several projections of one input, such as q/k/v, their outputs side by side.

    Args:
        x: [T, in], in the compute dtype; or the norm that made it, whose output then is not kept.
        projections: at least one; each has its own dropout mask.
    Returns: [T, sum of out_features] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    x, normed = _input(x)
    _check(x, projections)
    if lora_few.takes(x, projections):
        return lora_few.fused(x, projections, None if normed is None else normed.lora_input)
    if any(p.magnitude is not None for p in projections):
        return dora_fused(x, projections, normed)
    return _LoraFused.apply(x, *in_kinds(projections, LORA_KINDS), Group.of(projections), normed)


def lora_mlp(
    x: Tensor | Normed,
    gate_up: Sequence[Projection],
    down: Projection,
    *,
    activation: Activation,
    inplace: bool = True,
    keep_gate_up: bool = True,
) -> Tensor:
    """down(act(gate(x)) * up(x)) over frozen weights.

    Args:
        x: [T, H], in the compute dtype; or the norm that made it, whose output then is not kept.
        gate_up: gate and up, [I, H] each; or one projection [2I, H] that holds the rows of both, in this order.
        down: [H, I].
        activation: of the gate.
        inplace: let backward overwrite the kept gate and up with their gradient, which saves [T, 2I]; a second backward
            through the same graph then raises.
        keep_gate_up: keep gate and up [T, 2I] for backward, or multiply them again there. The result is the same; the
            projection down is not multiplied again.
    Returns: [T, H] in x's dtype.
    Raises: ValueError if shapes or dtypes do not fit.
    """
    x, normed = _input(x)
    _check(x, gate_up)
    _check_dtype(x, (down,))
    rows = [p.weight.shape[0] for p in gate_up]
    if len(rows) > 2 or len(set(rows)) != 1 or 2 * down.weight.shape[1] != sum(rows):
        shapes = [tuple(p.weight.shape) for p in (*gate_up, down)]
        raise ValueError(f"gate and up must have the out_features that down takes; got weights {shapes}")
    if lora_few.takes(x, gate_up):
        known = None if normed is None else normed.lora_input
        return lora_linear(lora_few.gated(x, gate_up, known, activation=activation), down)
    how = MlpChoices(activation, inplace, keep_gate_up)
    if any(p.magnitude is not None for p in (*gate_up, down)):
        return dora_mlp(x, gate_up, down, normed, how)
    groups = Group.of(gate_up), Group.of((down,))
    return _LoraMlp.apply(x, *in_kinds((*gate_up, down), LORA_KINDS), *groups, normed, how)


class _LoraFused(torch.autograd.Function):
    """A group of projections; the equations stand at the top of `lora_projection.py`.

    Inputs: x; every lora_A, every lora_B, every bias (None where absent); then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, group, normed = inputs
        lora_A, lora_B, bias = by_kind(factors, LORA_KINDS)
        A, B = joined_factors(group, lora_A, lora_B, x)
        u = lora_input(x, group, A)
        y = project(x, u, group, B, joined_bias(bias, group, x))

        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _ = (any(kind) for kind in by_kind(ctx.needs_input_grad[1:-2], LORA_KINDS))
        source = Source.of(x, normed) if needs_A else Source(None)
        ctx.group, ctx.rule, ctx.needs_A = group, source.rule, needs_A
        ctx.save_for_backward(
            *source.tensors,
            u if needs_B else None,
            A if needs_x else None,
            B if needs_x or needs_A else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *of_x, u, A, B = ctx.saved_tensors
        group = ctx.group
        _, _, needs_bias = by_kind(ctx.needs_input_grad[1:-2], LORA_KINDS)

        v, dB = v_and_dB(dy, B, u, group)
        dx = input_grad(dy, v, group, A) if ctx.needs_input_grad[0] else None
        source = Source.restored(of_x, ctx.rule)
        every_dA, every_dB = factor_grads(dy, u, v if ctx.needs_A else None, source, group, dB=dB)
        return dx, *every_dA, *every_dB, *bias_grads(dy, group, needs_bias), None, None


class _LoraMlp(torch.autograd.Function):
    """The gated MLP; the equations stand at the top of this file.

    Inputs: x; every lora_A, every lora_B, every bias of (gate, up, down) or (gate_up, down); then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, first, last, normed, how = inputs
        lora_A, lora_B, bias = by_kind(factors, LORA_KINDS)
        ops = glu if x.is_cuda else glu_eager
        A, B = joined_factors(first, lora_A[:-1], lora_B[:-1], x)
        b = joined_bias(bias[:-1], first, x)
        u = lora_input(x, first, A)
        gate_up = project(x, u, first, B, b)
        h = ops.glu_forward(gate_up, activation=how.activation)
        A_down, B_down = joined_factors(last, lora_A[-1:], lora_B[-1:], x)
        u_down = lora_input(h, last, A_down)
        y = project(h, u_down, last, B_down, joined_bias(bias[-1:], last, x))

        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _ = by_kind(ctx.needs_input_grad[1:-4], LORA_KINDS)
        needs_first_A, needs_first_B, again = any(needs_A[:-1]), any(needs_B[:-1]), not how.keep_gate_up
        source = Source.of(x, normed) if needs_first_A or again else Source(None)
        ctx.first, ctx.last, ctx.rule, ctx.how = first, last, source.rule, how
        ctx.needs_first_A, ctx.needs_first_B, ctx.needs_down_A = needs_first_A, needs_first_B, needs_A[-1]
        ctx.save_for_backward(
            *source.tensors,
            u if needs_first_B or again else None,
            u_down if needs_B[-1] else None,
            None if again else gate_up,
            A if needs_x else None,
            B if needs_x or needs_first_A or again else None,
            b if again else None,
            A_down,
            B_down,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *of_x, u, u_down, gate_up, A, B, b, A_down, B_down = ctx.saved_tensors
        source, first, last, how = Source.restored(of_x, ctx.rule), ctx.first, ctx.last, ctx.how
        _, _, needs_bias = by_kind(ctx.needs_input_grad[1:-4], LORA_KINDS)

        v_down, dB_down = v_and_dB(dy, B_down, u_down, last)
        dh = input_grad(dy, v_down, last, A_down)
        inplace = how.inplace
        if gate_up is None:
            gate_up, inplace = project(source.input(), u, first, B, b), True
        elif inplace:
            # A kernel's writes are invisible to autograd; this makes a second backward raise instead of lie.
            torch.autograd.graph.increment_version(gate_up)
        v_for_A = v_down if ctx.needs_down_A else None
        d_gate_up, h, dA_down = _glu_grads(dh, gate_up, v_for_A, last, how.activation, inplace=inplace)
        del dh, gate_up
        grads_down = factor_grads(dy, u_down, v_for_A, Source(h), last, dA=dA_down, dB=dB_down)
        of_down = *grads_down, bias_grads(dy, last, needs_bias[-1:])
        del h

        u_for_B = u if ctx.needs_first_B else None
        v, dB = v_and_dB(d_gate_up, B, u_for_B, first)
        grads = factor_grads(d_gate_up, u_for_B, v if ctx.needs_first_A else None, source, first, dB=dB)
        of_gate_up = *grads, bias_grads(d_gate_up, first, needs_bias[:-1])
        dx = input_grad(d_gate_up, v, first, A) if ctx.needs_input_grad[0] else None
        # As the inputs came: every A, every B, every bias, those of down last.
        in_order = (grad for kind in zip(of_gate_up, of_down, strict=True) for grads in kind for grad in grads)
        return dx, *in_order, None, None, None, None


def _glu_grads(
    dh: Tensor, gate_up: Tensor, v: Tensor | None, last: Group, activation: Activation, *, inplace: bool
) -> tuple[Tensor, Tensor | None, JoinedA | None]:
    """The gradient of [g | u]; and h or, where one pass makes it, v^T h for dA of down. Neither where v is None."""
    if v is not None and last.seed is None and dh.is_cuda and glu.takes_dA(dh, gate_up, v):
        d_gate_up, dA = glu.glu_backward_and_dA(dh, gate_up, v, activation=activation, inplace=inplace)
        return d_gate_up, None, JoinedA(dA)
    ops = glu if dh.is_cuda else glu_eager
    d_gate_up, h = ops.glu_backward(dh, gate_up, activation=activation, inplace=inplace, output=v is not None)
    return d_gate_up, h, None


def _input(x: Tensor | Normed) -> tuple[Tensor, Normed | None]:
    """x itself, which gets the gradient, and the norm that made it, which does not."""
    return (x.y, x) if isinstance(x, Normed) else (x, None)


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
