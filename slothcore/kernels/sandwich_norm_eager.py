"""Norm, residual add, norm in plain torch: the same functions as `sandwich_norm`.

Put together from the eager RMSNorm, so that every 16-bit rounding of a model that runs the steps one after the other
is here too. Takes float64.
"""

import torch
from torch import Tensor

from slothcore.kernels.rms_norm_eager import rms_norm_backward, rms_norm_forward


def sandwich_norm_forward(
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    early: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = residual + norm(branch), y = norm(h): (y [T, H], h [T, H], post rstd [T], pre rstd [T])."""
    rule = {"eps": eps, "weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    normed, post_rstd, _ = rms_norm_forward(branch, post_weight, **rule)
    y, pre_rstd, h = rms_norm_forward(normed, pre_weight, residual=residual, **rule)
    return y, h, post_rstd, pre_rstd


def sandwich_norm_backward(
    dy: Tensor,
    dh: Tensor | None,
    branch: Tensor,
    h: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    post_rstd: Tensor,
    pre_rstd: Tensor,
    *,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `sandwich_norm_forward`: (branch [T, H], residual [T, H], post and pre weight [2, H] or None)."""
    rule = {"weight_offset": weight_offset, "cast_before_weight": cast_before_weight, "weight_grad": weight_grad}
    d_residual, pre_dw = rms_norm_backward(dy, h, pre_weight, pre_rstd, dh=dh, **rule)
    d_branch, post_dw = rms_norm_backward(d_residual, branch, post_weight, post_rstd, **rule)
    dw = None if post_dw is None or pre_dw is None else torch.stack((post_dw, pre_dw))
    return d_branch, d_residual, dw
