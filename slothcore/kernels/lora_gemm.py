"""A dense linear map with its LoRA term in the same accumulator, for Hopper's tensor cores.

Forward   y  = x W^T + u B^T + b,   u = x A^T as the caller computed it, scaling folded into B
Backward  dx = dy W + v A,          v = dy B
Shapes    x [M, K]; W [N, K]; u, v [M, R]; B [N, R]; b [N]; A [R, K]; y, dy [M, N].
          M = rows (tokens), K = in_features, N = out_features, R = rank.
Dtypes    one dtype for everything; the kernel takes 16-bit ones (float32 too in Triton's interpreter).
Rounding  the kernel sums everything in float32 and rounds once; the other path rounds as `lora_gemm_eager` does.
Source    Hu et al. 2021, arXiv:2106.09685.

Both products are left @ right with a second, short pair (u, B or v, A) that continues the sum. A separate product for
it would read and write the whole output again, 10 to 18% of the time at R = 16; here it is one more step of the inner
loop. The step must not be a branch with a second dot, which would break the software pipeline, so the loop selects
which *descriptor* it loads from: that compiles to one select of a pointer, and the pipeline never notices. What
lies beyond K or R is filled with zeros by the copy engine, so neither has to be a multiple of the tile.

The kernel is persistent: one program a multiprocessor, each walking over output tiles, with the outer loop flattened
into the inner one so that the first loads of a tile overlap the stores of the one before. Descriptors are made on the
host: made on the device they would need scratch memory from a process-wide allocator (`triton.set_allocator`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slothcore.kernels import lora_gemm_eager
from slothcore.kernels.gpu import copy_engine_takes, device_capability, multiprocessors
from slothcore.kernels.launch import ceil_div


class Tile(NamedTuple):
    """What one program computes at a time: a [rows, columns] piece of the output, `inner` summands a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


HOPPER_TILE = Tile(rows=128, columns=256, inner=64, warps=8, stages=3)

# Neighbouring tiles share their operands in the second-level cache: walk this many tiles down before going right.
ROW_TILES_TOGETHER = 8

# Up to this many rows a step waits for the host, and four TMA descriptors cost the host more than a second product.
FEW_ROWS = 512

# Programs under Triton's interpreter: few enough that small tests make one program walk over several tiles.
INTERPRETER_PROGRAMS = 3


def choose_tile(
    rows: int, columns: int, *, dtype: torch.dtype, capability_major: int, multiprocessors: int
) -> Tile | None:
    """The tile for a [rows, columns] output, or None where cuBLAS with a separate LoRA product is the better way.

    | GPU, dtype                   | output              | path   | why                                            |
    | ---------------------------- | ------------------- | ------ | ---------------------------------------------- |
    | Hopper, 16-bit               | at most 512 rows    | cuBLAS | 1.14-1.17 of the bare product's time, kernel   |
    |                              |                     |        | 1.19-1.21 (28672 x 4096, 512 rows, H100), and  |
    |                              |                     |        | 55 us less host time a call                    |
    | Hopper, 16-bit               | tiles for every SM  | kernel | equals cuBLAS and the LoRA term is nearly free |
    | Hopper, 16-bit               | fewer tiles         | cuBLAS | it has smaller tiles and splits the inner sum  |
    | older or newer, or 32/64-bit | any                 | cuBLAS | no TMA; other shared memory; no tensor cores   |
    """
    if rows <= FEW_ROWS or capability_major != 9 or dtype not in (torch.bfloat16, torch.float16):
        return None
    tiles = ceil_div(rows, HOPPER_TILE.rows) * ceil_div(columns, HOPPER_TILE.columns)
    return HOPPER_TILE if tiles >= multiprocessors else None


