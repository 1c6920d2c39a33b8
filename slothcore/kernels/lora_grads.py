"""Gradients of the LoRA factors: both products with dy in one read of it, and the joined gradients taken apart.

    y = x W^T + u B^T  with  u = x A^T  of several projections side by side, as `lora_factors.py` joins A and B

One pass   v = dy B,   dB = dy^T u.  B is block-diagonal, so the outputs of projection i meet the ranks of i alone:
           a program owns a strip of dy's columns and walks down all rows, with its rows of B and of dB in registers.
           It adds dy_strip^T u to dB and leaves dy_strip B, one part of v; the parts are summed afterwards.
Apart      dA_i = s * dA[ranks of i],   dB_i = c_i dB[rows of i, ranks of i], each contiguous as a gradient has to be,
           in one launch for all. s is what the columns of dA still lack if x is the output of a norm (see
           `slothcore.autograd.lora_source`); c_i is the scaling, of which v has its part through B.
Shapes     dy [T, N]; B, dB [N, R]; u, v [T, R]; dA [R, K]; s = weight + offset [K].
           T = tokens, K = in_features, N = sum of out_features, R = sum of ranks, each padded to a multiple of 8.
Dtypes     dy, B, u, v one 16-bit dtype (float32 too in Triton's interpreter); dA, dB float32.
Order      every sum has a fixed order, which depends on shapes alone: no atomics.
Source     Hu et al. 2021, arXiv:2106.09685.

dy of gate and up is the largest tensor of a step, and two products read it twice. The parts of v are float32: a rank of
r costs r / 128 of one read to write them and as much to read them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slothcore.kernels import lora_grads_eager
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.lora_factors import LARGEST_GROUP
from slothcore.kernels.lora_factors_eager import padded_rank
from slothcore.kernels.lora_grads_eager import ColumnScale, blocks_apart, ranks_apart

BLOCK = 1024
WARPS = 4


class Tile(NamedTuple):
    """What one program of the pass holds at a time: [rows, columns] of dy."""

    rows: int
    columns: int
    warps: int
    stages: int


TILE = Tile(rows=64, columns=256, warps=8, stages=3)

# Rows of v that one program sums over its parts.
SUM_ROWS = 64

# Tensor cores take at least 16 columns.
SMALLEST_DOT = 16


def one_pass_pays(rows: int, columns: int) -> bool:
    """Whether reading a [rows, columns] dy once beats two products, which split their sums better.

    H100, 8192 rows, R = 16 a projection, milliseconds for v and dB:

    | columns                     | two products | one pass |
    | --------------------------- | -----------: | -------: |
    | 28672 (gate and up of 8B)   |        0.357 |    0.216 |
    | 16384 (gate and up of 1B)   |        0.205 |    0.161 |
    | 6144 (q, k and v)           |        0.088 |    0.134 |
    | 4096 (o, down)              |        0.061 |    0.109 |

    One program owns 256 columns. With less than 64 of them too few multiprocessors read to reach the memory's rate.
    """
    return rows >= 4096 and columns >= 64 * TILE.columns


def takes_one_pass(dy: Tensor, B: Tensor, u: Tensor, *, out_features: Sequence[int], ranks: Sequence[int]) -> bool:
    """Whether `v_and_dB` is able to take these tensors, and the better way: see `one_pass_pays`.

    It needs Hopper's copy engine, projections of one rank, and strips of columns that belong to one projection each.
    """
    return (
        one_pass_pays(*dy.shape)
        and dy.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(dy.device)[0] == 9
        and len(ranks) <= LARGEST_GROUP
        and set(ranks) in ({8}, {16}, {32})
        and all(n % TILE.columns == 0 for n in out_features)
        and dy.stride(1) == 1
        and dy.stride(0) >= dy.shape[1]
        and dy.stride(0) % 8 == 0
        and dy.data_ptr() % 16 == 0
        and B.is_contiguous()
        and u.is_contiguous()
    )


@triton.jit
def _segment(strip, STRIP_1: tl.constexpr, STRIP_2: tl.constexpr):
    """The projection to which a strip of columns belongs; those of projection 1 begin at STRIP_1."""
    return (strip >= STRIP_1).to(tl.int32) + (strip >= STRIP_2).to(tl.int32)


@triton.jit(do_not_specialize=["T"])
def lora_v_and_dB_kernel(
    dy_desc,
    B_ptr,
    u_ptr,
    v_part_ptr,
    dB_ptr,
    T,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    STRIP_1: tl.constexpr,
    STRIP_2: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """This program owns TILE_N columns of dy: their rows of dB, and their part [T, RANK] of v."""
    strip = tl.program_id(0)
    rank = tl.arange(0, TILE_R)
    has_rank = (rank < RANK)[None, :]
    rank_in_all = _segment(strip, STRIP_1, STRIP_2) * RANK + rank
    columns = strip * TILE_N + tl.arange(0, TILE_N)
    B = tl.load(B_ptr + columns[:, None] * RANKS + rank_in_all[None, :], mask=has_rank, other=0.0)
    dB = tl.zeros([TILE_N, TILE_R], tl.float32)
    part_ptr = v_part_ptr + T.to(tl.int64) * RANK * strip
    for first_row in tl.range(0, T, TILE_T, num_stages=STAGES):
        rows = first_row + tl.arange(0, TILE_T)
        exists = (rows < T)[:, None] & has_rank
        dy = dy_desc.load([first_row, strip * TILE_N])
        u = tl.load(u_ptr + rows[:, None] * RANKS + rank_in_all[None, :], mask=exists, other=0.0)
        v = tl.dot(dy, B, input_precision="ieee")
        dB = tl.dot(dy.T, u, dB, input_precision="ieee")
        tl.store(part_ptr + rows[:, None] * RANK + rank[None, :], v, mask=exists)
    tl.store(dB_ptr + columns[:, None] * RANKS + rank_in_all[None, :], dB, mask=has_rank)


@triton.jit(do_not_specialize=["T"])
def lora_sum_v_kernel(
    v_part_ptr,
    v_ptr,
    T,
    STRIPS: tl.constexpr,
    STRIP_1: tl.constexpr,
    STRIP_2: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    TILE_T: tl.constexpr,
    TILE_R: tl.constexpr,
):
    """This program sums TILE_T rows of one projection's v over the strips of its columns."""
    segment = tl.program_id(1)
    first = tl.where(segment == 0, 0, tl.where(segment == 1, STRIP_1, STRIP_2))
    last = tl.where(segment == 0, STRIP_1, tl.where(segment == 1, STRIP_2, STRIPS))
    rows = tl.program_id(0) * TILE_T + tl.arange(0, TILE_T)
    rank = tl.arange(0, TILE_R)
    exists = (rows < T)[:, None] & (rank < RANK)[None, :]
    total = tl.zeros([TILE_T, TILE_R], tl.float32)
    for strip in range(first, last):
        part_ptr = v_part_ptr + T.to(tl.int64) * RANK * strip
        total += tl.load(part_ptr + rows[:, None] * RANK + rank[None, :], mask=exists, other=0.0)
    v_ptrs = v_ptr + rows[:, None] * RANKS + segment * RANK + rank[None, :]
    tl.store(v_ptrs, total.to(v_ptr.dtype.element_ty), mask=exists)


