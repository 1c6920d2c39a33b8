"""RMSNorm over each query and key head, then RoPE; the derivation stands in `slothcore.kernels.qk_norm`.

Saved for backward: the fused projection itself, one reciprocal deviation a head, the two weights and the angles. The
normed and the rotated heads are not: n = x * r comes back in registers. Backward writes over the gradient that it is
given, so it allocates nothing of the stream's size. A frozen weight costs no gradient work.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.autograd.rms_norm import NormRule, is_decoding
from slothcore.kernels import qk_norm as fused
from slothcore.kernels import qk_norm_eager as eager


class Heads(NamedTuple):
    """How a fused projection falls into heads."""

    num_heads: int
    num_kv_heads: int


class QkNormRope(Function):
    """y = R (norm(x) * (weight + offset)) for every query and key head x, R the rotation of its token."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
        rule: NormRule,
    ) -> Tensor:
        ops = fused if qkv.is_cuda else eager
        out, rstd = ops.qk_norm_forward(
            _split_heads(qkv, q_weight),
            q_weight,
            k_weight,
            cos,
            sin,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            eps=rule.eps,
            weight_offset=rule.weight_offset,
            cast_before_weight=rule.cast_before_weight,
        )
        ctx.save_for_backward(qkv, q_weight, k_weight, rstd, cos, sin)
        ctx.heads, ctx.rule = heads, rule
        return out.view(qkv.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, q_weight, k_weight, rstd, cos, sin = ctx.saved_tensors
        _, wants_q, wants_k = ctx.needs_input_grad[:3]
        # A gradient that is not contiguous may be an expanded scalar, whose elements share memory; without any token
        # torch calls even that contiguous.
        if not grad.is_contiguous() or grad.stride(-1) != 1:
            grad = grad.clone(memory_format=torch.contiguous_format)
        ops = fused if qkv.is_cuda else eager
        _, dw = ops.qk_norm_backward_(
            _split_heads(grad, q_weight),
            _split_heads(qkv, q_weight),
            q_weight,
            k_weight,
            rstd,
            cos,
            sin,
            num_heads=ctx.heads.num_heads,
            num_kv_heads=ctx.heads.num_kv_heads,
            weight_offset=ctx.rule.weight_offset,
            cast_before_weight=ctx.rule.cast_before_weight,
            weight_grad=wants_q or wants_k,
        )
        dq = dw[0].to(q_weight.dtype) if wants_q else None
        dk = dw[1].to(k_weight.dtype) if wants_k else None
        return grad, dq, dk, None, None, None, None


def _split_heads(x: Tensor, weight: Tensor) -> Tensor:
    return x if x.dim() == 3 else x.unflatten(1, (-1, len(weight)))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
) -> Tensor:
    """Normalise every query and key head of a fused projection, then rotate it by its token's position.

    Args:
        qkv: [T, heads, D], or the same flat as [T, heads * D]; query heads, key heads, value heads. float32, float64
            (CPU) or 16-bit.
        q_weight, k_weight: [D], one for all query heads and one for all key heads; frozen or trainable.
        cos, sin: [T, P/2] float32, half-split pairing as in Hugging Face's `rotate_half`. With P < D only the first P
            channels of a head turn (partial rotation).
        num_heads, num_kv_heads: query heads, and key heads.
        eps, weight_offset, cast_before_weight: as in `slothcore.autograd.rms_norm.rms_norm`.
    Returns: a new tensor of the shape of `qkv`, with the value heads copied.

    Backward writes over its incoming gradient where that is contiguous, so the consumer must hand back a gradient of
    its own making, as attention does.
    Source: Henry et al. 2020, arXiv:2010.04245; Su et al. 2021, arXiv:2104.09864.
    """
    heads, rule = Heads(num_heads, num_kv_heads), NormRule(eps, weight_offset, cast_before_weight)
    if is_decoding(qkv):
        y, _ = fused.qk_norm_forward(
            _split_heads(qkv, q_weight),
            q_weight,
            k_weight,
            cos,
            sin,
            **heads._asdict(),
            **rule._asdict(),
            early=True,
        )
        return y.view_as(qkv)
    return QkNormRope.apply(qkv, q_weight, k_weight, cos, sin, heads, rule)
