"""RMSNorm of few rows and, in the same launch, the inputs of the LoRA terms behind it: what decoding text asks for.

Forward   h = x + residual,   y = norm(h)           as in rms_norm.py
          u = y [A_1; A_2; ..]^T                    as in nf4_few.py
Shapes    x, residual, h, y [T, H]; weight [H]; A_i [r_i, H]; u [T, sum r_i]; rstd [T].  T = tokens, H = hidden_size.
Dtypes    those of rms_norm.py, A_i of any floating dtype; sums float32.
Rounding  That of the two operations apart, and their sums have the same order: the bits are the same.
Programs  One for a few ranks of a token. It has its rows of A by the time x is there, and then norms the row itself:
          that takes less time than a launch.
Source    Zhang & Sennrich 2019, arXiv:1910.07467; Hu et al. 2021, arXiv:2106.09685.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.launch import ceil_div, whole_row_tile, with_contiguous_rows
from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_few import FactorRows, factor_row, factor_rows

LONE_ROWS = 4
"""Up to here a program has one rank; above, where there are tokens enough to fill a GPU, RANKS_OF_MANY."""
RANKS_OF_MANY = 4
MOST_ROWS = 16
"""With more rows norming each row again for every few ranks takes longer than a launch."""
NARROWEST, WIDEST = 1025, 8192
"""Narrower, rms_norm.py has several rows in a program, and sums in another order; wider, the registers run out."""


@triton.jit(do_not_specialize=["rank_0", "rank_1", "rank_2"])
def rms_norm_few_kernel(
    x_ptr, residual_ptr, weight_ptr, A_0_ptr, A_1_ptr, A_2_ptr, y_ptr, h_ptr, rstd_ptr, u_ptr,
    stride_x_row, stride_residual_row, rank_0, rank_1, rank_2, eps, weight_offset,
    WIDTH: tl.constexpr, CAST_BEFORE_WEIGHT: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """This program norms one row and computes RANKS elements of its u; the first of a row stores y and h."""
    signal_early(EARLY)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token = tl.program_id(1).to(tl.int64)
    ranks = rank_0 + rank_1 + rank_2
    column = tl.arange(0, COLUMNS)
    inside = column < WIDTH
    scale = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32) + weight_offset
    factors = ()
    for i in tl.static_range(RANKS):
        # Ranks beyond the last repeat it; they are never stored.
        rank = tl.minimum(tl.program_id(0) * RANKS + i, ranks - 1)
        A_ptr = factor_row(A_0_ptr, A_1_ptr, A_2_ptr, rank_0, rank_1, rank, WIDTH)
        factors = factors + (tl.load(A_ptr + column, mask=inside, other=0.0).to(dtype),)  # noqa: RUF005
    wait_early(EARLY)

    h = tl.load(x_ptr + token * stride_x_row + column, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * stride_residual_row + column, mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        if tl.program_id(0) == 0:
            tl.store(h_ptr + token * WIDTH + column, h, mask=inside)
    h = h.to(tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(h * h, axis=0) / WIDTH + eps))
    normed = h * rstd
    if CAST_BEFORE_WEIGHT:
        normed = normed.to(dtype).to(tl.float32)
    y = (normed * scale).to(dtype)
    if tl.program_id(0) == 0:
        tl.store(rstd_ptr + token, rstd)
        tl.store(y_ptr + token * WIDTH + column, y, mask=inside)
    for i in tl.static_range(RANKS):
        u = tl.sum(y.to(tl.float32) * factors[i].to(tl.float32), axis=0)
        rank = tl.program_id(0) * RANKS + i
        tl.store(u_ptr + token * ranks + rank, u.to(dtype), mask=rank < ranks)


def takes(x: Tensor, lora_A: Factors) -> bool:
    """Whether `rms_norm_input` is the better way: few rows, of a width for which its bits are those of rms_norm.py."""
    rows, width = x.shape
    return 0 < rows <= MOST_ROWS and NARROWEST <= width <= WIDEST and any(A is not None for A in lora_A)


def rms_norm_input(
    x: Tensor,
    weight: Tensor,
    lora_A: Factors,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each row of `x`, or of `x + residual`, and multiply the result by the factors A of what reads it.

    Args:
        x: [T, H] float32 or 16-bit, any row stride.
        weight, eps, weight_offset, cast_before_weight, residual: see `rms_norm.rms_norm_forward`.
        lora_A: at most three, [r_i, H] of one dtype; None counts as rank 0.
    Returns: y [T, H]; rstd [T] float32; h [T, H], which is `x` itself without a residual; u [T, sum of the ranks].
    """
    num_tokens, width = x.shape
    assert weight.shape == (width,), f"weight {tuple(weight.shape)} does not fit rows of {width}"
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    factors: FactorRows = factor_rows(lora_A)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    u = torch.empty(num_tokens, factors.total, dtype=x.dtype, device=x.device)
    h, residual_stride = x, 0
    if residual is not None:
        residual = with_contiguous_rows(residual)
        h, residual_stride = torch.empty_like(y), residual.stride(0)
    x, weight = with_contiguous_rows(x), with_contiguous_rows(weight)
    tile, early = whole_row_tile(width), begins_early(x)
    ranks = 1 if num_tokens <= LONE_ROWS else RANKS_OF_MANY
    rms_norm_few_kernel[(ceil_div(factors.total, ranks), num_tokens)](
        x, residual, weight, *factors.pointers, y, h if residual is not None else None, rstd, u,
        x.stride(0), residual_stride, *factors.ranks, eps, weight_offset,
        WIDTH=width, CAST_BEFORE_WEIGHT=cast_before_weight, RANKS=ranks, COLUMNS=tile.columns, EARLY=early,
        num_warps=tile.warps, launch_pdl=early,
    )  # fmt: skip
    return y, rstd, h, u
