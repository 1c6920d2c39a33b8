"""Products of few rows with NF4 weights, as few launches: what decoding text asks for.

Forward   u   = x [A_1; A_2; ..]^T                            lora_input: one launch
          y_i = x W_i^T + u_i (c_i B_i)^T + b_i               linear: one launch for up to three weights
          h   = act(y_gate) * y_up                            gated: the same launch, up to LANE_ROWS rows
          W_i = x.dtype(code * absmax)
Shapes    x [M, K]; W_i [N_i, K] in NF4, K divisible by 64; A_i [r_i, K]; B_i [N_i, r_i]; u [M, sum r_i]; b_i [N_i];
          y [M, sum N_i]; h [M, I].  M = rows (tokens), at most MOST_ROWS; I = N_gate = N_up.
Dtypes    x, y, h, u bfloat16 or float16; factors and biases of any floating dtype; sums float32.
Rounding  A_i and c_i B_i are rounded once to x.dtype, as if joined first; u, y_i and act(y_gate) once each.
Order     u of a row does not depend on the rows beside it or on their number; nor do y and h up to LANE_ROWS rows,
          unless K is so large that nf4_stream.py has room for x of fewer rows only.
Early     These kernels begin while the one in front of them ends (programmatic dependent launch), and read what they
          can of their weights until x is there. So what is launched just before may write anything but a weight.
Kernels   nf4_stream.py and, from 33 rows on, nf4_gemm_group.py for what they take; else nf4_lanes.py up to LANE_ROWS
          rows, nf4_gemm_permute.py above. All are for Hopper. Elsewhere `takes` says no, and the caller takes
          nf4_gemm.py.
Source    Dettmers et al. 2023, arXiv:2305.14314; Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels import nf4_gemm_group, nf4_stream
from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.glu_eager import Activation
from slothcore.kernels.launch import ceil_div, next_power_of_2, warps_for, with_contiguous_rows
from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_gemm import BLOCKS_OF_STEP, can_permute, linear_by_permutes
from slothcore.kernels.nf4_lanes import nf4_few_kernel
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor
from slothcore.kernels.nf4_weights import LARGEST_GROUP, are_alike, dtypes, weight_arguments

MOST_ROWS = 64
"""More rows are rather dequantised for, or decoded by other kernels."""
LANE_ROWS = 4
"""Up to here nf4_lanes.py is faster: it reads x once for 16 weight rows, and that is what more tokens wait for."""
LONGEST_RANK_STEP = 64
PROGRAM_ROWS = 16

# Four programs for each multiprocessor of an H100. Up to there eight warps read a row's columns; above, two.
# Microseconds with u = x A^T at 1 row, by 2, 4 and 8 warps: 4096x4096 14.2, 10.6, 10.0; 4096x14336 42.2, 31.3, 23.9; q,
# k, v 17.5, 13.7, 14.8; gate, up and SwiGLU 39.6, 41.0, 51.1.
FEW_PROGRAMS = 528

# What a program of `lora_input` reads at once. All of a row, if it can be: its time is that of a few reads.
INPUT_COLUMNS = 16384
INPUT_TOKENS = 4
"""Tokens of such a program, if there are many: they read a row of A together."""


class FactorRows(NamedTuple):
    """Up to three factors A, one below the other, as kernels take them.

    Attributes:
        pointers: three factors; the first stands in for those that there are not.
        ranks: their rows, 0 where there is none; total: all of them.
    """

    pointers: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    total: int


def factor_rows(lora_A: Factors) -> FactorRows:
    """The factors that there are, at least one."""
    factors = [A.contiguous() for A in lora_A if A is not None]
    assert 0 < len(factors) <= LARGEST_GROUP, f"one to {LARGEST_GROUP} factors are joined, got {len(factors)}"
    missing = LARGEST_GROUP - len(factors)
    ranks = (*(A.shape[0] for A in factors), *[0] * missing)
    return FactorRows((*factors, *factors[:1] * missing), ranks, sum(ranks))


@triton.jit
def factor_row(A_0_ptr, A_1_ptr, A_2_ptr, rank_0, rank_1, rank, K):
    """Where a row [K] of the factors begins."""
    A_ptr, row = A_0_ptr, rank
    if rank >= rank_0 + rank_1:
        A_ptr, row = A_2_ptr, rank - rank_0 - rank_1
    elif rank >= rank_0:
        A_ptr, row = A_1_ptr, rank - rank_0
    return A_ptr + row.to(tl.int64) * K


@triton.jit(do_not_specialize=["M", "rank_0", "rank_1", "rank_2"])
def lora_input_kernel(
    x_ptr, A_0_ptr, A_1_ptr, A_2_ptr, u_ptr, stride_x_row, stride_u_row, M, K, rank_0, rank_1, rank_2,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """This program computes one rank of TOKENS tokens. WHOLE: COLUMNS are all of a row.

    EARLY: it begins while the kernel in front ends, and has its row of A, if it is WHOLE, when x is there.
    """
    # At once: the product that needs u reads its weights meanwhile.
    signal_early(EARLY)
    rank = tl.program_id(0)
    A_ptr = factor_row(A_0_ptr, A_1_ptr, A_2_ptr, rank_0, rank_1, rank, K)
    first_token = tl.program_id(1).to(tl.int64) * TOKENS
    column = tl.arange(0, COLUMNS)
    inside = column < K
    if WHOLE:
        A = tl.load(A_ptr + column, mask=inside, other=0.0).to(x_ptr.dtype.element_ty)
        wait_early(EARLY)
        # All of x is asked for before the first sum, whose barriers would hold the rest back.
        rows = ()
        for i in tl.static_range(TOKENS):
            x_row_ptr = x_ptr + (first_token + i) * stride_x_row
            x = tl.load(x_row_ptr + column, mask=inside & (first_token + i < M), other=0.0)
            rows = rows + (x,)  # noqa: RUF005
        for i in tl.static_range(TOKENS):
            u = tl.sum(rows[i].to(tl.float32) * A.to(tl.float32), axis=0).to(u_ptr.dtype.element_ty)
            tl.store(u_ptr + (first_token + i) * stride_u_row + rank, u, mask=first_token + i < M)
    else:
        wait_early(EARLY)
        for i in tl.static_range(TOKENS):
            token = first_token + i
            sums = tl.zeros([COLUMNS], dtype=tl.float32)
            for start in tl.range(0, K, COLUMNS, num_stages=1):
                inside = start + column < K
                A = tl.load(A_ptr + start + column, mask=inside, other=0.0).to(x_ptr.dtype.element_ty)
                x = tl.load(x_ptr + token * stride_x_row + start + column, mask=inside & (token < M), other=0.0)
                sums += x.to(tl.float32) * A.to(tl.float32)
            u = tl.sum(sums, axis=0).to(u_ptr.dtype.element_ty)
            tl.store(u_ptr + token * stride_u_row + rank, u, mask=token < M)


def takes(
    x: Tensor, weights: Sequence[Nf4Tensor], lora_A: Factors, lora_B: Factors, biases: Sequence[Tensor | None]
) -> bool:
    """Whether the operations of this file take these operands."""
    rows, in_features = x.shape
    if not 0 < rows <= MOST_ROWS or in_features % BLOCK or not are_alike(weights, lora_B, biases):
        return False
    whole_rows = x.stride(1) == 1 and (rows == 1 or x.stride(0) % 8 == 0) and x.data_ptr() % 16 == 0
    return whole_rows and len(dtypes(lora_A)) < 2 and all(can_permute(x, weight) for weight in weights)


def lora_input(x: Tensor, lora_A: Factors) -> Tensor:
    """u = x [A_1; A_2; ..]^T, each factor rounded to the dtype of x.

    Args:
        x: [M, K] float32 or 16-bit; rows may be strided.
        lora_A: at most three, [r_i, K] of one dtype; None counts as rank 0.
    Returns: [M, sum of the ranks] of x.dtype.
    """
    factors = factor_rows(lora_A)
    x = with_contiguous_rows(x)
    rows, in_features = x.shape
    u = torch.empty(rows, factors.total, dtype=x.dtype, device=x.device)
    columns, early = min(INPUT_COLUMNS, next_power_of_2(in_features)), begins_early(x)
    tokens = 1 if rows <= LANE_ROWS else INPUT_TOKENS
    if rows:
        lora_input_kernel[(factors.total, ceil_div(rows, tokens))](
            x, *factors.pointers, u, x.stride(0), u.stride(0), rows, in_features, *factors.ranks,
            TOKENS=tokens, COLUMNS=columns, WHOLE=in_features <= columns, EARLY=early,
            num_warps=min(16, warps_for(columns)), launch_pdl=early,
        )  # fmt: skip
    return u


def linear(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms) -> Tensor:
    """Several products side by side, in one launch.

    Args:
        x: [M, K] 16-bit, which `takes` takes with the rest.
        weights: at most three, NF4 [N_i, K].
    Returns: [M, sum of N_i] of x.dtype.
    """
    streams = nf4_stream.takes(x, weights)
    if nf4_gemm_group.takes_few(x, weights, terms):
        return nf4_gemm_group.nf4_linear_few(x, weights, terms)
    if not streams and x.shape[0] > LANE_ROWS:
        return linear_by_permutes(x, weights, terms, early=begins_early(x))
    out = torch.empty(x.shape[0], sum(weight.shape[0] for weight in weights), dtype=x.dtype, device=x.device)
    if streams:
        return nf4_stream.launch(x, weights, terms, out)
    programs = sum(ceil_div(weight.shape[0], PROGRAM_ROWS) for weight in weights)
    return _launch(x, weights, terms, out, programs, activation=None)


def gated(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms, *, activation: Activation) -> Tensor:
    """act(gate) * up in one launch.

    Args:
        x: [M, K] 16-bit, which `takes` takes with the rest.
        weights: gate and up, NF4 [I, K] each, or one [2 I, K] that holds the rows of both.
    Returns: [M, I] of x.dtype.
    """
    streams = nf4_stream.takes(x, weights)
    if not streams and x.shape[0] > LANE_ROWS:
        return linear_by_permutes(x, weights, terms, activation=activation, early=begins_early(x))
    width = sum(weight.shape[0] for weight in weights) // 2
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    if streams:
        return nf4_stream.launch(x, weights, terms, out, activation=activation)
    return _launch(x, weights, terms, out, ceil_div(width, PROGRAM_ROWS // 2), activation=activation)


def warps_of(programs: int) -> int:
    """Warps of a program, among which its columns are divided: more where programs are few."""
    return 8 if programs <= FEW_PROGRAMS else 2


def _launch(
    x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms, out: Tensor, programs: int, *, activation: Activation | None
) -> Tensor:
    (rows, in_features), lora_x, warps = x.shape, terms.lora_x, warps_of(programs)
    rank = max([B.shape[1] for B in terms.lora_B if B is not None], default=1)
    nf4_few_kernel[(programs,)](
        x, lora_x, out, *weight_arguments(weights, terms),
        x.stride(0), 0 if lora_x is None else lora_x.stride(0), out.stride(0), rows, in_features,
        WEIGHTS=len(weights), NESTED=weights[0].is_nested, HAS_LORA=lora_x is not None,
        HAS_BIAS=terms.biases[0] is not None, ACTIVATION=activation, WARPS=warps,
        BLOCK_R=min(LONGEST_RANK_STEP, next_power_of_2(rank)),
        WHOLE=in_features // BLOCK % (BLOCKS_OF_STEP * warps) == 0, ON_GPU=x.is_cuda,
        EARLY=begins_early(x), num_warps=warps, enable_fp_fusion=False, launch_pdl=begins_early(x),
    )  # fmt: skip
    return out
