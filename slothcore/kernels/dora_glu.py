"""Gated linear unit over columns that each have a factor of their own, as DoRA's gate and up have.

Forward   [g | u] = c * z + b,   h = f(g) * u;   f as in `glu.py`
Backward  dg = dh * u * f'(g),   du = dh * f(g)
          dz = c * [dg | du],   dc = sum_T([dg | du] * z),   db = sum_T([dg | du])
          All that is saved is z; g, u and, if the next product's backward needs it, h are computed again.
Shapes    z, dz [T, 2 I], the gate first; h, dh [T, I]; c, b, dc, db [2 I].
          T = tokens, I = intermediate_size.
Dtypes    z, h, dh, dz float32 or 16-bit; c, dc, db float32; b any; all arithmetic float32.
Rounding  g and u stay in float32; f(g) is rounded to the working dtype before the product, as in `glu.py`.
Order     a program sums its columns over a share of the rows, then the shares are added: no atomics.
Source    Liu et al. 2024, arXiv:2402.09353; Shazeer 2020, arXiv:2002.05202.

[g | u] never reaches memory, so DoRA adds no pass over the largest activation in either direction.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.dora_scale import StripTile, shares_of
from slothcore.kernels.glu import activate
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div, partial_row_tile, with_contiguous_rows

STRIP_TILE = StripTile(rows=16, columns=128, warps=4)


@triton.jit
def _constants(scale_ptr, bias_ptr, column, has_column):
    """c and b of some columns; b is zero without a bias."""
    scale = tl.load(scale_ptr + column, mask=has_column, other=0.0)
    if bias_ptr is not None:
        return scale, tl.load(bias_ptr + column, mask=has_column, other=0.0).to(tl.float32)
    else:
        return scale, tl.zeros_like(scale)


@triton.jit
def dora_glu_kernel(
    z_ptr, scale_ptr, bias_ptr, h_ptr, stride_z_row,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_COLUMNS outputs of one row."""
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    gate_scale, gate_bias = _constants(scale_ptr, bias_ptr, column, exists)
    up_scale, up_bias = _constants(scale_ptr, bias_ptr, WIDTH + column, exists)
    z_ptrs = z_ptr + row * stride_z_row + column
    gate = tl.load(z_ptrs, mask=exists, other=0.0).to(tl.float32) * gate_scale + gate_bias
    up = tl.load(z_ptrs + WIDTH, mask=exists, other=0.0).to(tl.float32) * up_scale + up_bias
    activated, _ = activate(gate, ACTIVATION)
    activated = activated.to(h_ptr.dtype.element_ty).to(tl.float32)
    tl.store(h_ptr + row * WIDTH + column, (activated * up).to(h_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["T", "tiles_per_share"])
def dora_glu_backward_kernel(
    dh_ptr, z_ptr, scale_ptr, bias_ptr, dz_ptr, h_ptr, scale_parts_ptr, bias_parts_ptr,
    stride_dh_row, stride_z_row, stride_dz_row, T, tiles_per_share,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, TILE_T: tl.constexpr, TILE_N: tl.constexpr,
):  # fmt: skip
    """This program differentiates TILE_N outputs of a share of the rows; `dz_ptr` may be `z_ptr`."""
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    share = tl.program_id(1)
    has_column = column < WIDTH
    gate_scale, gate_bias = _constants(scale_ptr, bias_ptr, column, has_column)
    up_scale, up_bias = _constants(scale_ptr, bias_ptr, WIDTH + column, has_column)
    gate_sums, up_sums = tl.zeros([TILE_N], tl.float32), tl.zeros([TILE_N], tl.float32)
    gate_bias_sums, up_bias_sums = tl.zeros([TILE_N], tl.float32), tl.zeros([TILE_N], tl.float32)
    end = tl.minimum((share + 1) * tiles_per_share * TILE_T, T)
    for first_row in range(share * tiles_per_share * TILE_T, end, TILE_T):
        row = (first_row + tl.arange(0, TILE_T)).to(tl.int64)[:, None]
        exists = (row < T) & has_column[None, :]
        z_ptrs = z_ptr + row * stride_z_row + column[None, :]
        gate_z = tl.load(z_ptrs, mask=exists, other=0.0).to(tl.float32)
        up_z = tl.load(z_ptrs + WIDTH, mask=exists, other=0.0).to(tl.float32)
        dh = tl.load(dh_ptr + row * stride_dh_row + column[None, :], mask=exists, other=0.0).to(tl.float32)
        up = up_z * up_scale[None, :] + up_bias[None, :]
        activated, slope = activate(gate_z * gate_scale[None, :] + gate_bias[None, :], ACTIVATION)
        activated = activated.to(dtype).to(tl.float32)
        d_gate = dh * up * slope
        d_up = dh * activated
        dz_ptrs = dz_ptr + row * stride_dz_row + column[None, :]
        tl.store(dz_ptrs, (d_gate * gate_scale[None, :]).to(dtype), mask=exists)
        tl.store(dz_ptrs + WIDTH, (d_up * up_scale[None, :]).to(dtype), mask=exists)
        if h_ptr is not None:
            tl.store(h_ptr + row * WIDTH + column[None, :], (activated * up).to(dtype), mask=exists)
        if scale_parts_ptr is not None:
            gate_sums += tl.sum(d_gate * gate_z, axis=0)
            up_sums += tl.sum(d_up * up_z, axis=0)
        if bias_parts_ptr is not None:
            gate_bias_sums += tl.sum(d_gate, axis=0)
            up_bias_sums += tl.sum(d_up, axis=0)
    part = share * 2 * WIDTH + column
    if scale_parts_ptr is not None:
        tl.store(scale_parts_ptr + part, gate_sums, mask=has_column)
        tl.store(scale_parts_ptr + part + WIDTH, up_sums, mask=has_column)
    if bias_parts_ptr is not None:
        tl.store(bias_parts_ptr + part, gate_bias_sums, mask=has_column)
        tl.store(bias_parts_ptr + part + WIDTH, up_bias_sums, mask=has_column)


def dora_glu_forward(z: Tensor, scale: Tensor, bias: Tensor | None, *, activation: Activation) -> Tensor:
    """h = f(gate) * up with [gate | up] = scale * z + bias.

    Args:
        z: [T, 2 I], any row stride, the gate in the first half of a row.
        scale: c [2 I] float32.
        bias: b [2 I], or None.
    Returns: [T, I].
    """
    num_tokens, width = z.shape[0], z.shape[1] // 2
    assert z.shape[1] == 2 * width, f"z {tuple(z.shape)} has no two halves"
    z = with_contiguous_rows(z)
    h = z.new_empty((num_tokens, width))
    tile = partial_row_tile(width)
    dora_glu_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        z, scale, bias, h, z.stride(0),
        WIDTH=width, ACTIVATION=activation, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return h


def dora_glu_backward(
    dh: Tensor,
    z: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    activation: Activation,
    inplace: bool = False,
    output: bool = True,
    scale_grad: bool = True,
    bias_grad: bool = False,
    _tile: StripTile = STRIP_TILE,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `dora_glu_forward`, and its output once more.

    Args:
        dh: [T, I].
        z: [T, 2 I], any row stride.
        scale, bias: c [2 I] float32; b [2 I] or None.
        inplace: overwrite `z` with its gradient (its last dimension must be contiguous).
        output, scale_grad, bias_grad: whether h, dc and db are wanted.
        _tile: for tests and sweeps.
    Returns: dz [T, 2 I], which is `z` if `inplace`; h [T, I], dc [2 I] float32 and db [2 I] float32, or None each.
    """
    num_tokens, width = dh.shape
    assert z.shape == (num_tokens, 2 * width), f"dh {tuple(dh.shape)}, z {tuple(z.shape)}"
    assert not inplace or z.stride(-1) == 1, "overwriting z needs contiguous rows"
    dh, z = with_contiguous_rows(dh), with_contiguous_rows(z)
    dz = z if inplace else z.new_empty(z.shape)
    h = z.new_empty(dh.shape) if output else None
    strips = ceil_div(width, _tile.columns)
    shares = shares_of(num_tokens, strips, _tile.rows)
    scale_parts, bias_parts = (
        z.new_empty((shares, 2 * width), dtype=torch.float32) if wanted else None for wanted in (scale_grad, bias_grad)
    )
    dora_glu_backward_kernel[(strips, shares)](
        dh, z, scale, bias, dz, h, scale_parts, bias_parts,
        dh.stride(0), z.stride(0), dz.stride(0), num_tokens, ceil_div(ceil_div(num_tokens, _tile.rows), shares),
        WIDTH=width, ACTIVATION=activation, TILE_T=_tile.rows, TILE_N=_tile.columns, num_warps=_tile.warps,
    )  # fmt: skip
    dc, db = (None if parts is None else parts.sum(0) for parts in (scale_parts, bias_parts))
    return dz, h, dc, db
