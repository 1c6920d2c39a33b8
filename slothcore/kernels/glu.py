"""Gated linear unit: an activated gate times a linear branch, both halves of one tensor.

Forward   y = f(gate) * up
          Both activations are a sigmoid gate, f(g) = g * s with s = sigmoid(t(g)):
            SiLU        t = g
            tanh-GELU   t = 2 z, z = sqrt(2/pi) (g + 0.044715 g^3), because (1 + tanh z) / 2 = sigmoid(2 z).
          A sigmoid neither overflows nor cancels, where 1 + tanh(z) loses every digit for z << 0.
Backward  f'(g) = s + g * s * (1 - s) * t'(g);   dgate = dy * up * f'(gate),   dup = dy * f(gate)
          Nothing but gate_up is saved: f is computed again, and with it y, if the next product's backward needs it.
          If all that it needs is the gradient of a LoRA factor there, dA = v^T y, that is summed in the same pass and
          y never reaches memory: a program owns a strip of columns and a share of the rows.
Shapes    gate_up, d_gate_up [T, 2 I], the gate first; y, dy [T, I]; v [T, R]; dA [R, I].
          T = tokens, I = intermediate_size, R = rank.
Dtypes    float32 or 16-bit; all arithmetic and dA float32.
Rounding  f(gate) is rounded to the working dtype before the product, as the separate activation would; y also where it
          only meets v.
Order     dA is summed inside each program, then over the shares of the rows; no atomics.
Source    Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slothcore.kernels.early import signal_early, wait_early
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div, next_power_of_2, partial_row_tile, with_contiguous_rows


class StripTile(NamedTuple):
    """What one program of the pass with dA holds at a time, and into how many shares the rows are cut."""

    rows: int
    columns: int
    warps: int
    stages: int
    shares: int


STRIP_TILE = StripTile(rows=64, columns=128, warps=8, stages=3, shares=8)

# Tensor cores take at least 16 columns; above 32 the registers of a tile run out.
SMALLEST_DOT = 16
LARGEST_RANK = 32


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
    EARLY: tl.constexpr,
):
    """This program computes BLOCK_COLUMNS outputs of one row."""
    signal_early(EARLY)
    wait_early(EARLY)
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
    dtype: tl.constexpr = gate_up_ptr.dtype.element_ty
    pieces: tl.constexpr = (WIDTH + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    exists = column < WIDTH
    gate_ptr = gate_up_ptr + row * stride_gate_up_row + column
    gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH, mask=exists, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy_row + column, mask=exists, other=0.0).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    activated = activated.to(dtype).to(tl.float32)
    d_gate_ptr = d_gate_up_ptr + row * stride_d_gate_up_row + column
    tl.store(d_gate_ptr, (dy * up * slope).to(dtype), mask=exists)
    tl.store(d_gate_ptr + WIDTH, (dy * activated).to(dtype), mask=exists)
    if y_ptr is not None:
        tl.store(y_ptr + row * WIDTH + column, (activated * up).to(dtype), mask=exists)


@triton.jit(do_not_specialize=["T", "tiles_per_share"])
def glu_backward_and_dA_kernel(
    dy_desc,
    gate_up_desc,
    d_gate_up_desc,
    v_ptr,
    dA_part_ptr,
    T,
    tiles_per_share,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program differentiates TILE_N outputs of a share of the rows, and sums their part of dA [RANK, WIDTH]."""
    dtype: tl.constexpr = gate_up_desc.dtype
    first_column = tl.program_id(0) * TILE_N
    share = tl.program_id(1)
    rank = tl.arange(0, TILE_R)
    dA = tl.zeros([TILE_N, TILE_R], tl.float32)
    end = tl.minimum((share + 1) * tiles_per_share * TILE_T, T)
    for first_row in tl.range(share * tiles_per_share * TILE_T, end, TILE_T, num_stages=STAGES):
        rows = first_row + tl.arange(0, TILE_T)
        exists = (rows < T)[:, None] & (rank < RANK)[None, :]
        gate = gate_up_desc.load([first_row, first_column]).to(tl.float32)
        up = gate_up_desc.load([first_row, WIDTH + first_column]).to(tl.float32)
        dy = dy_desc.load([first_row, first_column]).to(tl.float32)
        v = tl.load(v_ptr + rows[:, None] * RANK + rank[None, :], mask=exists, other=0.0)
        activated, slope = activate(gate, ACTIVATION)
        activated = activated.to(dtype).to(tl.float32)
        d_gate_up_desc.store([first_row, first_column], (dy * up * slope).to(dtype))
        d_gate_up_desc.store([first_row, WIDTH + first_column], (dy * activated).to(dtype))
        # Rows beyond T are zeros in gate_up, so in y.
        dA = tl.dot((activated * up).to(dtype).T, v, dA, input_precision="ieee")
    columns = first_column + tl.arange(0, TILE_N)
    at = (share * RANK + rank[None, :]) * WIDTH + columns[:, None]
    tl.store(dA_part_ptr + at, dA, mask=(rank < RANK)[None, :])


