"""RMSNorm with a hand-derived backward; the derivation stands in `slothcore.kernels.rms_norm`.

Saved for backward: the normalised tensor's input h, the weight and one reciprocal deviation a token. With the residual
addition fused, h is an output that the next layer holds anyway, so the norm itself keeps nothing of size [T, H].
A frozen weight costs no gradient work.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import rms_norm as fused
from slothcore.kernels import rms_norm_eager as eager


class NormRule(NamedTuple):
    """What a model family says about its norms; nothing here gets a gradient."""

    eps: float
    weight_offset: float  # added to the weight: 1 for the Gemma family
    cast_before_weight: bool  # round to the working dtype before the weight, as Llama does


class RmsNorm(Function):
    """y = norm(x) * (weight + offset)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rule: NormRule) -> Tensor:
        ops = fused if x.is_cuda else eager
        y, rstd, _ = ops.rms_norm_forward(
            x,
            weight,
            eps=rule.eps,
            weight_offset=rule.weight_offset,
            cast_before_weight=rule.cast_before_weight,
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.rule = rule
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx, dw = _backward(ctx, dy, dh=None, weight_grad=ctx.needs_input_grad[1])
        return dx, dw, None


class AddRmsNorm(Function):
    """h = x + residual; y = norm(h) * (weight + offset)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, rule: NormRule) -> tuple[Tensor, Tensor]:
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
        ctx.rule = rule
        # An output that nobody used has no gradient; zeros in its place would cost a pass over memory.
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dh: Tensor | None
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


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Tensor:
    """Normalise the rows of `x`.

    Args:
        x: [T, H] float32, float64 (CPU) or 16-bit.
        weight: [H]; frozen or trainable.
        eps: added to the mean square.
        weight_offset: added to the weight (1 for the Gemma family).
        cast_before_weight: round to `x.dtype` before the weight (Llama) and not only after it (Gemma).
    Returns: [T, H] in `x.dtype`.
    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    return RmsNorm.apply(x, weight, NormRule(eps, weight_offset, cast_before_weight))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """Add `x` to the residual stream and normalise the sum, in one pass.

    Args:
        x, residual: [T, H], the same dtype.
        weight, eps, weight_offset, cast_before_weight: as in `rms_norm`.
    Returns: y [T, H], the normalised sum; h [T, H] = x + residual, the residual stream from here on.

    `x` and `residual` receive one and the same gradient tensor, so nothing upstream may overwrite it.
    """
    return AddRmsNorm.apply(x, residual, weight, NormRule(eps, weight_offset, cast_before_weight))
