"""Rotary position embedding in plain torch: the same function as `rope`, where the equations stand.

Takes float64 too. 16-bit inputs are computed in float32 and rounded once.
"""

import torch
from torch import Tensor


def rope_rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, inverse: bool = False) -> Tensor:
    """Rotate `x[:, :num_heads, :P]` of x [T, heads, D] in place by the angles cos, sin [T, P/2]; returns `x`."""
    half_dim = cos.shape[-1]
    assert 2 * half_dim <= x.shape[-1], f"angles for {2 * half_dim} channels, heads of {x.shape[-1]}"
    assert num_heads <= x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos = cos.to(dtype)[:, None]
    sin = sin.to(dtype)[:, None]
    if inverse:
        sin = -sin
    rotated = x[:, :num_heads, : 2 * half_dim]
    a, b = rotated.to(dtype).split(half_dim, dim=-1)
    rotated.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
    return x