def glu_forward(gate_up: Tensor, *, activation: Activation, early: bool = False) -> Tensor:
    """`f(gate) * up` for gate_up [T, 2 I] (any row stride), the gate in the first half of a row. Returns [T, I].

    early: begin while the kernel in front ends, see early.py.
    """
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
        EARLY=early,
        num_warps=tile.warps,
        launch_pdl=early,
    )
    return y


def glu_backward(
    dy: Tensor, gate_up: Tensor, *, activation: Activation, inplace: bool = False, output: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `glu_forward`, and its output once more.

    Args:
        dy: [T, I].
        gate_up: [T, 2 I], any row stride.
        inplace: overwrite `gate_up` with its gradient (its last dimension must be contiguous).
        output: whether y is wanted.
    Returns: d_gate_up [T, 2 I], which is `gate_up` if `inplace`; y [T, I] or None.
    """
    num_tokens, width = dy.shape
    assert gate_up.shape == (num_tokens, 2 * width), f"dy {tuple(dy.shape)}, gate_up {tuple(gate_up.shape)}"
    assert not inplace or gate_up.stride(-1) == 1, "overwriting gate_up needs contiguous rows"
    dy, gate_up = with_contiguous_rows(dy), with_contiguous_rows(gate_up)
    d_gate_up = gate_up if inplace else gate_up.new_empty(gate_up.shape)
    y = gate_up.new_empty(dy.shape) if output else None
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


def one_pass_pays(rows: int, columns: int) -> bool:
    """Whether `glu_backward_and_dA` beats `glu_backward` and a product with a [rows, columns] y.

    H100, 8192 x 14336, R = 16: 0.43 ms against 0.56. It saves writing and reading y; with few rows or narrow ones there
    are too few programs, and a launch costs more than that.
    """
    return rows >= 4096 and columns >= 8192


def takes_dA(dy: Tensor, gate_up: Tensor, v: Tensor) -> bool:
    """Whether `glu_backward_and_dA` is able to take these tensors, and the better way; it needs Hopper."""
    return (
        one_pass_pays(*dy.shape)
        and dy.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(dy.device)[0] == 9
        and v.shape[1] <= LARGEST_RANK
        and dy.shape[1] % STRIP_TILE.columns == 0
        and v.is_contiguous()
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (dy, gate_up))
    )


def glu_backward_and_dA(
    dy: Tensor,
    gate_up: Tensor,
    v: Tensor,
    *,
    activation: Activation,
    inplace: bool = False,
    _tile: StripTile = STRIP_TILE,
) -> tuple[Tensor, Tensor]:
    """Gradient of `glu_forward`, and what the next map's LoRA factor A needs of its output y: dA = v^T y.

    Args:
        dy: [T, I], contiguous rows; I a multiple of the tile's columns.
        gate_up: [T, 2 I], contiguous rows.
        v: [T, R] contiguous, R at most 32.
        inplace: overwrite `gate_up` with its gradient.
        _tile: for tests and sweeps.
    Returns: d_gate_up [T, 2 I], which is `gate_up` if `inplace`; dA [R, I] float32.
    """
    num_tokens, width = dy.shape
    rank = v.shape[1]
    assert width % _tile.columns == 0, f"strips of {_tile.columns} columns do not fit {width}"
    d_gate_up = gate_up if inplace else torch.empty_like(gate_up)
    parts = dy.new_empty((_tile.shares, rank, width), dtype=torch.float32)
    tile = [_tile.rows, _tile.columns]
    dy_desc, gate_up_desc, d_gate_up_desc = (
        TensorDescriptor(t, list(t.shape), list(t.stride()), tile) for t in (dy, gate_up, d_gate_up)
    )
    glu_backward_and_dA_kernel[(width // _tile.columns, _tile.shares)](
        dy_desc,
        gate_up_desc,
        d_gate_up_desc,
        v,
        parts,
        num_tokens,
        ceil_div(ceil_div(num_tokens, _tile.rows), _tile.shares),
        WIDTH=width,
        RANK=rank,
        ACTIVATION=activation,
        TILE_T=_tile.rows,
        TILE_N=_tile.columns,
        TILE_R=max(SMALLEST_DOT, next_power_of_2(rank)),
        STAGES=_tile.stages,
        num_warps=_tile.warps,
    )
    return d_gate_up, parts.sum(0)
