"""A factor for each column of a matrix, as DoRA has it on the outputs of a linear map, forward and backward.

Forward   y = c * z + b
Backward  dz = c * dy,   dc = sum_T(dy * z)
Shapes    y, z, dy, dz [T, N]; c, b, dc [N].  T = tokens, N = out_features.
Dtypes    y, z, dy, dz float32 or 16-bit; c and dc float32; b any; all arithmetic float32.
Rounding  y and dz once.
Order     a program sums its columns over a share of the rows, then the shares are added: no atomics.
Source    Liu et al. 2024, arXiv:2402.09353.

Backward reads dy and z once for both results.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.launch import REDUCTION_PROGRAMS, ceil_div, partial_row_tile, with_contiguous_rows


class StripTile(NamedTuple):
    """What one program holds at a time: [rows, columns]."""

    rows: int
    columns: int
    warps: int


STRIP_TILE = StripTile(rows=16, columns=256, warps=4)


def shares_of(num_tokens: int, strips: int, rows: int) -> int:
    """Into how many shares the rows are cut: enough programs for a large GPU, each with a tile of rows or more."""
    return max(1, min(ceil_div(num_tokens, rows), REDUCTION_PROGRAMS // max(1, strips)))


@triton.jit
def dora_scale_kernel(
    z_ptr, scale_ptr, bias_ptr, y_ptr, stride_z_row, WIDTH: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """This program computes BLOCK_COLUMNS outputs of one row."""
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    y = tl.load(z_ptr + row * stride_z_row + column, mask=exists, other=0.0).to(tl.float32)
    y *= tl.load(scale_ptr + column, mask=exists, other=0.0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T", "tiles_per_share"])
def dora_scale_backward_kernel(
    dy_ptr, z_ptr, scale_ptr, dz_ptr, parts_ptr, stride_dy_row, stride_z_row, T, tiles_per_share,
    WIDTH: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """This program scales TILE_N columns of a share of the rows of dy, and sums their products with z.

    `dz_ptr` is None if dz is not wanted, `z_ptr` if dc is not.
    """
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    share = tl.program_id(1)
    has_column = column < WIDTH
    scale = tl.load(scale_ptr + column, mask=has_column, other=0.0)[None, :]
    sums = tl.zeros([TILE_N], tl.float32)
    end = tl.minimum((share + 1) * tiles_per_share * TILE_T, T)
    for first_row in range(share * tiles_per_share * TILE_T, end, TILE_T):
        row = (first_row + tl.arange(0, TILE_T)).to(tl.int64)[:, None]
        exists = (row < T) & has_column[None, :]
        dy = tl.load(dy_ptr + row * stride_dy_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + row * stride_z_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
            sums += tl.sum(dy * z, axis=0)
        if dz_ptr is not None:
            dz = (dy * scale).to(dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + row * WIDTH + column[None, :], dz, mask=exists)
    if z_ptr is not None:
        tl.store(parts_ptr + share * WIDTH + column, sums, mask=has_column)


def scale_columns(z: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = scale * z + bias for z [T, N] (any row stride), scale [N] float32 and bias [N]. Returns [T, N]."""
    num_tokens, width = z.shape
    z = with_contiguous_rows(z)
    y = z.new_empty((num_tokens, width))
    tile = partial_row_tile(width)
    dora_scale_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        z, scale, None if bias is None else bias.contiguous(), y, z.stride(0),
        WIDTH=width, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return y


def scale_columns_backward(
    dy: Tensor, scale: Tensor, z: Tensor | None, *, grad: bool = True, _tile: StripTile = STRIP_TILE
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `scale_columns`.

    Args:
        dy: [T, N], any row stride.
        scale: c [N] float32.
        z: [T, N], any row stride; None if dc is not wanted.
        grad: whether dz is wanted.
        _tile: for tests and sweeps.
    Returns: dz [T, N], or None; dc [N] float32, or None without z.
    """
    num_tokens, width = dy.shape
    dy = with_contiguous_rows(dy)
    z = None if z is None else with_contiguous_rows(z)
    dz = dy.new_empty((num_tokens, width)) if grad else None
    strips = ceil_div(width, _tile.columns)
    shares = shares_of(num_tokens, strips, _tile.rows)
    parts = None if z is None else dy.new_empty((shares, width), dtype=torch.float32)
    dora_scale_backward_kernel[(strips, shares)](
        dy, z, scale, dz, parts, dy.stride(0), 0 if z is None else z.stride(0), num_tokens,
        ceil_div(ceil_div(num_tokens, _tile.rows), shares),
        WIDTH=width, TILE_T=_tile.rows, TILE_N=_tile.columns, num_warps=_tile.warps,
    )  # fmt: skip
    return dz, None if parts is None else parts.sum(0)
