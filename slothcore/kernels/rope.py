"""Rotary position embedding, in place, on the first heads of every token.

Forward   a' = a * cos - b * sin,   b' = b * cos + a * sin   for the pairs (a, b) = (x[d], x[d + P/2]), d < P/2
Inverse   the same with -sin. The rotation is orthogonal, so its inverse is also its backward.
Partial   with P < D the channels from P on stay as they are.
Shapes    x [T, heads, D]; cos, sin [T, P/2].  T = tokens, D = head_dim, P <= D rotated channels of a head.
          Angles are the caller's (positions, scaling).
Dtypes    x float32 or 16-bit; cos, sin and all arithmetic float32; one rounding to x.dtype.
Source    Su et al. 2021, arXiv:2104.09864; the half-split pairing is GPT-NeoX's and Hugging Face's `rotate_half`.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.launch import ROTARY_PAIRS, head_tile, with_contiguous_rows


@triton.jit
def rope_rotate_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    stride_x_token,
    stride_x_head,
    stride_cos_row,
    stride_sin_row,
    NUM_HEADS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """This program rotates all NUM_HEADS heads of one token, BLOCK_HEADS at a time, under one load of its angles."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK_HALF)
    pair_exists = pair < HALF_DIM
    cos = tl.load(cos_ptr + token * stride_cos_row + pair, mask=pair_exists, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * stride_sin_row + pair, mask=pair_exists, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin

    for first_head in range(0, NUM_HEADS, BLOCK_HEADS):
        head = first_head + tl.arange(0, BLOCK_HEADS)
        exists = (head < NUM_HEADS)[:, None] & pair_exists[None, :]
        a_ptr = x_ptr + token * stride_x_token + head[:, None].to(tl.int64) * stride_x_head + pair[None, :]
        b_ptr = a_ptr + HALF_DIM
        a = tl.load(a_ptr, mask=exists, other=0.0).to(tl.float32)
        b = tl.load(b_ptr, mask=exists, other=0.0).to(tl.float32)
        tl.store(a_ptr, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=exists)
        tl.store(b_ptr, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=exists)


def rope_rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, inverse: bool = False) -> Tensor:
    """Rotate `x[:, :num_heads, :P]` in place; later heads (the values of a fused q/k/v) stay as they are.

    Args:
        x: [T, heads, D], last dimension contiguous, any other strides.
        cos, sin: [T, P/2] float32, P <= D.
        inverse: rotate back.
    Returns: `x`.
    """
    num_tokens, heads, head_dim = x.shape
    half_dim = cos.shape[-1]
    assert 2 * half_dim <= head_dim, f"angles for {2 * half_dim} channels, heads of {head_dim}"
    assert cos.shape == sin.shape == (num_tokens, half_dim)
    assert num_heads <= heads
    assert x.stride(-1) == 1, "rotating in place needs a contiguous head dimension"
    cos, sin = with_contiguous_rows(cos), with_contiguous_rows(sin)
    tile = head_tile(num_heads, half_dim, ROTARY_PAIRS)
    rope_rotate_kernel[(num_tokens,)](
        x,
        cos,
        sin,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        NUM_HEADS=num_heads,
        HALF_DIM=half_dim,
        INVERSE=inverse,
        BLOCK_HEADS=tile.rows,
        BLOCK_HALF=tile.columns,
        num_warps=tile.warps,
    )
    return x
