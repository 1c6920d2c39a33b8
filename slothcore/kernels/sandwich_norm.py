"""The seam of a block whose branches are normed on both sides: norm the branch, add it to the stream, norm the sum.

Forward   n1 = b * r1,   r1 = (mean(b^2) + eps)^(-1/2),   h = residual + n1 * (w1 + c)
          n2 = h * r2,   r2 = (mean(h^2) + eps)^(-1/2),   y = n2 * (w2 + c)
Backward  dh is the gradient that reaches h along the residual stream. As for any RMSNorm, with u2 = dy * (w2 + c)
          e = r2 * (u2 - n2 * mean(u2 * n2)) + dh,   dw2 = sum_T(dy * n2)
          is the whole gradient of h, thus of the residual and of the first norm's output. With u1 = e * (w1 + c)
          db = r1 * (u1 - n1 * mean(u1 * n1)),   dw1 = sum_T(e * n1).
Shapes    b, residual, h, y and their gradients [T, H]; w1, w2 and their gradients [H]; r1, r2 [T].
          T = tokens, H = hidden_size, b = branch, c = weight_offset; 1 = post norm of the branch, 2 = pre norm of the
          next one.
Dtypes    b, w, y float32 or 16-bit; r, dw and all arithmetic float32.
Rounding  Forward rounds where the separate operations would: n1 * (w1 + c), h and y to b.dtype, n1 and n2 before the
          weight only under cast_before_weight. Backward rounds e and db, each once.
Order     dw is summed inside each program, then over programs; no atomics, so it is the same in every run.
Source    Zhang & Sennrich 2019, arXiv:1910.07467; norms on both sides as in Gemma 2, arXiv:2408.00118.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import signal_early, wait_early
from slothcore.kernels.launch import REDUCTION_PROGRAMS, ceil_div, whole_row_tile, with_contiguous_rows


@triton.jit
def _reciprocal_deviation(x, eps, WIDTH: tl.constexpr):
    """r [rows] of x [rows, columns], zero beyond WIDTH."""
    # One value a row: the exactly rounded operations cost nothing, and every element of the row inherits their error.
    return tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / WIDTH + eps))


@triton.jit
def _rounded_if(x, CAST: tl.constexpr, dtype: tl.constexpr):
    if CAST:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["num_tokens"])
def sandwich_norm_forward_kernel(
    branch_ptr,
    residual_ptr,
    post_weight_ptr,
    pre_weight_ptr,
    y_ptr,
    h_ptr,
    post_rstd_ptr,
    pre_rstd_ptr,
    stride_branch_row,
    stride_residual_row,
    num_tokens,
    eps,
    weight_offset,
    WIDTH: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """This program takes BLOCK_ROWS whole rows."""
    signal_early(EARLY)
    wait_early(EARLY)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    row_exists = row < num_tokens
    column_exists = column < WIDTH
    exists = row_exists[:, None] & column_exists[None, :]
    out_offset = row[:, None] * WIDTH + column[None, :]

    branch = tl.load(branch_ptr + row[:, None] * stride_branch_row + column[None, :], mask=exists, other=0.0)
    residual = tl.load(residual_ptr + row[:, None] * stride_residual_row + column[None, :], mask=exists, other=0.0)
    branch = branch.to(tl.float32)
    rstd = _reciprocal_deviation(branch, eps, WIDTH)
    tl.store(post_rstd_ptr + row, rstd, mask=row_exists)
    scale = tl.load(post_weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    normed = _rounded_if(branch * rstd[:, None], CAST_BEFORE_WEIGHT, dtype)
    normed = (normed * scale[None, :]).to(dtype).to(tl.float32)

    h = (residual.to(tl.float32) + normed).to(dtype)
    tl.store(h_ptr + out_offset, h, mask=exists)
    h = h.to(tl.float32)
    rstd = _reciprocal_deviation(h, eps, WIDTH)
    tl.store(pre_rstd_ptr + row, rstd, mask=row_exists)
    scale = tl.load(pre_weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    normed = _rounded_if(h * rstd[:, None], CAST_BEFORE_WEIGHT, dtype)
    tl.store(y_ptr + out_offset, (normed * scale[None, :]).to(dtype), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "tiles_per_program"])
def sandwich_norm_backward_kernel(
    dy_ptr,
    dh_ptr,
    branch_ptr,
    h_ptr,
    post_weight_ptr,
    pre_weight_ptr,
    post_rstd_ptr,
    pre_rstd_ptr,
    d_branch_ptr,
    d_residual_ptr,
    dw_partial_ptr,
    stride_dy_row,
    stride_dh_row,
    stride_branch_row,
    stride_h_row,
    num_tokens,
    tiles_per_program,
    weight_offset,
    WIDTH: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """This program takes `tiles_per_program` tiles of BLOCK_ROWS whole rows, and its own row of dw's partial sums."""
    dtype: tl.constexpr = branch_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    column_exists = column < WIDTH
    post_scale = tl.load(post_weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    pre_scale = tl.load(pre_weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    if dw_partial_ptr is not None:
        post_dw = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
        pre_dw = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)

    for tile in range(tiles_per_program):
        row = (program * tiles_per_program + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_exists = row < num_tokens
        exists = row_exists[:, None] & column_exists[None, :]
        out_offset = row[:, None] * WIDTH + column[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row[:, None] * stride_h_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + row[:, None] * stride_branch_row + column[None, :], mask=exists, other=0.0)

        rstd = tl.load(pre_rstd_ptr + row, mask=row_exists, other=0.0)[:, None]
        normed = h * rstd
        scaled = dy * pre_scale[None, :]
        projection = tl.sum(scaled * normed, axis=1)[:, None] / WIDTH
        d_sum = (scaled - normed * projection) * rstd
        if dh_ptr is not None:
            dh = tl.load(dh_ptr + row[:, None] * stride_dh_row + column[None, :], mask=exists, other=0.0)
            d_sum += dh.to(tl.float32)
        tl.store(d_residual_ptr + out_offset, d_sum.to(dtype), mask=exists)
        if dw_partial_ptr is not None:
            # The weight multiplied the rounded value, so its gradient does too.
            pre_dw += dy * _rounded_if(normed, CAST_BEFORE_WEIGHT, dtype)

        rstd = tl.load(post_rstd_ptr + row, mask=row_exists, other=0.0)[:, None]
        normed = branch.to(tl.float32) * rstd
        scaled = d_sum * post_scale[None, :]
        projection = tl.sum(scaled * normed, axis=1)[:, None] / WIDTH
        tl.store(d_branch_ptr + out_offset, ((scaled - normed * projection) * rstd).to(dtype), mask=exists)
        if dw_partial_ptr is not None:
            post_dw += d_sum * _rounded_if(normed, CAST_BEFORE_WEIGHT, dtype)

    if dw_partial_ptr is not None:
        partial_row = dw_partial_ptr + program * 2 * WIDTH
        tl.store(partial_row + column, tl.sum(post_dw, axis=0), mask=column_exists)
        tl.store(partial_row + WIDTH + column, tl.sum(pre_dw, axis=0), mask=column_exists)


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
    """Norm each row of `branch`, add it to `residual`, and norm the sum.

    Args:
        branch, residual: [T, H] of one dtype, float32 or 16-bit, any row stride.
        post_weight, pre_weight: [H], of the norm after the branch and of the norm before the next one.
        eps: added to both mean squares.
        weight_offset: added to both weights (1 for Gemma).
        cast_before_weight: round to the dtype of `branch` before the weights and not only after them.
        early: begin while the kernel in front ends, see early.py.
    Returns: y [T, H]; h [T, H], the residual stream from here on; the post and the pre norm's rstd [T] float32.
    """
    num_tokens, width = branch.shape
    assert residual.shape == branch.shape
    assert residual.dtype == branch.dtype
    assert post_weight.shape == pre_weight.shape == (width,)
    y = torch.empty_like(branch, memory_format=torch.contiguous_format)
    h = torch.empty_like(y)
    post_rstd = torch.empty(num_tokens, dtype=torch.float32, device=branch.device)
    pre_rstd = torch.empty_like(post_rstd)
    branch, residual = with_contiguous_rows(branch), with_contiguous_rows(residual)
    tile = whole_row_tile(width)
    sandwich_norm_forward_kernel[(ceil_div(num_tokens, tile.rows),)](
        branch,
        residual,
        with_contiguous_rows(post_weight),
        with_contiguous_rows(pre_weight),
        y,
        h,
        post_rstd,
        pre_rstd,
        branch.stride(0),
        residual.stride(0),
        num_tokens,
        eps,
        weight_offset,
        WIDTH=width,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
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
    """Gradients of `sandwich_norm_forward`.

    Args:
        dy: [T, H] gradient of y.
        dh: [T, H] gradient that reaches h along the residual stream, or None.
        branch, h: [T, H]; post_weight, pre_weight: [H]; post_rstd, pre_rstd: [T]: as forward had or gave them.
        weight_grad: also form the gradients of both weights.
    Returns: gradients of branch and of residual [T, H]; [2, H] float32, those of post_weight and pre_weight, or None.
    """
    num_tokens, width = branch.shape
    assert dy.shape == h.shape == branch.shape
    assert dh is None or dh.shape == branch.shape
    dy, branch, h = with_contiguous_rows(dy), with_contiguous_rows(branch), with_contiguous_rows(h)
    if dh is not None:
        dh = with_contiguous_rows(dh)
    tile = whole_row_tile(width)
    tiles = ceil_div(num_tokens, tile.rows)
    tiles_per_program = ceil_div(tiles, REDUCTION_PROGRAMS) if weight_grad else 1
    programs = ceil_div(tiles, max(1, tiles_per_program))
    d_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    d_residual = torch.empty_like(d_branch)
    dw_partial = branch.new_empty((programs, 2, width), dtype=torch.float32) if weight_grad else None
    sandwich_norm_backward_kernel[(programs,)](
        dy,
        dh,
        branch,
        h,
        with_contiguous_rows(post_weight),
        with_contiguous_rows(pre_weight),
        post_rstd,
        pre_rstd,
        d_branch,
        d_residual,
        dw_partial,
        dy.stride(0),
        dh.stride(0) if dh is not None else 0,
        branch.stride(0),
        h.stride(0),
        num_tokens,
        tiles_per_program,
        weight_offset,
        WIDTH=width,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return d_branch, d_residual, dw_partial.sum(0) if dw_partial is not None else None
