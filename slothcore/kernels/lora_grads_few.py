"""Gradients of the LoRA factors at few tokens: dA and dB of several projections in one launch.

    dA_i = s * (v_i^T (r * h)),   dB_i = c_i dy_i^T u_i     for x = s * r * h, as a norm makes it; or x = h, r = s = 1

Both are a wide matrix, transposed, times a narrow one. A program owns a strip of columns of h or of dy, walks down all
rows with its sums in registers, and writes them where the gradients are to lie.

Shapes    h [T, K]; v, u [T, R]; dy [T, N]; r [T]; s = weight + offset [K]; dA_i [r_i, K]; dB_i [N_i, r_i].
          T = tokens, K = in_features, N = sum N_i, R = sum of the ranks r_i, each rounded up to a multiple of 8 as
          `lora_factors.py` does; c_i = scaling, of which v has its part already.
Dtypes    h, v, dy, u one 16-bit dtype (float32 too in Triton's interpreter); r, sums, dA_i and dB_i float32.
Rounding  r * h rounds once to h's dtype, as the norm rounds it; it is about 1, so float16 takes it as well as bfloat16.
Order     every sum goes down the rows: no atomics, and nothing depends on the GPU.
Source    Hu et al. 2021, arXiv:2106.09685; the norm's part is derived in `slothcore.autograd.lora_source`.

With few tokens such products take about as long as a launch. cuBLAS needs two for each (it splits the sum to fill the
GPU, and adds the parts), and r * h, s and c_i more of them: six to eight in all, where this is one.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.gpu import has_tensor_cores
from slothcore.kernels.launch import ceil_div, next_power_of_2
from slothcore.kernels.lora_factors import LARGEST_GROUP
from slothcore.kernels.lora_factors_eager import padded_rank
from slothcore.kernels.lora_grads_eager import ColumnScale, blocks_apart, ranks_apart


class StripTile(NamedTuple):
    """What one program holds at a time: [rows, columns] of h or dy."""

    rows: int
    columns: int
    warps: int
    stages: int


STRIP_TILE = StripTile(rows=64, columns=64, warps=4, stages=3)

# Up to here one walk down all rows is short; above, a product is worth its launches.
FEW_TOKENS = 1024

# Tensor cores take at least 16 columns; above 128 the registers of a strip run out.
SMALLEST_DOT = 16
LARGEST_RANKS = 128


def takes_one_launch(h: Tensor | None, dy: Tensor | None, *, ranks: Sequence[int]) -> bool:
    """Whether `factor_grads` is able to take these tensors, and the better way; either may be None."""
    wide = [t for t in (h, dy) if t is not None]
    return (
        bool(wide)
        and all(0 < len(t) <= FEW_TOKENS and t.stride(1) == 1 for t in wide)
        and wide[0].dtype in (torch.bfloat16, torch.float16)
        and has_tensor_cores(wide[0].device)
        and len(ranks) <= LARGEST_GROUP
        and 0 < sum(map(padded_rank, ranks)) <= LARGEST_RANKS
    )


@triton.jit
def _strip_product(
    wide_ptr, stride_row, column, has_column, narrow_ptr, rank, has_rank, RANKS: tl.constexpr, rstd_ptr, T,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """wide^T narrow for some columns of each, [TILE_N, TILE_R], the rows of `wide` times rstd if that is given."""
    product = tl.zeros([TILE_N, TILE_R], tl.float32)
    for first_row in tl.range(0, T, TILE_T, num_stages=STAGES):
        row = first_row + tl.arange(0, TILE_T)
        exists = row < T
        wide_ptrs = wide_ptr + row.to(tl.int64)[:, None] * stride_row + column[None, :]
        wide = tl.load(wide_ptrs, mask=exists[:, None] & has_column[None, :], other=0.0)
        narrow_ptrs = narrow_ptr + row[:, None] * RANKS + rank[None, :]
        narrow = tl.load(narrow_ptrs, mask=exists[:, None] & has_rank[None, :], other=0.0)
        if rstd_ptr is not None:
            rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)
            wide = (wide.to(tl.float32) * rstd[:, None]).to(wide_ptr.dtype.element_ty)
        product = tl.dot(wide.T, narrow, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["T"])
def lora_factor_grads_kernel(
    h_ptr, v_ptr, rstd_ptr, weight_ptr, dA_ptr, dy_ptr, u_ptr, dB_ptr,
    stride_h_row, stride_dy_row, T, weight_offset, scaling_0, scaling_1, scaling_2,
    WIDTH: tl.constexpr,
    ROWS_0: tl.constexpr, ROWS_1: tl.constexpr, ROWS_2: tl.constexpr,
    RANK_0: tl.constexpr, RANK_1: tl.constexpr, RANK_2: tl.constexpr,
    COLUMN_1: tl.constexpr, COLUMN_2: tl.constexpr, RANKS: tl.constexpr,
    TILE_T: tl.constexpr, TILE_N: tl.constexpr, TILE_A: tl.constexpr, TILE_B: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """This program sums TILE_N columns of dA or, after the programs of dA, TILE_N rows of one dB_i.

    dA is [RANKS, WIDTH]; WIDTH is 0 if it is not wanted. The dB_i, if any, lie end to end at `dB_ptr`; projection i has
    ROWS_i columns of dy, and RANK_i ranks from COLUMN_i on (COLUMN_0 is 0).
    """
    strips_of_A: tl.constexpr = (WIDTH + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    if program < strips_of_A:
        if WIDTH > 0:
            feature = program * TILE_N + tl.arange(0, TILE_N)
            has_feature = feature < WIDTH
            joined_rank = tl.arange(0, TILE_A)
            has_joined_rank = joined_rank < RANKS
            dA = _strip_product(
                h_ptr, stride_h_row, feature, has_feature, v_ptr, joined_rank, has_joined_rank, RANKS, rstd_ptr,
                T, TILE_T, TILE_N, TILE_A, STAGES,
            )  # fmt: skip
            if weight_ptr is not None:
                scale = tl.load(weight_ptr + feature, mask=has_feature, other=0.0).to(tl.float32) + weight_offset
                dA = dA * scale[:, None]
            dA_ptrs = dA_ptr + joined_rank[None, :] * WIDTH + feature[:, None]
            tl.store(dA_ptrs, dA, mask=has_feature[:, None] & has_joined_rank[None, :])
    elif dB_ptr is not None:
        # A projection without ranks has no strips.
        second: tl.constexpr = (ROWS_0 + TILE_N - 1) // TILE_N * (RANK_0 > 0)
        third: tl.constexpr = second + (ROWS_1 + TILE_N - 1) // TILE_N * (RANK_1 > 0)
        strip = program - strips_of_A
        is_1 = strip >= second
        is_2 = strip >= third
        rows = tl.where(is_2, ROWS_2, tl.where(is_1, ROWS_1, ROWS_0))
        ranks = tl.where(is_2, RANK_2, tl.where(is_1, RANK_1, RANK_0))
        scaling = tl.where(is_2, scaling_2, tl.where(is_1, scaling_1, scaling_0))
        first_column = tl.where(is_2, ROWS_0 + ROWS_1, tl.where(is_1, ROWS_0, 0))
        first_rank = tl.where(is_2, COLUMN_2, tl.where(is_1, COLUMN_1, 0))
        first_element = tl.where(is_2, ROWS_0 * RANK_0 + ROWS_1 * RANK_1, tl.where(is_1, ROWS_0 * RANK_0, 0))

        column = (strip - tl.where(is_2, third, tl.where(is_1, second, 0))) * TILE_N + tl.arange(0, TILE_N)
        has_column = column < rows
        rank = tl.arange(0, TILE_B)
        has_rank = rank < ranks
        dB = _strip_product(
            dy_ptr, stride_dy_row, first_column + column, has_column, u_ptr, first_rank + rank, has_rank, RANKS, None,
            T, TILE_T, TILE_N, TILE_B, STAGES,
        )  # fmt: skip
        element = first_element + column[:, None] * ranks + rank[None, :]
        tl.store(dB_ptr + element, dB * scaling, mask=has_column[:, None] & has_rank[None, :])


def factor_grads(
    h: Tensor | None,
    v: Tensor | None,
    dy: Tensor | None,
    u: Tensor | None,
    *,
    out_features: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    rstd: Tensor | None = None,
    scale: ColumnScale | None = None,
    _tile: StripTile = STRIP_TILE,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients of the factors of one to three projections, at least one of them with LoRA.

    Args:
        h: [T, K], contiguous rows of any stride; None, as v then is, if no dA is wanted.
        v: [T, R].
        dy: [T, N], contiguous rows of any stride; None, as u then is, if no dB is wanted.
        u: [T, R].
        out_features: of each projection.
        ranks: of each, without padding; 0 for one without LoRA, whose gradients are None.
        scalings: c_i, for dB.
        rstd: r [T] float32 if x is the output of a norm; None if it is h.
        scale: s, likewise.
        _tile: for tests and sweeps.
    Returns: dA_i [r_i, K] and dB_i [N_i, r_i] of each projection, contiguous, float32.
    """
    assert (h is None) == (v is None), "dA needs both h and v"
    assert (dy is None) == (u is None), "dB needs both dy and u"
    narrow = v if v is not None else u
    assert narrow is not None, "neither dA nor dB is wanted"
    absent = LARGEST_GROUP - len(ranks)
    starts = list(accumulate(map(padded_rank, ranks), initial=0))
    _, column_1, column_2 = starts[:-1] + [0] * absent
    rows_0, rows_1, rows_2 = [*out_features] + [0] * absent
    rank_0, rank_1, rank_2 = [*ranks] + [0] * absent
    scaling_0, scaling_1, scaling_2 = [*scalings] + [1.0] * absent

    width = 0 if h is None else h.shape[1]
    dA = None if h is None else narrow.new_empty((starts[-1], width), dtype=torch.float32)
    size = sum(n * rank for n, rank in zip(out_features, ranks, strict=True))
    dB = None if dy is None else narrow.new_empty(size, dtype=torch.float32)
    programs = ceil_div(width, _tile.columns)
    if dB is not None:
        programs += sum(ceil_div(n, _tile.columns) for n, rank in zip(out_features, ranks, strict=True) if rank)
    lora_factor_grads_kernel[(programs,)](
        h, None if v is None else v.contiguous(), rstd, None if scale is None else scale.weight.contiguous(), dA,
        dy, None if u is None else u.contiguous(), dB,
        0 if h is None else h.stride(0), 0 if dy is None else dy.stride(0), len(narrow),
        0.0 if scale is None else scale.offset, scaling_0, scaling_1, scaling_2,
        WIDTH=width, ROWS_0=rows_0, ROWS_1=rows_1, ROWS_2=rows_2, RANK_0=rank_0, RANK_1=rank_1, RANK_2=rank_2,
        COLUMN_1=column_1, COLUMN_2=column_2, RANKS=starts[-1],
        TILE_T=_tile.rows, TILE_N=_tile.columns,
        TILE_A=max(SMALLEST_DOT, next_power_of_2(starts[-1])), TILE_B=max(SMALLEST_DOT, next_power_of_2(max(ranks))),
        STAGES=_tile.stages, num_warps=_tile.warps,
    )  # fmt: skip
    none: list[Tensor | None] = [None] * len(ranks)
    every_dB = none if dB is None else blocks_apart(dB, out_features, ranks)
    return none if dA is None else ranks_apart(dA, ranks), every_dB
