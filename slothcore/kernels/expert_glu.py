"""Gated linear unit of routed rows, each scaled by its router weight.

Forward   s = w * f(gate) * up,   w the router weight of the row's pair
          The down projection is linear, so scaling its input by w equals scaling its output; the gradient of w then
          needs no output of the down projection, which is neither kept nor computed again.
Backward  dh = w * ds,  [dgate | dup] from dh as in glu.py,  dw = sum over I of ds * f(gate) * up
          s is computed again beside them: the gradients of the down projection need it.
Shapes    gate_up [M, 2 I], the gate first; s, ds [M, I]; weights, d_weights [M], in the order of the pairs;
          order [M] int64, the pair of each row.  M = rows, I = intermediate_size.
Dtypes    float32 or 16-bit, all alike; all arithmetic float32.
Rounding  f(gate) is rounded to the working dtype before the product, as in glu.py; s is rounded once.
Source    Shazeer 2020, arXiv:2002.05202.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.glu import activate
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div, partial_row_tile, with_contiguous_rows


@triton.jit
def expert_glu_forward_kernel(
    gate_up_ptr, weights_ptr, order_ptr, s_ptr, stride_gate_up_row,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_COLUMNS outputs of one row."""
    # One grid dimension, because the second may not exceed 65535; neighbours share a row.
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    weight = tl.load(weights_ptr + tl.load(order_ptr + row)).to(tl.float32)
    gate_ptr = gate_up_ptr + row * stride_gate_up_row + column
    gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=exists, other=0.0).to(tl.float32)
    activated, _ = activate(gate, ACTIVATION)
    activated = activated.to(s_ptr.dtype.element_ty).to(tl.float32)
    tl.store(s_ptr + row * WIDTH + column, (activated * up * weight).to(s_ptr.dtype.element_ty), mask=exists)


@triton.jit
def expert_glu_backward_kernel(
    ds_ptr, gate_up_ptr, weights_ptr, order_ptr, d_gate_up_ptr, s_ptr, d_weights_ptr,
    stride_ds_row, stride_gate_up_row, stride_d_gate_up_row,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """This program differentiates one whole row, because d_weights sums over it; `d_gate_up` may be `gate_up`."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_ptr + row)
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    products = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for first in range(0, WIDTH, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        exists = column < WIDTH
        gate_ptr = gate_up_ptr + row * stride_gate_up_row + column
        gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
        up = tl.load(gate_ptr + WIDTH, mask=exists, other=0.0).to(tl.float32)
        ds = tl.load(ds_ptr + row * stride_ds_row + column, mask=exists, other=0.0).to(tl.float32)
        activated, slope = activate(gate, ACTIVATION)
        activated = activated.to(s_ptr.dtype.element_ty).to(tl.float32)
        h = activated * up
        products += ds * h
        dh = ds * weight
        d_gate_ptr = d_gate_up_ptr + row * stride_d_gate_up_row + column
        tl.store(d_gate_ptr, (dh * up * slope).to(s_ptr.dtype.element_ty), mask=exists)
        tl.store(d_gate_ptr + WIDTH, (dh * activated).to(s_ptr.dtype.element_ty), mask=exists)
        tl.store(s_ptr + row * WIDTH + column, (h * weight).to(s_ptr.dtype.element_ty), mask=exists)
    tl.store(d_weights_ptr + pair, tl.sum(products, axis=0).to(d_weights_ptr.dtype.element_ty))


def expert_glu_forward(gate_up: Tensor, weights: Tensor, order: Tensor, *, activation: Activation) -> Tensor:
    """`weights[order] * f(gate) * up` for gate_up [M, 2 I] (any row stride), weights and order [M]. Returns [M, I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * width, f"gate_up {tuple(gate_up.shape)} has no two halves"
    gate_up = with_contiguous_rows(gate_up)
    s = gate_up.new_empty((rows, width))
    if rows == 0:
        return s
    tile = partial_row_tile(width)
    expert_glu_forward_kernel[(rows * ceil_div(width, tile.columns),)](
        gate_up, weights.contiguous(), order, s, gate_up.stride(0),
        WIDTH=width, ACTIVATION=activation, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return s


def expert_glu_backward(
    ds: Tensor, gate_up: Tensor, weights: Tensor, order: Tensor, *, activation: Activation, inplace: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `expert_glu_forward`, and its output once more.

    Args:
        ds: [M, I].
        gate_up: [M, 2 I], any row stride.
        weights, order: [M].
        inplace: overwrite `gate_up` with its gradient (its last dimension must be contiguous).
    Returns: d_gate_up [M, 2 I], which is `gate_up` if `inplace`; d_weights [M] in the order of the pairs; s [M, I].
    """
    rows, width = ds.shape
    assert gate_up.shape == (rows, 2 * width), f"ds {tuple(ds.shape)}, gate_up {tuple(gate_up.shape)}"
    assert not inplace or gate_up.stride(-1) == 1, "overwriting gate_up needs contiguous rows"
    ds, gate_up, weights = with_contiguous_rows(ds), with_contiguous_rows(gate_up), weights.contiguous()
    d_gate_up = gate_up if inplace else gate_up.new_empty(gate_up.shape)
    d_weights, s = weights.new_empty(weights.shape), gate_up.new_empty(ds.shape)
    if rows == 0:
        return d_gate_up, d_weights, s
    tile = partial_row_tile(width)
    expert_glu_backward_kernel[(rows,)](
        ds, gate_up, weights, order, d_gate_up, s, d_weights,
        ds.stride(0), gate_up.stride(0), d_gate_up.stride(0),
        WIDTH=width, ACTIVATION=activation, BLOCK_COLUMNS=tile.columns, num_warps=tile.warps,
    )  # fmt: skip
    return d_gate_up, d_weights, s
