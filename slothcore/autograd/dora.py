"""DoRA over frozen linear maps: LoRA whose sum with the weight has rows of lengths that are learned apart.

The weight of a projection is diag(c) (W + s B A) with c = m / n, and n[j] the norm of row j of W + s B A. As in the
paper (section 4.3) and in PEFT n is a constant for backward, though it is computed anew in every pass.

Forward   z  = x W^T + s x A^T B^T
          y  = c * z + b
Backward  dz = c * dy,   dm = sum_T(dy * z) / n,   db = sum_T(dy)
          and from dz what LoRA has from dy: v = s dz B, dx = dz W + v A, dA = v^T x, dB = s dz^T (x A^T)
So z is kept for dm, in place of y nobody needs, and one pass over dy and z makes dz and dm.

Dropout   PEFT, as the authors' program, takes the part of W that the scale adds from what the LoRA term sees, too. With
          x' = mask * x / (1 - p):
              z' = x' W^T + s x' A^T B^T
              y  = x W^T + (c - 1) * (x' W^T) + c * (s x' A^T B^T) + b = (x W^T + s x' A^T B^T + b) + (c - 1) * z'
              dx = dy W + mask / (1 - p) * (((c - 1) * dy) W + v A),   dm = sum_T(dy * z') / n,   dA, dB with x' for x
          which without dropout is the above. It takes two products with W in each direction, and one more for z', which
          is not kept but made again; who wants DoRA fast leaves dropout out.

Gated MLP h = f(c_g * z_g + b_g) * (c_u * z_u + b_u), with the scales inside the activation's kernels: [z_g | z_u] is
          kept where LoRA keeps [g | u], and is overwritten by its gradient; see `dora_glu.py`. With dropout [g | u] is.

Shapes    x [T, K]; y, z, dy, dz [T, sum N]; A [r, K]; B [N, r]; m, n, c, b [N].
          T = tokens, K = in_features, N = out_features, r = rank, s = scaling, p = dropout probability.
Dtypes    x, y, z and dense W the compute dtype; m, n, c and sums over tokens float32. Factors are rounded to the
          compute dtype once, for n too: it is the norm of what multiplies x.
Source    Liu et al. 2024, arXiv:2402.09353.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slothcore.autograd.dora_activation import activated, gate_and_up, inner_grads
from slothcore.autograd.dora_projection import (
    Scales,
    dropped_project,
    magnitude_grads,
    scale_and_sum,
    scaled_input_grad,
    scaled_project,
)
from slothcore.autograd.first_order import once_differentiable
from slothcore.autograd.lora_group import (
    DORA_KINDS,
    Group,
    MlpChoices,
    Projection,
    by_kind,
    in_kinds,
    joined_bias,
    joined_factors,
)
from slothcore.autograd.lora_projection import bias_grads, factor_grads, lora_input, v_and_dB
from slothcore.autograd.lora_source import Source
from slothcore.autograd.rms_norm import Normed


def dora_fused(x: Tensor, projections: Sequence[Projection], normed: Normed | None) -> Tensor:
    """Several projections of one input, at least one with a magnitude; see `lora.lora_fused`, which checks them.

    Args:
        x: [T, K].
        normed: the norm that made x, or None.
    Returns: y [T, sum N].
    """
    return _DoraFused.apply(x, *in_kinds(projections, DORA_KINDS), Group.of(projections), _known(projections), normed)


def dora_mlp(
    x: Tensor, gate_up: Sequence[Projection], down: Projection, normed: Normed | None, how: MlpChoices
) -> Tensor:
    """The gated MLP, at least one of whose projections has a magnitude; see `lora.lora_mlp`, which checks them.

    Args:
        x: [T, H].
        normed: the norm that made x, or None.
    Returns: y [T, H].
    """
    every = (*gate_up, down)
    groups = Group.of(gate_up), Group.of((down,))
    return _DoraMlp.apply(x, *in_kinds(every, DORA_KINDS), *groups, _known(every), normed, how)


class _DoraFused(torch.autograd.Function):
    """A group of projections; the equations stand at the top of this file.

    Inputs: x; every lora_A, lora_B, bias and magnitude (None where absent); then what has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, group, known, normed = inputs
        lora_A, lora_B, bias, magnitudes = by_kind(factors, DORA_KINDS)
        A, B = joined_factors(group, lora_A, lora_B, x)
        u = lora_input(x, group, A)
        norms, scales = Scales.of(group, A, B, magnitudes, known, x)
        y, z = scaled_project(x, u, group, B, joined_bias(bias, group, x), scales)

        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _, needs_m = (any(kind) for kind in by_kind(ctx.needs_input_grad[1:-3], DORA_KINDS))
        again = needs_m and group.seed is not None
        source = Source.of(x, normed) if needs_A or again else Source(None)
        ctx.group, ctx.rule, ctx.needs_A, ctx.needs_B, ctx.again = group, source.rule, needs_A, needs_B, again
        ctx.magnitude_dtypes, ctx.in_features = _dtypes(magnitudes), x.shape[1]
        ctx.save_for_backward(
            *source.tensors,
            u if needs_B or again else None,
            A if needs_x else None,
            B if needs_x or needs_A or again else None,
            z if needs_m else None,
            scales,
            norms if needs_m else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *of_x, u, A, B, z, scales, norms = ctx.saved_tensors
        group, source = ctx.group, Source.restored(of_x, ctx.rule)
        _, _, needs_bias, needs_m = by_kind(ctx.needs_input_grad[1:-3], DORA_KINDS)

        dz, sums = scale_and_sum(dy, scales, z)
        assert dz is not None
        if ctx.again:
            _, sums = scale_and_sum(dy, scales, dropped_project(source.input(), u, group, B), grad=False)
        u_for_B = u if ctx.needs_B else None
        v, dB = v_and_dB(dz, B, u_for_B, group)
        needs_x = ctx.needs_input_grad[0]
        dx = scaled_input_grad(dy, dz, v, group, A, scales, ctx.in_features) if needs_x else None
        every_dA, every_dB = factor_grads(dz, u_for_B, v if ctx.needs_A else None, source, group, dB=dB)
        every_dm = magnitude_grads(sums, norms, group, ctx.magnitude_dtypes, needs_m)
        return dx, *every_dA, *every_dB, *bias_grads(dy, group, needs_bias), *every_dm, None, None, None


class _DoraMlp(torch.autograd.Function):
    """The gated MLP; the equations stand at the top of this file.

    Inputs: x; every lora_A, lora_B, bias and magnitude of (gate, up, down) or (gate_up, down); then what has no
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *inputs: Any) -> Tensor:
        *factors, first, last, known, normed, how = inputs
        lora_A, lora_B, bias, magnitudes = by_kind(factors, DORA_KINDS)
        A, B = joined_factors(first, lora_A[:-1], lora_B[:-1], x)
        b = joined_bias(bias[:-1], first, x)
        u = lora_input(x, first, A)
        norms, scales = Scales.of(first, A, B, magnitudes[:-1], known[:-1], x)
        inner = gate_and_up(x, u, first, B, b, scales)
        h = activated(inner, scales, b, first, how.activation)
        A_down, B_down = joined_factors(last, lora_A[-1:], lora_B[-1:], x)
        u_down = lora_input(h, last, A_down)
        norms_down, scales_down = Scales.of(last, A_down, B_down, magnitudes[-1:], known[-1:], x)
        y, z_down = scaled_project(h, u_down, last, B_down, joined_bias(bias[-1:], last, x), scales_down)

        needs_x = ctx.needs_input_grad[0]
        needs_A, needs_B, _, needs_m = by_kind(ctx.needs_input_grad[1:-5], DORA_KINDS)
        first_A, first_B, first_m = any(needs_A[:-1]), any(needs_B[:-1]), any(needs_m[:-1])
        multiplies = not how.keep_gate_up or (first_m and first.seed is not None)
        again_down = needs_m[-1] and last.seed is not None
        source = Source.of(x, normed) if first_A or multiplies else Source(None)
        ctx.first, ctx.last, ctx.rule, ctx.how = first, last, source.rule, how
        ctx.first_A, ctx.first_B, ctx.needs_down = first_A, first_B, (needs_A[-1], needs_B[-1], again_down)
        ctx.magnitude_dtypes, ctx.in_features = _dtypes(magnitudes), x.shape[1]
        ctx.save_for_backward(
            *source.tensors,
            u if first_B or multiplies else None,
            u_down if needs_B[-1] or again_down else None,
            inner if how.keep_gate_up else None,
            A if needs_x else None,
            B if needs_x or first_A or multiplies else None,
            b if first.seed is None or not how.keep_gate_up else None,
            A_down,
            B_down,
            z_down if needs_m[-1] else None,
            scales,
            scales_down,
            norms if first_m else None,
            norms_down if needs_m[-1] else None,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *of_x, u, u_down, inner, A, B, b, A_down, B_down, z_down, scales, scales_down, norms, norms_down = (
            ctx.saved_tensors
        )
        source, first, last, how = Source.restored(of_x, ctx.rule), ctx.first, ctx.last, ctx.how
        _, _, needs_bias, needs_m = by_kind(ctx.needs_input_grad[1:-5], DORA_KINDS)
        down_A, down_B, again_down = ctx.needs_down

        dz_down, sums_down = scale_and_sum(dy, scales_down, z_down)
        assert dz_down is not None
        u_down_for_B = u_down if down_B else None
        v_down, dB_down = v_and_dB(dz_down, B_down, u_down_for_B, last)
        dh = scaled_input_grad(dy, dz_down, v_down, last, A_down, scales_down, last.weights[0].shape[1])
        inplace = how.inplace
        if inner is None:
            inner, inplace = gate_and_up(source.input(), u, first, B, b, scales), True
        elif inplace:
            # A kernel's writes are invisible to autograd; this makes a second backward raise instead of lie.
            torch.autograd.graph.increment_version(inner)
        dy_inner, dz, h, sums, every_db = inner_grads(
            dh,
            inner,
            scales,
            b,
            first,
            how.activation,
            z_again=lambda: dropped_project(source.input(), u, first, B),
            inplace=inplace,
            output=down_A or again_down,
            of_magnitudes=any(needs_m[:-1]),
            of_biases=needs_bias[:-1],
        )
        del dh, inner
        if again_down:
            assert h is not None
            _, sums_down = scale_and_sum(dy, scales_down, dropped_project(h, u_down, last, B_down), grad=False)
        of_down = (
            *factor_grads(dz_down, u_down_for_B, v_down if down_A else None, Source(h), last, dB=dB_down),
            bias_grads(dy, last, needs_bias[-1:]),
            magnitude_grads(sums_down, norms_down, last, ctx.magnitude_dtypes[-1:], needs_m[-1:]),
        )
        del h, dz_down

        u_for_B = u if ctx.first_B else None
        v, dB = v_and_dB(dz, B, u_for_B, first)
        of_gate_up = (
            *factor_grads(dz, u_for_B, v if ctx.first_A else None, source, first, dB=dB),
            every_db,
            magnitude_grads(sums, norms, first, ctx.magnitude_dtypes[:-1], needs_m[:-1]),
        )
        needs_x = ctx.needs_input_grad[0]
        dx = scaled_input_grad(dy_inner, dz, v, first, A, scales, ctx.in_features) if needs_x else None
        # As the inputs came: every A, every B, every bias, every magnitude, those of down last.
        kinds: Iterator[tuple[list[Tensor | None], list[Tensor | None]]] = zip(of_gate_up, of_down, strict=True)
        in_order = (grad for kind in kinds for grads in kind for grad in grads)
        return dx, *in_order, None, None, None, None, None


def _known(projections: Sequence[Projection]) -> tuple[Tensor | None, ...]:
    return tuple(p.norms for p in projections)


def _dtypes(magnitudes: Sequence[Tensor | None]) -> tuple[torch.dtype | None, ...]:
    return tuple(None if m is None else m.dtype for m in magnitudes)
