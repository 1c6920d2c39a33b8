"""Norm of a branch, residual add and the next norm as one step; the derivation is in `slothcore.kernels.sandwich_norm`.

Saved for backward: the branch, the sum h, which is an output that the next layer holds anyway, the weights, and two
reciprocal deviations a token. The normed branch never reaches memory. Frozen weights cost no gradient work.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.autograd.rms_norm import Normed, NormRule, is_decoding
from slothcore.kernels import rms_norm, rms_norm_eager
from slothcore.kernels import sandwich_norm as fused
from slothcore.kernels import sandwich_norm_eager as eager


class PostNormAddNorm(Function):
    """h = residual + norm(branch) * (post_weight + offset); y = norm(h) * (pre_weight + offset); and rstd of h."""

    @staticmethod
    def forward(
        ctx: Any, branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, rule: NormRule
    ) -> tuple[Tensor, Tensor, Tensor]:
        ops = fused if branch.is_cuda else eager
        y, h, post_rstd, pre_rstd = ops.sandwich_norm_forward(
            branch,
            residual,
            post_weight,
            pre_weight,
            eps=rule.eps,
            weight_offset=rule.weight_offset,
            cast_before_weight=rule.cast_before_weight,
        )
        ctx.save_for_backward(branch, h, post_weight, pre_weight, post_rstd, pre_rstd)
        ctx.mark_non_differentiable(pre_rstd)
        # An output that nobody used has no gradient; zeros in its place would cost a pass over memory.
        ctx.set_materialize_grads(False)
        ctx.rule = rule
        return y, h, pre_rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None and dh is None:
            return None, None, None, None, None
        branch, h, post_weight, pre_weight, post_rstd, pre_rstd = ctx.saved_tensors
        _, _, wants_post, wants_pre = ctx.needs_input_grad[:4]
        rule = {"weight_offset": ctx.rule.weight_offset, "cast_before_weight": ctx.rule.cast_before_weight}
        if dy is None:
            # Only the residual stream was used: the second norm has no part in the gradient.
            ops = rms_norm if branch.is_cuda else rms_norm_eager
            d_branch, dw = ops.rms_norm_backward(dh, branch, post_weight, post_rstd, weight_grad=wants_post, **rule)
            return d_branch, dh, None if dw is None else dw.to(post_weight.dtype), None, None
        sandwich_ops = fused if branch.is_cuda else eager
        d_branch, d_residual, dw = sandwich_ops.sandwich_norm_backward(
            dy,
            dh,
            branch,
            h,
            post_weight,
            pre_weight,
            post_rstd,
            pre_rstd,
            weight_grad=wants_post or wants_pre,
            **rule,
        )
        d_post = dw[0].to(post_weight.dtype) if wants_post else None
        d_pre = dw[1].to(pre_weight.dtype) if wants_pre else None
        return d_branch, d_residual, d_post, d_pre, None


def post_norm_add_norm(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> Normed:
    """Normalise a branch, add it to the residual stream and normalise the sum, in one pass.

    Args:
        branch, residual: [T, H], the same dtype: float32, float64 (CPU) or 16-bit.
        post_weight: [H], of the norm that ends the branch.
        pre_weight: [H], of the norm that begins the next one.
        eps, weight_offset, cast_before_weight: of both norms, as in `slothcore.autograd.rms_norm.rms_norm`.
    Returns: y [T, H], the normalised sum; h [T, H] = residual + norm(branch), the residual stream from here on; and the
        rest of what y can be made of again.
    Source: Gemma 2, arXiv:2408.00118; Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    rule = NormRule(eps, weight_offset, cast_before_weight)
    if is_decoding(branch):
        y, h, _, rstd = fused.sandwich_norm_forward(
            branch, residual, post_weight, pre_weight, **rule._asdict(), early=True
        )
        return Normed(y, h, rstd, pre_weight, rule)
    y, h, rstd = PostNormAddNorm.apply(branch, residual, post_weight, pre_weight, rule)
    return Normed(y, h, rstd, pre_weight, rule)
