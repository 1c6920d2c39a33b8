"""RMSNorm over each query and key head, then RoPE, of a fused query/key/value projection.

Forward   n = x * r,   r = (mean(x^2) + eps)^(-1/2),   z = n * (w + c),   y = R z   for every query and key head x,
          with one w for all query heads and another for all key heads; value heads are copied.
          R turns the pairs (z[d], z[d + P/2]), d < P/2, by the token's angles; channels from P on keep their value.
Backward  R is orthogonal, so g = R^(-1) dy is the gradient of z. With u = g * (w + c), as for any RMSNorm,
          dx = r * (u - n * mean(u * n)),   dw = sum over tokens and heads of g * n.
          The gradient of the value heads passes through.
Shapes    qkv, y and their gradients [T, heads, D]: Hq query, Hkv key, then the value heads; w, dw [D];
          r [T, Hq + Hkv]; cos, sin [T, P/2].  T = tokens, D = head_dim, P <= D rotated channels, c = weight_offset.
Dtypes    qkv, w float32 or 16-bit; cos, sin, r, dw and all arithmetic float32.
Rounding  Forward rounds where the separate operations would: Qwen rounds n (cast_before_weight), all round z and y.
          Backward rounds dx alone.
Order     dw is summed inside each program, then over programs; no atomics, so it is the same in every run.
Source    Norms of queries and keys: Henry et al. 2020, arXiv:2010.04245; here as in Qwen 3 (arXiv:2505.09388) and
          Gemma 3 (arXiv:2503.19786). Rotation: Su et al. 2021, arXiv:2104.09864.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import signal_early, wait_early
from slothcore.kernels.launch import REDUCTION_PROGRAMS, ceil_div, head_tile, with_contiguous_rows


@triton.jit
def paired_channels(HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, BLOCK_PAIRS: tl.constexpr):
    """(first, second, exists) [BLOCK_PAIRS]: a head's channels in pairs, the rotated ones first.

    The channels that do not turn are paired too, under an angle of zero, so that two tiles hold a head of any P.
    """
    pair = tl.arange(0, BLOCK_PAIRS)
    if ROTARY_DIM == HEAD_DIM:
        first = pair
        second = pair + HEAD_DIM // 2
    else:
        turns = pair < ROTARY_DIM // 2
        first = tl.where(turns, pair, pair + ROTARY_DIM // 2)
        second = tl.where(turns, pair + ROTARY_DIM // 2, pair + HEAD_DIM // 2)
    return first, second, pair < HEAD_DIM // 2


@triton.jit
def _load_scale(weight_ptr, channel, exists, weight_offset):
    """w + c [1, BLOCK_PAIRS] of some channels."""
    return (tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32) + weight_offset)[None, :]


@triton.jit
def qk_norm_forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rstd_ptr,
    stride_qkv_token,
    stride_qkv_head,
    stride_cos_row,
    stride_sin_row,
    eps,
    weight_offset,
    NUM_HEADS: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    TOTAL_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """This program takes all heads of one token, BLOCK_HEADS at a time, under one load of its angles."""
    signal_early(EARLY)
    wait_early(EARLY)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    first, second, pair_exists = paired_channels(HEAD_DIM, ROTARY_DIM, BLOCK_PAIRS)
    pair = tl.arange(0, BLOCK_PAIRS)
    turns = pair < ROTARY_DIM // 2
    cos = tl.load(cos_ptr + token * stride_cos_row + pair, mask=turns, other=1.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * stride_sin_row + pair, mask=turns, other=0.0).to(tl.float32)[None, :]
    q_scale_a = _load_scale(q_weight_ptr, first, pair_exists, weight_offset)
    q_scale_b = _load_scale(q_weight_ptr, second, pair_exists, weight_offset)
    k_scale_a = _load_scale(k_weight_ptr, first, pair_exists, weight_offset)
    k_scale_b = _load_scale(k_weight_ptr, second, pair_exists, weight_offset)

    for first_head in range(0, TOTAL_HEADS, BLOCK_HEADS):
        head = first_head + tl.arange(0, BLOCK_HEADS)
        exists = (head < TOTAL_HEADS)[:, None] & pair_exists[None, :]
        is_query = (head < NUM_HEADS)[:, None]
        is_normed = (head < NUM_NORMED)[:, None]
        x_row = qkv_ptr + token * stride_qkv_token + head[:, None].to(tl.int64) * stride_qkv_head
        y_row = out_ptr + token * TOTAL_HEADS * HEAD_DIM + head[:, None] * HEAD_DIM
        x_a = tl.load(x_row + first[None, :], mask=exists, other=0.0).to(tl.float32)
        x_b = tl.load(x_row + second[None, :], mask=exists, other=0.0).to(tl.float32)
        # One value a head: the exactly rounded operations cost nothing, and every channel inherits their error.
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x_a * x_a + x_b * x_b, axis=1) / HEAD_DIM + eps))
        tl.store(rstd_ptr + token * NUM_NORMED + head, rstd, mask=head < NUM_NORMED)

        a = x_a * rstd[:, None]
        b = x_b * rstd[:, None]
        if CAST_BEFORE_WEIGHT:
            a = a.to(dtype).to(tl.float32)
            b = b.to(dtype).to(tl.float32)
        a = (a * tl.where(is_query, q_scale_a, k_scale_a)).to(dtype).to(tl.float32)
        b = (b * tl.where(is_query, q_scale_b, k_scale_b)).to(dtype).to(tl.float32)
        y_a = tl.where(is_normed, a * cos - b * sin, x_a)
        y_b = tl.where(is_normed, b * cos + a * sin, x_b)
        tl.store(y_row + first[None, :], y_a.to(dtype), mask=exists)
        tl.store(y_row + second[None, :], y_b.to(dtype), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "tokens_per_program"])
def qk_norm_backward_kernel(
    grad_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    rstd_ptr,
    cos_ptr,
    sin_ptr,
    dw_partial_ptr,
    stride_grad_token,
    stride_grad_head,
    stride_qkv_token,
    stride_qkv_head,
    stride_cos_row,
    stride_sin_row,
    num_tokens,
    tokens_per_program,
    weight_offset,
    NUM_HEADS: tl.constexpr,
    NUM_NORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """This program takes the query and key heads of `tokens_per_program` tokens, and its own row of dw's partial sums.

    It overwrites dy by dx: the pair of channels that a thread stores is the pair that it loaded.
    """
    program = tl.program_id(0).to(tl.int64)
    first, second, pair_exists = paired_channels(HEAD_DIM, ROTARY_DIM, BLOCK_PAIRS)
    pair = tl.arange(0, BLOCK_PAIRS)
    turns = pair < ROTARY_DIM // 2
    q_scale_a = _load_scale(q_weight_ptr, first, pair_exists, weight_offset)
    q_scale_b = _load_scale(q_weight_ptr, second, pair_exists, weight_offset)
    k_scale_a = _load_scale(k_weight_ptr, first, pair_exists, weight_offset)
    k_scale_b = _load_scale(k_weight_ptr, second, pair_exists, weight_offset)
    if dw_partial_ptr is not None:
        dwq_a = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], dtype=tl.float32)
        dwq_b = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], dtype=tl.float32)
        dwk_a = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], dtype=tl.float32)
        dwk_b = tl.zeros([BLOCK_HEADS, BLOCK_PAIRS], dtype=tl.float32)

    for turn in range(tokens_per_program):
        token = program * tokens_per_program + turn
        has_angle = turns & (token < num_tokens)
        cos = tl.load(cos_ptr + token * stride_cos_row + pair, mask=has_angle, other=1.0).to(tl.float32)[None, :]
        sin = tl.load(sin_ptr + token * stride_sin_row + pair, mask=has_angle, other=0.0).to(tl.float32)[None, :]
        for first_head in range(0, NUM_NORMED, BLOCK_HEADS):
            head = first_head + tl.arange(0, BLOCK_HEADS)
            head_exists = (head < NUM_NORMED) & (token < num_tokens)
            exists = head_exists[:, None] & pair_exists[None, :]
            is_query = (head < NUM_HEADS)[:, None]
            grad_row = grad_ptr + token * stride_grad_token + head[:, None].to(tl.int64) * stride_grad_head
            x_row = qkv_ptr + token * stride_qkv_token + head[:, None].to(tl.int64) * stride_qkv_head
            dy_a = tl.load(grad_row + first[None, :], mask=exists, other=0.0).to(tl.float32)
            dy_b = tl.load(grad_row + second[None, :], mask=exists, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + token * NUM_NORMED + head, mask=head_exists, other=0.0)[:, None]
            normed_a = tl.load(x_row + first[None, :], mask=exists, other=0.0).to(tl.float32) * rstd
            normed_b = tl.load(x_row + second[None, :], mask=exists, other=0.0).to(tl.float32) * rstd

            grad_a = dy_a * cos + dy_b * sin
            grad_b = dy_b * cos - dy_a * sin
            scaled_a = grad_a * tl.where(is_query, q_scale_a, k_scale_a)
            scaled_b = grad_b * tl.where(is_query, q_scale_b, k_scale_b)
            projection = tl.sum(scaled_a * normed_a + scaled_b * normed_b, axis=1)[:, None] / HEAD_DIM
            dx_a = (scaled_a - normed_a * projection) * rstd
            dx_b = (scaled_b - normed_b * projection) * rstd
            tl.store(grad_row + first[None, :], dx_a.to(grad_ptr.dtype.element_ty), mask=exists)
            tl.store(grad_row + second[None, :], dx_b.to(grad_ptr.dtype.element_ty), mask=exists)

            if dw_partial_ptr is not None:
                # The weight multiplied the rounded value, so its gradient does too.
                if CAST_BEFORE_WEIGHT:
                    normed_a = normed_a.to(qkv_ptr.dtype.element_ty).to(tl.float32)
                    normed_b = normed_b.to(qkv_ptr.dtype.element_ty).to(tl.float32)
                dwq_a += tl.where(is_query, grad_a * normed_a, 0.0)
                dwq_b += tl.where(is_query, grad_b * normed_b, 0.0)
                dwk_a += tl.where(is_query, 0.0, grad_a * normed_a)
                dwk_b += tl.where(is_query, 0.0, grad_b * normed_b)

    if dw_partial_ptr is not None:
        q_row = dw_partial_ptr + program * 2 * HEAD_DIM
        k_row = q_row + HEAD_DIM
        tl.store(q_row + first, tl.sum(dwq_a, axis=0), mask=pair_exists)
        tl.store(q_row + second, tl.sum(dwq_b, axis=0), mask=pair_exists)
        tl.store(k_row + first, tl.sum(dwk_a, axis=0), mask=pair_exists)
        tl.store(k_row + second, tl.sum(dwk_b, axis=0), mask=pair_exists)


def qk_norm_forward(
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
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate the query and key heads; copy the rest.

    Args:
        qkv: [T, heads, D], any strides; `num_heads` query heads, `num_kv_heads` key heads, then the values.
        q_weight, k_weight: [D], shared by all query heads and by all key heads.
        cos, sin: [T, P/2] float32, P <= D and both even.
        eps: added to the mean square.
        weight_offset: added to the weights (1 for Gemma).
        cast_before_weight: round to the dtype of `qkv` before the weight (Qwen) and not only after it (Gemma).
        early: begin while the kernel in front ends, see early.py.
    Returns: a new contiguous [T, heads, D]; rstd [T, num_heads + num_kv_heads] float32.
    """
    num_tokens, heads, head_dim = qkv.shape
    normed = num_heads + num_kv_heads
    _check(qkv, q_weight, k_weight, cos, sin, normed)
    qkv, cos, sin = with_contiguous_rows(qkv), with_contiguous_rows(cos), with_contiguous_rows(sin)
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    rstd = torch.empty((num_tokens, normed), dtype=torch.float32, device=qkv.device)
    tile = head_tile(heads, head_dim // 2)
    qk_norm_forward_kernel[(num_tokens,)](
        qkv,
        with_contiguous_rows(q_weight),
        with_contiguous_rows(k_weight),
        cos,
        sin,
        out,
        rstd,
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        sin.stride(0),
        eps,
        weight_offset,
        NUM_HEADS=num_heads,
        NUM_NORMED=normed,
        TOTAL_HEADS=heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=2 * cos.shape[-1],
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_HEADS=tile.rows,
        BLOCK_PAIRS=tile.columns,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return out, rstd


def qk_norm_backward_(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn the gradient of `qk_norm_forward`'s output into that of its input, in place.

    Args:
        grad: [T, heads, D], last dimension contiguous; its query and key heads are overwritten, the rest stays.
        qkv, q_weight, k_weight, rstd, cos, sin: as forward had or gave them.
        weight_grad: also form the gradients of both weights.
    Returns: `grad`; [2, D] float32, the gradients of q_weight and of k_weight, or None.
    """
    num_tokens, _, head_dim = qkv.shape
    normed = num_heads + num_kv_heads
    _check(qkv, q_weight, k_weight, cos, sin, normed)
    assert grad.shape == qkv.shape
    assert grad.stride(-1) == 1, "a gradient to overwrite needs a contiguous head dimension"
    assert rstd.shape == (num_tokens, normed)
    assert rstd.is_contiguous()
    qkv, cos, sin = with_contiguous_rows(qkv), with_contiguous_rows(cos), with_contiguous_rows(sin)
    tokens_per_program = ceil_div(num_tokens, REDUCTION_PROGRAMS) if weight_grad else 1
    programs = ceil_div(num_tokens, max(1, tokens_per_program))
    dw_partial = rstd.new_empty((programs, 2, head_dim)) if weight_grad else None
    tile = head_tile(normed, head_dim // 2)
    qk_norm_backward_kernel[(programs,)](
        grad,
        qkv,
        with_contiguous_rows(q_weight),
        with_contiguous_rows(k_weight),
        rstd,
        cos,
        sin,
        dw_partial,
        grad.stride(0),
        grad.stride(1),
        qkv.stride(0),
        qkv.stride(1),
        cos.stride(0),
        sin.stride(0),
        num_tokens,
        tokens_per_program,
        weight_offset,
        NUM_HEADS=num_heads,
        NUM_NORMED=normed,
        HEAD_DIM=head_dim,
        ROTARY_DIM=2 * cos.shape[-1],
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_HEADS=tile.rows,
        BLOCK_PAIRS=tile.columns,
        num_warps=tile.warps,
    )
    return grad, dw_partial.sum(0) if dw_partial is not None else None


def _check(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, normed: int) -> None:
    num_tokens, heads, head_dim = qkv.shape
    rotary_dim = 2 * cos.shape[-1]
    assert normed <= heads, f"{normed} heads to norm, {heads} in all"
    assert q_weight.shape == k_weight.shape == (head_dim,)
    assert head_dim % 2 == 0, f"rotated heads need an even head_dim, got {head_dim}"
    assert rotary_dim <= head_dim, f"angles for {rotary_dim} channels, heads of {head_dim}"
    assert cos.shape == sin.shape == (num_tokens, rotary_dim // 2)
