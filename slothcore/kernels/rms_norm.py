"""RMSNorm over the last dimension, optionally fused with the residual addition before it.

Forward   h = x + residual,   r = (mean(h^2) + eps)^(-1/2),   y = h * r * (w + c)
Backward  with n = h * r and g = dy * (w + c); dr/dh_j = -r^3 h_j / H gives
          dx = r * (g - n * mean(g * n)) + dh,   dw = sum_T(dy * n)
          dh is the gradient that reaches h along the residual stream; dx is also the gradient of the residual.
Shapes    x, residual, h, y and their gradients [T, H]; w, dw [H]; r [T].
          T = tokens, H = hidden_size, c = weight_offset.
Dtypes    x, w, y float32 or 16-bit; r, dw and all arithmetic float32.
Rounding  h is rounded to x.dtype, as the separate addition would. Llama then rounds h * r to x.dtype before the
          weight (cast_before_weight); Gemma rounds only y.
Order     dw is summed inside each program, then over programs; no atomics, so it is the same in every run.
Again     y from h, r and w in one pass, to the bits that forward gave: for whoever would rather not keep it.
Source    Zhang & Sennrich 2019, arXiv:1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import signal_early, wait_early
from slothcore.kernels.launch import (
    REDUCTION_PROGRAMS,
    ceil_div,
    partial_row_tile,
    whole_row_tile,
    with_contiguous_rows,
)


@triton.jit(do_not_specialize=["num_tokens"])
def rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    h_ptr,
    rstd_ptr,
    stride_x_row,
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
    """This program normalises BLOCK_ROWS whole rows."""
    signal_early(EARLY)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    row_exists = row < num_tokens
    column_exists = column < WIDTH
    exists = row_exists[:, None] & column_exists[None, :]
    if EARLY:
        scale = tl.load(weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
        wait_early(EARLY)

    h = tl.load(x_ptr + row[:, None] * stride_x_row + column[None, :], mask=exists, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * stride_residual_row + column[None, :], mask=exists, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(h_ptr + row[:, None] * WIDTH + column[None, :], h, mask=exists)
    h = h.to(tl.float32)
    # One value a row: the exactly rounded operations cost nothing, and every element of the row inherits their error.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=1) / WIDTH + eps))
    tl.store(rstd_ptr + row, rstd, mask=row_exists)

    normed = h * rstd[:, None]
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(x_ptr.dtype.element_ty).to(tl.float32)
    if not EARLY:
        scale = tl.load(weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    y = (normed * scale[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * WIDTH + column[None, :], y, mask=exists)


@triton.jit
def rms_norm_again_kernel(
    h_ptr,
    weight_ptr,
    rstd_ptr,
    y_ptr,
    stride_h_row,
    weight_offset,
    WIDTH: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """This program scales BLOCK_COLUMNS elements of one row."""
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    h = tl.load(h_ptr + row * stride_h_row + column, mask=exists, other=0.0).to(tl.float32)
    normed = h * tl.load(rstd_ptr + row)
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(y_ptr.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight_ptr + column, mask=exists, other=0.0).to(tl.float32) + weight_offset
    tl.store(y_ptr + row * WIDTH + column, (normed * scale).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_tokens", "tiles_per_program"])
def rms_norm_backward_kernel(
    dy_ptr,
    h_ptr,
    weight_ptr,
    rstd_ptr,
    dh_ptr,
    dx_ptr,
    dw_partial_ptr,
    stride_dy_row,
    stride_h_row,
    stride_dh_row,
    num_tokens,
    tiles_per_program,
    weight_offset,
    WIDTH: tl.constexpr,
    CAST_BEFORE_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """This program takes `tiles_per_program` tiles of BLOCK_ROWS whole rows, and its own row of dw's partial sums."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    column_exists = column < WIDTH
    scale = tl.load(weight_ptr + column, mask=column_exists, other=0.0).to(tl.float32) + weight_offset
    if dw_partial_ptr is not None:
        dw = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)

    for tile in range(tiles_per_program):
        row = (program * tiles_per_program + tile) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        row_exists = row < num_tokens
        exists = row_exists[:, None] & column_exists[None, :]
        dy = tl.load(dy_ptr + row[:, None] * stride_dy_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + row[:, None] * stride_h_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row_exists, other=0.0)

        normed = h * rstd[:, None]
        grad_normed = dy * scale[None, :]
        projection = tl.sum(grad_normed * normed, axis=1) / WIDTH
        dx = (grad_normed - normed * projection[:, None]) * rstd[:, None]
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + row[:, None] * stride_dh_row + column[None, :], mask=exists, other=0.0).to(
                tl.float32
            )
        tl.store(dx_ptr + row[:, None] * WIDTH + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=exists)

        if dw_partial_ptr is not None:
            # The weight multiplied the rounded value, so its gradient does too.
            if CAST_BEFORE_WEIGHT:
                normed = normed.to(h_ptr.dtype.element_ty).to(tl.float32)
            dw += dy * normed

    if dw_partial_ptr is not None:
        tl.store(dw_partial_ptr + program * WIDTH + column, tl.sum(dw, axis=0), mask=column_exists)


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
    """Normalise each row of `x`, or of `x + residual`.

    Args:
        x: [T, H] float32 or 16-bit, any row stride.
        weight: [H].
        eps: added to the mean square.
        weight_offset: added to the weight (1 for the Gemma family).
        cast_before_weight: round to `x.dtype` before the weight (Llama) and not only after it (Gemma).
        residual: [T, H], dtype of `x`, or None.
        early: begin while the kernel in front ends, see early.py.
    Returns: y [T, H]; rstd [T] float32; h [T, H], which is `x` itself without a residual.
    """
    num_tokens, width = x.shape
    assert weight.shape == (width,), f"weight {tuple(weight.shape)} does not fit rows of {width}"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    h, residual_stride = x, 0
    if residual is not None:
        residual = with_contiguous_rows(residual)
        h, residual_stride = torch.empty_like(y), residual.stride(0)
    x, weight = with_contiguous_rows(x), with_contiguous_rows(weight)
    tile = whole_row_tile(width)
    rms_norm_forward_kernel[(ceil_div(num_tokens, tile.rows),)](
        x,
        residual,
        weight,
        y,
        h if residual is not None else None,
        rstd,
        x.stride(0),
        residual_stride,
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
    return y, rstd, h


def rms_norm_again(
    h: Tensor, weight: Tensor, rstd: Tensor, *, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Tensor:
    """y [T, H] once more, from h [T, H] of any row stride, weight [H] and rstd [T] as forward had or gave them."""
    num_tokens, width = h.shape
    h, weight = with_contiguous_rows(h), with_contiguous_rows(weight)
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    tile = partial_row_tile(width)
    rms_norm_again_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        h,
        weight,
        rstd,
        y,
        h.stride(0),
        weight_offset,
        WIDTH=width,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return y


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
    """Gradients of `rms_norm_forward`.

    Args:
        dy: [T, H] gradient of y.
        h: [T, H], weight: [H], rstd: [T] float32: as forward had or gave them.
        dh: [T, H] gradient that reaches h from elsewhere, added to dx; or None.
        weight_grad: also form dw.
    Returns: dx [T, H] in h's dtype, which is the gradient of the residual too; dw [H] float32, or None.
    """
    num_tokens, width = h.shape
    assert dy.shape == h.shape
    assert dh is None or dh.shape == h.shape
    dy, h, weight = with_contiguous_rows(dy), with_contiguous_rows(h), with_contiguous_rows(weight)
    if dh is not None:
        dh = with_contiguous_rows(dh)
    tile = whole_row_tile(width)
    tiles = ceil_div(num_tokens, tile.rows)
    tiles_per_program = ceil_div(tiles, REDUCTION_PROGRAMS) if weight_grad else 1
    programs = ceil_div(tiles, max(1, tiles_per_program))
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dw_partial = h.new_empty((programs, width), dtype=torch.float32) if weight_grad else None
    rms_norm_backward_kernel[(programs,)](
        dy,
        h,
        weight,
        rstd,
        dh,
        dx,
        dw_partial,
        dy.stride(0),
        h.stride(0),
        dh.stride(0) if dh is not None else 0,
        num_tokens,
        tiles_per_program,
        weight_offset,
        WIDTH=width,
        CAST_BEFORE_WEIGHT=cast_before_weight,
        BLOCK_ROWS=tile.rows,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return dx, dw_partial.sum(0) if dw_partial is not None else None
