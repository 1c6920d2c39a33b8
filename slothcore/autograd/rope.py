"""Rotary position embedding of a fused query, key and value tensor.

The rotation R of a token is orthogonal: y = R x, so dx = R^T dy = R^(-1) dy. Backward therefore needs the angles only,
and runs the same kernel with the sine negated. The values, and the channels of a head beyond the angles' (partial
rotation), pass through both ways.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from slothcore.autograd.first_order import once_differentiable
from slothcore.kernels import rope as fused
from slothcore.kernels import rope_eager as eager


class RotateHeads(Function):
    """Rotate the first `num_heads` heads of every token."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, head_dim: int, inplace: bool
    ) -> Tensor:
        if inplace:
            ctx.mark_dirty(qkv)
        else:
            qkv = qkv.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(cos, sin)
        ctx.num_heads, ctx.head_dim, ctx.inplace = num_heads, head_dim, inplace
        _rotate_(qkv, cos, sin, num_heads=num_heads, head_dim=head_dim, inverse=False)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        # A gradient that is not contiguous may be an expanded scalar, whose elements share memory; without any token
        # torch calls even that contiguous.
        if not (ctx.inplace and grad.is_contiguous() and grad.stride(-1) == 1):
            grad = grad.clone(memory_format=torch.contiguous_format)
        _rotate_(grad, cos, sin, num_heads=ctx.num_heads, head_dim=ctx.head_dim, inverse=True)
        return grad, None, None, None, None, None


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, head_dim: int, inverse: bool) -> None:
    ops = fused if x.is_cuda else eager
    heads = x if x.dim() == 3 else x.unflatten(1, (-1, head_dim))
    ops.rope_rotate_(heads, cos, sin, num_heads=num_heads, inverse=inverse)


def apply_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, head_dim: int | None = None, inplace: bool = False
) -> Tensor:
    """Rotate the query and key heads of a fused projection.

    Args:
        qkv: [T, heads, D], or the same flat as [T, heads * D]; query heads, key heads, value heads.
        cos, sin: [T, P/2] float32, half-split pairing as in Hugging Face's `rotate_half`. With P < D only the first P
            channels of a head turn (partial rotation).
        num_heads: how many heads to rotate, from the first: query plus key heads.
        head_dim: D; only a flat `qkv` needs it, since the angles do not tell how wide a head is.
        inplace: overwrite `qkv` and, in backward, the incoming gradient. Only for a tensor whose producer did not save
            it and whose consumer hands back a gradient of its own making. Where `qkv` is a view, autograd copies its
            gradient twice to write through the base, so give the flat tensor, not a reshaped view of it.
    Returns: as `qkv`; `qkv` itself if `inplace`.
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    if head_dim is None:
        assert qkv.dim() == 3, "a flat projection does not tell head_dim"
        head_dim = qkv.shape[-1]
    return RotateHeads.apply(qkv, cos, sin, num_heads, head_dim, inplace)