def v_and_dB(
    dy: Tensor, B: Tensor, u: Tensor, *, out_features: Sequence[int], ranks: Sequence[int], _tile: Tile = TILE
) -> tuple[Tensor, Tensor]:
    """v = dy B and dB = dy^T u of one to three projections, dy read once.

    Args:
        dy: [T, N], contiguous rows.
        B: [N, R] block-diagonal, contiguous.
        u: [T, R] contiguous.
        out_features: of each projection, multiples of the tile's columns.
        ranks: of each, all the same: 8, 16 or 32.
        _tile: for tests and sweeps.
    Returns: v [T, R] in dy's dtype; dB [N, R] float32, of which only the blocks on the diagonal are written.
    """
    num_tokens, width = dy.shape
    rank, count = ranks[0], len(ranks)
    assert set(ranks) == {rank}, f"one pass needs projections of one rank, got {tuple(ranks)}"
    assert all(n % _tile.columns == 0 for n in out_features), f"strips of {_tile.columns} do not fit {out_features}"
    strips = width // _tile.columns
    # A projection that is not there begins behind the last strip.
    ends = [sum(out_features[: i + 1]) // _tile.columns for i in range(count)] + [strips] * (LARGEST_GROUP - count)
    layout = {"STRIP_1": ends[0], "STRIP_2": ends[1], "RANK": rank, "RANKS": count * rank}
    layout["TILE_R"] = max(SMALLEST_DOT, rank)
    v_parts = dy.new_empty((strips, num_tokens, rank), dtype=torch.float32)
    dB = dy.new_empty((width, count * rank), dtype=torch.float32)
    lora_v_and_dB_kernel[(strips,)](
        TensorDescriptor(dy, list(dy.shape), list(dy.stride()), [_tile.rows, _tile.columns]),
        B,
        u,
        v_parts,
        dB,
        num_tokens,
        TILE_T=_tile.rows,
        TILE_N=_tile.columns,
        STAGES=_tile.stages,
        num_warps=_tile.warps,
        **layout,
    )
    v = torch.empty_like(u)
    lora_sum_v_kernel[(ceil_div(num_tokens, SUM_ROWS), count)](
        v_parts, v, num_tokens, STRIPS=strips, TILE_T=SUM_ROWS, num_warps=WARPS, **layout
    )
    return v, dB


@triton.jit
def _block(values, block_ptr, element, scaling, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):
    """`values` with those elements replaced that lie in one block of dB: [ROWS, RANK], its rows RANKS apart."""
    if RANK > 0:
        inside = (element >= 0) & (element < ROWS * RANK)
        block = tl.load(block_ptr + element // RANK * RANKS + element % RANK, mask=inside, other=0.0)
        values = tl.where(inside, block * scaling, values)
    return values


@triton.jit
def lora_grads_apart_kernel(
    dA_ptr, weight_ptr, dB_ptr, apart_ptr,
    weight_offset, scaling_0, scaling_1, scaling_2,
    WIDTH: tl.constexpr,
    ROWS_0: tl.constexpr, ROWS_1: tl.constexpr, ROWS_2: tl.constexpr,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr,
    COLUMN_1: tl.constexpr, COLUMN_2: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """This program scales BLOCK elements of dA in place or, after the programs of dA, writes BLOCK elements of dB_i.

    The dB_i lie end to end at `apart_ptr`; the ranks of projection i begin at COLUMN_i. WIDTH is 0 if dA stays.
    """
    elements_of_A: tl.constexpr = RANKS * WIDTH
    programs_of_A: tl.constexpr = (elements_of_A + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    if program < programs_of_A:
        if WIDTH > 0:
            element = program * BLOCK + tl.arange(0, BLOCK)
            exists = element < elements_of_A
            scale = tl.load(weight_ptr + element % WIDTH, mask=exists, other=0.0).to(tl.float32) + weight_offset
            dA = tl.load(dA_ptr + element, mask=exists, other=0.0)
            tl.store(dA_ptr + element, dA * scale, mask=exists)
    else:
        element = (program - programs_of_A) * BLOCK + tl.arange(0, BLOCK)
        first_1: tl.constexpr = ROWS_0 * RANK_0
        first_2: tl.constexpr = first_1 + ROWS_1 * RANK_1
        block_1_ptr = dB_ptr + ROWS_0 * RANKS + COLUMN_1
        block_2_ptr = dB_ptr + (ROWS_0 + ROWS_1) * RANKS + COLUMN_2
        values = tl.zeros([BLOCK], dtype=tl.float32)
        values = _block(values, dB_ptr, element, scaling_0, ROWS_0, RANK_0, RANKS)
        values = _block(values, block_1_ptr, element - first_1, scaling_1, ROWS_1, RANK_1, RANKS)
        values = _block(values, block_2_ptr, element - first_2, scaling_2, ROWS_2, RANK_2, RANKS)
        tl.store(apart_ptr + element, values, mask=element < first_2 + ROWS_2 * RANK_2)


def grads_apart(
    dA: Tensor | None,
    dB: Tensor | None,
    *,
    out_features: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    scale: ColumnScale | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of each projection's factors out of the joined ones.

    Args:
        dA: [R, K] contiguous, overwritten; None if no dA is wanted.
        dB: [N, R] contiguous, of which the blocks on the diagonal are read; None if no dB is wanted.
        out_features: of each projection.
        ranks: of each, without padding; 0 for one without LoRA, whose gradients are None.
        scalings: c_i, for dB.
        scale: s, which the columns of dA lack; or None.
    Returns: dA_i [r_i, K] and dB_i [N_i, r_i] of each projection, contiguous, in the dtypes of dA and dB.
    """
    count = len(ranks)
    if dA is None or dB is None or dB.dtype != torch.float32 or count > LARGEST_GROUP or (count == 1 and scale is None):
        # That is rare, or at most one operation.
        return lora_grads_eager.grads_apart(
            dA, dB, out_features=out_features, ranks=ranks, scalings=scalings, scale=scale
        )
    absent = LARGEST_GROUP - count
    starts = list(accumulate(map(padded_rank, ranks), initial=0))
    _, column_1, column_2 = starts[:-1] + [0] * absent
    rows_0, rows_1, rows_2 = [*out_features] + [0] * absent
    rank_0, rank_1, rank_2 = [*ranks] + [0] * absent
    scaling_0, scaling_1, scaling_2 = [*scalings] + [1.0] * absent

    apart = dB.new_empty(sum(n * rank for n, rank in zip(out_features, ranks, strict=True)))
    weight, offset = (apart, 0.0) if scale is None else (scale.weight.contiguous(), scale.offset)
    programs = ceil_div(apart.numel(), BLOCK) + (0 if scale is None else ceil_div(dA.numel(), BLOCK))
    lora_grads_apart_kernel[(programs,)](
        dA, weight, dB, apart,
        offset, scaling_0, scaling_1, scaling_2,
        WIDTH=0 if scale is None else dA.shape[1],
        ROWS_0=rows_0, ROWS_1=rows_1, ROWS_2=rows_2, RANK_0=rank_0, RANK_1=rank_1, RANK_2=rank_2,
        COLUMN_1=column_1, COLUMN_2=column_2, RANKS=starts[-1], BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return ranks_apart(dA, ranks), blocks_apart(apart, out_features, ranks)
