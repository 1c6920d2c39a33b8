"""Gated linear unit: an activated gate times a linear branch, both halves of one tensor.

Forward   y = f(gate) * up
          Both activations are a sigmoid gate, f(g) = g * s with s = sigmoid(t(g)):
            SiLU        t = g
            tanh-GELU   t = 2 z, z = sqrt(2/pi) (g + 0.044715 g^3), because (1 + tanh z) / 2 = sigmoid(2 z).
          A sigmoid neither overflows nor cancels, where 1 + tanh(z) loses every digit for z << 0.
Backward  f'(g) = s + g * s * (1 - s) * t'(g);   dgate = dy * up * f'(gate),   dup = dy * f(gate)
          Nothing but gate_up is saved: f is computed again, and with it y, which the next product's backward needs.
Shapes    gate_up, d_gate_up [T, 2 I], the gate first; y, dy [T, I].  T = tokens, I = intermediate_size.
Dtypes    float32 or 16-bit; all arithmetic float32.
Rounding  f(gate) is rounded to the working dtype before the product, as the separate activation would.
Source    Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div, partial_row_tile, with_contiguous_rows


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """f(gate) and f'(gate), in float32."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid)
    else:
        tl.static_assert(ACTIVATION == "gelu_pytorch_tanh", "the activation is silu or gelu_pytorch_tanh")
        square = gate * gate
        # 2 sqrt(2/pi), and its product with 0.044715.
        sigmoid = tl.sigmoid(gate * (1.5957691216057308 + 0.07135481627260025 * square))
        slope = 1.5957691216057308 + 3.0 * 0.07135481627260025 * square
        return gate * sigmoid, sigmoid + gate * sigmoid * (1.0 - sigmoid) * slope


@triton.jit
def glu_forward_kernel(
    gate_up_ptr,
    y_ptr,
    stride_gate_up_row,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """This program computes BLOCK_COLUMNS outputs of one row."""
    # One grid dimension, because the second may not exceed 65535; neighbours share a row.
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    gate_ptr = gate_up_ptr + row * stride_gate_up_row + column
    gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=exists, other=0.0).to(tl.float32)
    activated, _ = activate(gate, ACTIVATION)
    activated = activated.to(y_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + column, (activated * up).to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def glu_backward_kernel(
    dy_ptr,
    gate_up_ptr,
    d_gate_up_ptr,
    y_ptr,
    stride_dy_row,
    stride_gate_up_row,
    stride_d_gate_up_row,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """This program differentiates BLOCK_COLUMNS outputs of one row; `d_gate_up_ptr` may be `gate_up_ptr`."""
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    gate_ptr = gate_up_ptr + row * stride_gate_up_row + column
    gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=exists, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=exists, other=0.0).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    activated = activated.to(y_ptr.dtype.element_ty).to(tl.float32)
    d_gate_ptr = d_gate_up_ptr + row * stride_d_gate_up_row + column
    tl.store(d_gate_ptr, (dy * up * slope).to(y_ptr.dtype.element_ty), mask=exists)
    tl.store(d_gate_ptr + WIDTH, (dy * activated).to(y_ptr.dtype.element_ty), mask=exists)
    tl.store(y_ptr + row * WIDTH + column, (activated * up).to(y_ptr.dtype.element_ty), mask=exists)


def glu_forward(gate_up: Tensor, *, activation: Activation) -> Tensor:
    """`f(gate) * up` for gate_up [T, 2 I] (any row stride), the gate in the first half of a row. Returns [T, I]."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * width, f"gate_up {tuple(gate_up.shape)} has no two halves"
    gate_up = with_contiguous_rows(gate_up)
    y = gate_up.new_empty((num_tokens, width))
    tile = partial_row_tile(width)
    glu_forward_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        gate_up,
        y,
        gate_up.stride(0),
        WIDTH=width,
        ACTIVATION=activation,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return y


def glu_backward(
    dy: Tensor, gate_up: Tensor, *, activation: Activation, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradient of `glu_forward`, and its output once more.

    Args:
        dy: [T, I].
        gate_up: [T, 2 I], any row stride.
        inplace: overwrite `gate_up` with its gradient (its last dimension must be contiguous).
    Returns: d_gate_up [T, 2 I], which is `gate_up` if `inplace`; y [T, I].
    """
    num_tokens, width = dy.shape
    assert gate_up.shape == (num_tokens, 2 * width), f"dy {tuple(dy.shape)}, gate_up {tuple(gate_up.shape)}"
    assert not inplace or gate_up.stride(-1) == 1, "overwriting gate_up needs contiguous rows"
    dy, gate_up = with_contiguous_rows(dy), with_contiguous_rows(gate_up)
    d_gate_up = gate_up if inplace else gate_up.new_empty(gate_up.shape)
    y = gate_up.new_empty(dy.shape)
    tile = partial_row_tile(width)
    glu_backward_kernel[(num_tokens * ceil_div(width, tile.columns),)](
        dy,
        gate_up,
        d_gate_up,
        y,
        dy.stride(0),
        gate_up.stride(0),
        d_gate_up.stride(0),
        WIDTH=width,
        ACTIVATION=activation,
        BLOCK_COLUMNS=tile.columns,
        num_warps=tile.warps,
    )
    return d_gate_up, y
