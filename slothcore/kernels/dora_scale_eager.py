"""A factor for each column of a matrix in plain torch: the same functions as `dora_scale`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded where the fused kernels round.
"""

import torch
from torch import Tensor


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = scale * z + bias for z [T, N], scale [N] and bias [N]. Returns [T, N] in z's dtype."""
    y = z.to(wide_dtype(z)) * scale
    return (y if bias is None else y.add_(bias)).to(z.dtype)


def scale_columns_backward(
    dy: Tensor, scale: Tensor, z: Tensor | None, *, grad: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dz = scale * dy [T, N], or None unless `grad`; dc = sum_T(dy * z) [N], or None without z [T, N]."""
    wide = dy.to(wide_dtype(dy))
    dc = None if z is None else (wide * z).sum(0)
    return (wide * scale).to(dy.dtype) if grad else None, dc


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """In which 16-bit tensors are computed: float32; others in their own."""
    return torch.promote_types(tensor.dtype, torch.float32)
