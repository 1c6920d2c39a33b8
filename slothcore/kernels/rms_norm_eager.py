"""RMSNorm in plain torch: the same functions as `rms_norm`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded where the fused kernels round.
"""

import torch
from torch import Tensor


def rms_norm_forward(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise each row of `x` [T, H], or of `x + residual`: (y [T, H], rstd [T], h [T, H])."""
    h = x if residual is None else x + residual
    wide = h.to(_compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = rms_norm_again(h, weight, rstd, weight_offset=weight_offset, cast_before_weight=cast_before_weight)
    return y, rstd, h


def rms_norm_again(
    h: Tensor, weight: Tensor, rstd: Tensor, *, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Tensor:
    """y [T, H] once more, from h [T, H], weight [H] and rstd [T] as forward had or gave them."""
    normed = h.to(rstd.dtype) * rstd[:, None]
    if cast_before_weight:
        normed = normed.to(h.dtype).to(rstd.dtype)
    return (normed * (weight.to(rstd.dtype) + weight_offset)).to(h.dtype)


def rms_norm_backward(
    dy: Tensor,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    dh: Tensor | None = None,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `rms_norm_forward`: (dx [T, H], dw [H] or None). `dh` [T, H] is added to dx."""
    dtype = _compute_dtype(h)
    wide_dy = dy.to(dtype)
    normed = h.to(dtype) * rstd[:, None]
    grad_normed = wide_dy * (weight.to(dtype) + weight_offset)
    projection = (grad_normed * normed).mean(-1, keepdim=True)
    dx = (grad_normed - normed * projection) * rstd[:, None]
    if dh is not None:
        dx = dx + dh.to(dtype)
    dw = None
    if weight_grad:
        if cast_before_weight:
            normed = normed.to(h.dtype).to(dtype)
        dw = (wide_dy * normed).sum(0)
    return dx.to(h.dtype), dw


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
