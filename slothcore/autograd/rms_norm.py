"""RMSNorm with a hand-derived backward; the derivation stands in `slothcore.kernels.rms_norm`.

Saved for backward: the normalised tensor's input h, the weight and one reciprocal deviation a token. With the residual
addition fused, h is an output that the next layer holds anyway, so the norm itself keeps nothing of size [T, H].
Nor need those who read y: all of it can be had from h, rstd and the weight, which is why they come with it.
A frozen weight costs no gradient work.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import rms_norm as fused
from slothcore.kernels import rms_norm_eager as eager
from slothcore.kernels.early import begins_early


class NormRule(NamedTuple):
    """What a model family says about its norms; nothing here gets a gradient."""

    eps: float
    weight_offset: float  # added to the weight: 1 for the Gemma family
    cast_before_weight: bool  # round to the working dtype before the weight, as Llama does


class LoraInput(NamedTuple):
    """u = y A^T, made beside y for the projections that read it.

    Attributes:
        u: [T, sum of the ranks].
        lora_A: of the projections, in their order; None for one without LoRA.
    """

    u: Tensor
    lora_A: tuple[Tensor | None, ...]


class Normed(NamedTuple):
    """A norm's output and what it can be made of again, y = h * rstd * (weight + offset).

    Gradients flow through y, and through h where the residual stream goes on. Who keeps h and rstd for backward
    instead of y makes y again there, and sends the gradient to y alone.

    Attributes:
        y: [T, H].
        h: [T, H], what was normalised: the sum with the residual if there was one.
        rstd: [T] float32 (float64 for a float64 h), 1 / rms(h); has no gradient.
        weight: [H].
        rule: of the norm.
        lora_input: what was made beside y where nothing needs a gradient, see `lora_few.normed`; else None.
    """

    y: Tensor
    h: Tensor
    rstd: Tensor
    weight: Tensor
    rule: NormRule
    lora_input: LoraInput | None = None


class RmsNorm(Function):
    """y = norm(x) * (weight + offset); rstd comes along without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
        ops = fused if x.is_cuda else eager
        y, rstd, _ = ops.rms_norm_forward(
            x,
            weight,
            eps=rule.eps,
            weight_offset=rule.weight_offset,
            cast_before_weight=rule.cast_before_weight,
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        return y, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if dy is None:
            return None, None, None
        dx, dw = _backward(ctx, dy, dh=None, weight_grad=ctx.needs_input_grad[1])
        return dx, dw, None


class AddRmsNorm(Function):
    """h = x + residual; y = norm(h) * (weight + offset); rstd comes along without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor, Tensor]:
        ops = fused if x.is_cuda else eager
        y, rstd, h = ops.rms_norm_forward(
            x,
            weight,
            eps=rule.eps,
            weight_offset=rule.weight_offset,
            cast_before_weight=rule.cast_before_weight,
            residual=residual,
        )
        ctx.save_for_backward(h, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        # An output that nobody used has no gradient; zeros in its place would cost a pass over memory.
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        return y, h, rstd

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if dy is None:
            return dh, dh, None, None
        dx, dw = _backward(ctx, dy, dh=dh, weight_grad=ctx.needs_input_grad[2])
        return dx, dx, dw, None


def _backward(ctx: Any, dy: Tensor, *, dh: Tensor | None, weight_grad: bool) -> tuple[Tensor, Tensor | None]:
    h, weight, rstd = ctx.saved_tensors
    ops = fused if h.is_cuda else eager
    dx, dw = ops.rms_norm_backward(
        dy,
        h,
        weight,
        rstd,
        weight_offset=ctx.rule.weight_offset,
        cast_before_weight=ctx.rule.cast_before_weight,
        dh=dh,
        weight_grad=weight_grad,
    )
    return dx, None if dw is None else dw.to(weight.dtype)


def is_decoding(x: Tensor) -> bool:
    """Whether these are a few rows on a GPU of which nothing needs a gradient, whose kernels may begin early."""
    return begins_early(x) and not torch.is_grad_enabled()


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Normed:
    """Normalise the rows of `x`.

    Args:
        x: [T, H] float32, float64 (CPU) or 16-bit.
        weight: [H]; frozen or trainable.
        eps: added to the mean square.
        weight_offset: added to the weight (1 for the Gemma family).
        cast_before_weight: round to `x.dtype` before the weight (Llama) and not only after it (Gemma).
    Returns: y [T, H] in `x.dtype` with what it can be made of again; h is `x`.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    rule = NormRule(eps, weight_offset, cast_before_weight)
    if is_decoding(x):
        y, rstd, h = fused.rms_norm_forward(x, weight, **rule._asdict(), early=True)
        return Normed(y, h, rstd, weight, rule)
    y, rstd = RmsNorm.apply(x, weight, rule)
    return Normed(y, x, rstd, weight, rule)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> Normed:
    """Add `x` to the residual stream and normalise the sum, in one pass.

    Args:
        x, residual: [T, H], the same dtype.
        weight, eps, weight_offset, cast_before_weight: as in `rms_norm`.
    Returns: y [T, H], the normalised sum; h [T, H] = x + residual, the residual stream from here on; and the rest of
        what y can be made of again.

    `x` and `residual` receive one and the same gradient tensor, so nothing upstream may overwrite it.
    """
    rule = NormRule(eps, weight_offset, cast_before_weight)
    if is_decoding(x):
        y, rstd, h = fused.rms_norm_forward(x, weight, **rule._asdict(), residual=residual, early=True)
        return Normed(y, h, rstd, weight, rule)
    y, h, rstd = AddRmsNorm.apply(x, residual, weight, rule)
    return Normed(y, h, rstd, weight, rule)
