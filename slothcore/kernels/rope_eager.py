"""Rotary position embedding in plain torch: the same function as `rope`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded once.
"""

import torch
from torch import Tensor


def rope_rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, inverse: bool = False) -> Tensor:
    """Rotate `x[:, :num_heads]` of x [T, heads, D] in place by the angles cos, sin [T, D/2]; returns `x`."""
    half_dim = cos.shape[-1]
    assert x.shape[-1] == 2 * half_dim, f"angles for head_dim {2 * half_dim}, heads of {x.shape[-1]}"
    assert num_heads <= x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos = cos.to(dtype)[:, None]
    sin = sin.to(dtype)[:, None]
    if inverse:
        sin = -sin
    a, b = x[:, :num_heads].to(dtype).split(half_dim, dim=-1)
    x[:, :num_heads] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return x