@triton.jit(do_not_specialize=["M", "N", "K", "R"])
def lora_gemm_kernel(
    left_desc,
    right_desc,
    lora_left_desc,
    lora_right_desc,
    bias_ptr,
    out_desc,
    M,
    N,
    K,
    R,
    TRANSPOSE_RIGHT: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [M, N] = left [M, K] right + lora_left [M, R] lora_right + bias.

    right is [N, K] and lora_right [N, R] if TRANSPOSE_RIGHT, else [K, N] and [R, N].
    This program computes the output tiles program_id, program_id + num_programs, ...
    """
    tiles_m = tl.cdiv(M, TILE_M)
    tiles_n = tl.cdiv(N, TILE_N)
    base_steps = tl.cdiv(K, TILE_K)
    steps = base_steps
    if HAS_LORA:
        steps += tl.cdiv(R, TILE_K)
    tiles_in_band = ROW_TILES * tiles_n

    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        band_start = tile // tiles_in_band * ROW_TILES
        band_height = min(tiles_m - band_start, ROW_TILES)
        row = (band_start + tile % tiles_in_band % band_height) * TILE_M
        column = tile % tiles_in_band // band_height * TILE_N

        accumulator = tl.zeros((TILE_M, TILE_N), tl.float32)
        for step in tl.range(steps, num_stages=STAGES):
            a_desc = left_desc
            b_desc = right_desc
            inner = step * TILE_K
            if HAS_LORA:  # noqa: SIM102 - resolved at compile time, so it must stand alone
                if step >= base_steps:
                    a_desc = lora_left_desc
                    b_desc = lora_right_desc
                    inner = (step - base_steps) * TILE_K
            a = a_desc.load([row, inner])
            if TRANSPOSE_RIGHT:
                b = b_desc.load([column, inner]).T
            else:
                b = b_desc.load([inner, column])
            accumulator = tl.dot(a, b, accumulator, input_precision="ieee")

        if HAS_BIAS:
            columns = column + tl.arange(0, TILE_N)
            accumulator += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        # Half a tile at a time: the store's staging buffer then fits beside the pipeline's.
        halves = tl.permute(tl.reshape(accumulator, (TILE_M, 2, TILE_N // 2)), (0, 2, 1))
        first, second = tl.split(halves)
        out_desc.store([row, column], first.to(out_desc.dtype))
        out_desc.store([row, column + TILE_N // 2], second.to(out_desc.dtype))


def linear_add(
    x: Tensor,
    weight: Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    _path: Tile | Literal["matmul"] | None = None,
) -> Tensor:
    """Return x W^T + lora_x lora_B^T + bias.

    Args:
        x: [M, K], any strides.
        weight: [N, K].
        lora_x: [M, R], or None for no LoRA term.
        lora_B: [N, R] with the scaling folded in; given exactly if `lora_x` is.
        bias: [N] contiguous, or None.
        out: [M, N] to write into, for example columns of a wider tensor.
        _path: overrules `choose_tile`, for tests and sweeps.
    """
    tile = _tile_for(x, weight.shape[0], (x, weight, lora_x, lora_B, out)) if _path is None else _path
    if tile is None or tile == "matmul":
        return lora_gemm_eager.linear_add(x, weight, lora_x=lora_x, lora_B=lora_B, bias=bias, out=out)
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _launch(x, weight, lora_x, lora_B, bias, out, tile, transpose_right=True)
    return out


def linear_input_grad(
    dy: Tensor,
    weight: Tensor,
    *,
    lora_dy: Tensor | None = None,
    lora_A: Tensor | None = None,
    _path: Tile | Literal["matmul"] | None = None,
) -> Tensor:
    """Return dy W + lora_dy lora_A, the gradient of `linear_add` with respect to its x.

    Args:
        dy: [M, N], any strides.
        weight: [N, K].
        lora_dy: [M, R], or None for no LoRA term.
        lora_A: [R, K]; given exactly if `lora_dy` is.
        _path: overrules `choose_tile`, for tests and sweeps.
    """
    tile = _tile_for(dy, weight.shape[1], (dy, weight, lora_dy, lora_A)) if _path is None else _path
    if tile is None or tile == "matmul":
        return lora_gemm_eager.linear_input_grad(dy, weight, lora_dy=lora_dy, lora_A=lora_A)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    _launch(dy, weight, lora_dy, lora_A, None, dx, tile, transpose_right=False)
    return dx


def _tile_for(left: Tensor, columns: int, operands: Sequence[Tensor | None]) -> Tile | None:
    """`choose_tile` for real tensors: None also where an operand's layout is beyond the copy engine."""
    capability = device_capability(left.device)
    assert capability is not None
    tile = choose_tile(
        left.shape[0],
        columns,
        dtype=left.dtype,
        capability_major=capability[0],
        multiprocessors=multiprocessors(left.device),
    )
    if tile is None:
        return None
    # An output that the kernel makes itself has `columns` elements a row.
    aligned = columns * left.element_size() % 16 == 0 and all(copy_engine_takes(t) for t in operands if t is not None)
    return tile if aligned else None


def _launch(
    left: Tensor,
    right: Tensor,
    lora_left: Tensor | None,
    lora_right: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    tile: Tile,
    *,
    transpose_right: bool,
) -> None:
    rows, columns = out.shape
    left_block = [tile.rows, tile.inner]
    right_block = [tile.columns, tile.inner] if transpose_right else [tile.inner, tile.columns]
    left_desc, right_desc = _describe(left, left_block), _describe(right, right_block)
    # Never read without a LoRA term, but a kernel's argument must be something.
    lora_left_desc, lora_right_desc, rank = left_desc, right_desc, 0
    if lora_left is not None and lora_right is not None:
        lora_left_desc, lora_right_desc = _describe(lora_left, left_block), _describe(lora_right, right_block)
        rank = lora_left.shape[1]
    tiles = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)
    programs = multiprocessors(left.device) if left.is_cuda else INTERPRETER_PROGRAMS
    lora_gemm_kernel[(min(programs, tiles),)](
        left_desc,
        right_desc,
        lora_left_desc,
        lora_right_desc,
        out if bias is None else bias,
        _describe(out, [tile.rows, tile.columns // 2]),
        rows,
        columns,
        left.shape[1],
        rank,
        TRANSPOSE_RIGHT=transpose_right,
        HAS_LORA=rank > 0,
        HAS_BIAS=bias is not None,
        TILE_M=tile.rows,
        TILE_N=tile.columns,
        TILE_K=tile.inner,
        ROW_TILES=ROW_TILES_TOGETHER,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
