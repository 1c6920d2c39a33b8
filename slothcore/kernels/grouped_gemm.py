"""Matrix products of rows sorted by expert, each row with its own expert's weight, LoRA term included.

Forward   y_i  = x_i W_e^T + u_i B_e^T,     u = lora_x, for every row i of expert e: offsets[e] <= i < offsets[e + 1]
Backward  dx_i = dy_i W_e + v_i A_e,        v = lora_dy
Outer     G_e  = sum over the rows of expert e of l_i^T r_i; zero for an expert without rows
Shapes    x, dx [M, K]; y, dy [M, N]; W [E, N, K]; u, v [M, R]; B [E, N, R]; A [E, R, K]; offsets [E + 1] int32;
          l [M, P]; r [M, Q]; G [E, P, Q].
          M = rows, E = experts, N = out_features, K = in_features, R = rank.
Dtypes    one dtype for all operands, float32 or 16-bit; W may be NF4, whose values round to that dtype; sums float32.
Rounding  once, after the LoRA term (and after the tensor that the result is added to).
Source    Gale et al. 2022 (MegaBlocks), arXiv:2211.15841; Hu et al. 2021, arXiv:2106.09685.

How many rows an expert has is known on the device alone. The grid therefore has M // BLOCK_M + E row tiles, enough for
any distribution; each program finds its expert in `offsets`, and those without rows leave. Tiles of the product are
computed transposed: tensor cores want at least 64 rows of their first operand, and the weight has them however few rows
an expert has. A row depends on itself and its weight alone, so where a mask would cost, loads clamp their addresses:
what they read twice is never stored.

NF4 weights are decoded in the inner loop while an expert has few rows (`expands_first`), otherwise all at once into a
dense scratch of bounded size.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.attention_tiles import shared_memory_kib
from slothcore.kernels.gpu import device_capability
from slothcore.kernels.grouped_gemm_eager import check_outer, check_product
from slothcore.kernels.launch import ceil_div, next_power_of_2, with_contiguous_rows
from slothcore.kernels.nf4 import decode_nf4
from slothcore.kernels.nf4_experts import (
    Nf4Experts,
    expert_absmax_arguments,
    load_expert_absmax,
    nf4_experts_dequantize,
)
from slothcore.kernels.nf4_tensor import BLOCK, nf4_code

# Up to this many rows for each expert on average, decoding in the loop is no slower than expanding all weights first.
NF4_IN_LOOP_ROWS = 256

# Largest dense scratch for the experts of one projection; above, the weight is decoded in the loop whatever the rows.
SCRATCH_BYTES = 2**30

# Neighbouring tiles share their operands in the second-level cache: walk this many row tiles before the next columns.
ROW_TILES_TOGETHER = 8

# Up to this size a tile of an outer product has registers for sums that lose nothing: those of LoRA factors.
NARROW_OUTER = 64 * 128


class ProductTile(NamedTuple):
    """What one program of a product computes: [columns, rows] of the transposed output, `inner` summands a step."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class OuterTile(NamedTuple):
    """What one program of an outer product computes: [left, right] of one expert's result, `rows` summands a step."""

    left: int
    right: int
    rows: int
    warps: int
    stages: int


def expands_first(rows: int, shape: tuple[int, int, int], itemsize: int) -> bool:
    """Whether NF4 experts [E, N, K] are expanded into a scratch before a product with `rows` rows in all.

    They always are where blocks of 64 cross from one row of the weight to the next: the loop decodes whole blocks.
    """
    experts, out_features, in_features = shape
    if in_features % BLOCK:
        return True
    few_rows = rows <= NF4_IN_LOOP_ROWS * experts
    return not few_rows and experts * out_features * in_features * itemsize <= SCRATCH_BYTES


@cache
def product_tile(
    rows_per_expert: int, columns: int, itemsize: int, nf4: bool, capability: tuple[int, int] | None
) -> ProductTile:
    """The tile for an average number of rows (rounded up to a power of two) of each expert.

    capability: of the GPU; None for Triton's interpreter, where small tiles meet every ragged edge.
    """
    if capability is None:
        return ProductTile(rows=16, columns=64 if nf4 else 32, inner=64 if nf4 else 16, warps=4, stages=1)
    hopper = capability[0] in (9, 10)
    # A tile of NF4 is a whole block wide, whichever way it lies.
    narrow = 64 if nf4 else max(16, min(64, next_power_of_2(columns)))
    if itemsize == 4 or capability < (8, 0):
        rows = min(32, max(16, rows_per_expert))
        return ProductTile(rows, narrow, inner=64 if nf4 else 32, warps=8 if nf4 else 4, stages=1)
    # A LoRA factor has few columns: reading the rows bounds the product, and only more programs read faster.
    most_rows = 64 if columns <= 64 else 256 if hopper else 128
    rows = min(most_rows, max(16, rows_per_expert))
    # Few rows: reading the weight bounds the product, and more and smaller tiles keep more of it in flight.
    tile_columns = narrow if rows < 64 or columns <= 64 else 128
    warps = 8 if rows * tile_columns >= 128 * 128 else 4
    # A stage holds the loaded operands; what is decoded passes through shared memory once more.
    decoded = tile_columns * 64 * itemsize
    bytes_a_stage = rows * 64 * itemsize + (tile_columns * 32 if nf4 else decoded)
    free = (shared_memory_kib(capability) - 16) * 1024 - (decoded if nf4 else 0)
    stages = max(1, min(3 if nf4 and warps == 8 else 4, free // bytes_a_stage))
    return ProductTile(rows, tile_columns, inner=64, warps=warps, stages=stages)


@cache
def outer_tile(left: int, right: int, itemsize: int, capability: tuple[int, int] | None) -> OuterTile:
    """The tile for a result [left, right] of each expert."""
    if capability is None:
        return OuterTile(left=16, right=32, rows=16, warps=4, stages=1)
    if itemsize == 4 or capability < (8, 0):
        p, q = (max(16, min(32, next_power_of_2(n))) for n in (left, right))
        return OuterTile(p, q, rows=32, warps=4, stages=1)
    p, q = (max(16, min(128, next_power_of_2(n))) for n in (left, right))
    return OuterTile(p, q, rows=64, warps=8 if min(p, q) == 128 else 4, stages=3 if p + q <= 160 else 2)


@triton.jit
def locate_rows(offsets_ptr, tile, EXPERTS: tl.constexpr, SEARCH: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a row tile (int64), the tile's first row, and the end of the expert's rows.

    Expert e owns the tile numbers from offsets[e] // BLOCK_M + e on: enough for its rows, at most one too many, which
    begins beyond the end. SEARCH: EXPERTS rounded up to a power of two.
    """
    candidate = tl.arange(0, SEARCH)
    start = tl.load(offsets_ptr + candidate, mask=candidate < EXPERTS, other=2**30)
    expert = tl.sum((start // BLOCK_M + candidate <= tile).to(tl.int32), axis=0) - 1
    first = tl.load(offsets_ptr + expert)
    row = first + (tile - first // BLOCK_M - expert) * BLOCK_M
    return expert.to(tl.int64), row, tl.load(offsets_ptr + expert + 1)


@triton.jit
def _decode_tile(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, expert, row, first_block,
    N, K, NESTED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCKS * 64] float32 values of one expert's weight, from rows that must lie in it; finite beyond K."""
    blocks = K // 64
    byte = first_block * 32 + tl.arange(0, BLOCKS * 32)
    packed = tl.load(
        packed_ptr + expert * N * (blocks * 32) + row[:, None] * (blocks * 32) + byte[None, :],
        mask=(byte < blocks * 32)[None, :], other=0,
    )  # fmt: skip
    block = first_block + tl.arange(0, BLOCKS)
    absmax = load_expert_absmax(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, expert, N * blocks,
        row[:, None] * blocks + block[None, :], (block < blocks)[None, :], NESTED,
    )  # fmt: skip
    code = tl.reshape(tl.join(packed >> 4, packed & 15), [ROWS, BLOCKS, 64])
    values = decode_nf4(code, table_ptr, "gather") * absmax[:, :, None]
    return tl.reshape(values, [ROWS, BLOCKS * 64])


@triton.jit(do_not_specialize=["M", "row_tiles"])
def grouped_product_kernel(
    left_ptr, weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr,
    lora_left_ptr, lora_weight_ptr, offsets_ptr, out_ptr,
    stride_left_row, stride_lora_left_row, stride_out_row,
    M, N, K, R, row_tiles,
    BACKWARD: tl.constexpr, NF4: tl.constexpr, NESTED: tl.constexpr, HAS_LORA: tl.constexpr, ADD: tl.constexpr,
    EXPERTS: tl.constexpr, SEARCH: tl.constexpr, ROW_TILES: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """This program computes BLOCK_C columns c of the output for BLOCK_M rows of one expert, summing over i.

    Forward: c runs over the rows of the weight [N, K], i over its columns. BACKWARD: the other way round.
    NF4: `weight_ptr` holds packed codes. ADD: the sums are added to what stands in the output.
    """
    columns = K if BACKWARD else N
    inner = N if BACKWARD else K
    tiles_in_band = ROW_TILES * tl.cdiv(columns, BLOCK_C)
    band_start = tl.program_id(0) // tiles_in_band * ROW_TILES
    band_height = min(row_tiles - band_start, ROW_TILES)
    row_tile = band_start + tl.program_id(0) % tiles_in_band % band_height
    first_column = tl.program_id(0) % tiles_in_band // band_height * BLOCK_C
    expert, first_row, end = locate_rows(offsets_ptr, row_tile, EXPERTS, SEARCH, BLOCK_M)

    if first_row < end:
        row = first_row + tl.arange(0, BLOCK_M)
        left_row = tl.minimum(row, M - 1).to(tl.int64)
        c = first_column + tl.arange(0, BLOCK_C)
        in_columns = (c < columns)[:, None]

        sums = tl.zeros([BLOCK_C, BLOCK_M], dtype=tl.float32)
        for start in tl.range(0, inner, BLOCK_I, num_stages=STAGES):
            i = start + tl.arange(0, BLOCK_I)
            in_sum = (i < inner)[None, :]
            left = tl.load(left_ptr + left_row[:, None] * stride_left_row + i[None, :], mask=in_sum, other=0.0)
            # The rows of `left` are zero beyond the end of the sum: what a weight repeats there counts nothing.
            if NF4 and BACKWARD:
                weight = tl.trans(_decode_tile(
                    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, expert,
                    tl.minimum(i, N - 1), first_column // 64, N, K, NESTED, BLOCK_I, BLOCK_C // 64,
                ).to(left.dtype))  # fmt: skip
            elif NF4:
                weight = _decode_tile(
                    weight_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, expert,
                    tl.minimum(c, N - 1), start // 64, N, K, NESTED, BLOCK_C, BLOCK_I // 64,
                ).to(left.dtype)  # fmt: skip
            elif BACKWARD:
                index = expert * N * K + i[None, :].to(tl.int64) * K + c[:, None]
                weight = tl.load(weight_ptr + index, mask=in_sum & in_columns, other=0.0)
            else:
                index = expert * N * K + tl.minimum(c, N - 1)[:, None].to(tl.int64) * K + i[None, :]
                weight = tl.load(weight_ptr + index, mask=in_sum, other=0.0)
            sums = tl.dot(weight, tl.trans(left), sums, input_precision="ieee")

        if HAS_LORA:
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                rank = start + tl.arange(0, BLOCK_R)
                in_rank = (rank < R)[None, :]
                lora_left = tl.load(
                    lora_left_ptr + left_row[:, None] * stride_lora_left_row + rank[None, :], mask=in_rank, other=0.0
                )
                index = rank[None, :] * K + c[:, None] if BACKWARD else c[:, None] * R + rank[None, :]
                lora_weight = tl.load(
                    lora_weight_ptr + expert * columns * R + index, mask=in_rank & in_columns, other=0.0
                )
                sums = tl.dot(lora_weight, tl.trans(lora_left), sums, input_precision="ieee")

        out = out_ptr + row[None, :].to(tl.int64) * stride_out_row + c[:, None]
        mask = (row < end)[None, :] & in_columns
        if ADD:
            sums += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_outer_kernel(
    left_ptr, right_ptr, offsets_ptr, out_ptr, stride_left_row, stride_right_row, scaling, P, Q,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """This program sums a [BLOCK_P, BLOCK_Q] tile of one expert's result over all of the expert's rows.

    EXACT keeps what each addition loses and adds it to the next (Kahan), so that the error does not grow with the rows.
    """
    tiles_q = tl.cdiv(Q, BLOCK_Q)
    tiles = tl.cdiv(P, BLOCK_P) * tiles_q
    expert = tl.program_id(0) // tiles
    p = tl.program_id(0) % tiles // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(0) % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    sums = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
    lost = tl.zeros([BLOCK_P, BLOCK_Q], dtype=tl.float32)
    for start in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)
        # Both are masked: a neighbour's infinity times zero would be NaN.
        inside = (row < end)[:, None]
        row = row[:, None].to(tl.int64)
        left = tl.load(left_ptr + row * stride_left_row + p[None, :], mask=inside & (p < P)[None, :], other=0.0)
        right = tl.load(right_ptr + row * stride_right_row + q[None, :], mask=inside & (q < Q)[None, :], other=0.0)
        if EXACT:
            summand = tl.dot(tl.trans(left), right, input_precision="ieee") - lost
            longer = sums + summand
            lost = (longer - sums) - summand
            sums = longer
        else:
            sums = tl.dot(tl.trans(left), right, sums, input_precision="ieee")
    out = out_ptr + (expert.to(tl.int64) * P + p[:, None]) * Q + q[None, :]
    tl.store(out, (sums * scaling).to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


def grouped_linear(
    x: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    out: Tensor | None = None,
    _tile: ProductTile | None = None,
) -> Tensor:
    """Return x W_e^T + lora_x lora_B_e^T for the rows of every expert e.

    Args:
        x: [M, K], sorted by expert; rows may be strided.
        weight: [E, N, K], dense of x.dtype or NF4.
        offsets: [E + 1] int32, where each expert's rows begin; the last is M.
        lora_x: [M, R] of x.dtype, or None for no LoRA term.
        lora_B: [E, N, R] of x.dtype with the scaling folded in; given exactly if `lora_x` is.
        out: [M, N] to write into, for example columns of a wider tensor.
        _tile: a tile other than `product_tile`'s, and NF4 decoded in the loop; for sweeps.
    Returns: `out`, or a new tensor [M, N] of x.dtype.
    Raises: ValueError if a shape or dtype does not fit.
    """
    out = check_product(x, weight, offsets, lora_x, lora_B, out, backward=False)
    return _product(x, weight, offsets, lora_x, lora_B, out, _tile, backward=False, add=False)


def grouped_input_grad(
    dy: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    *,
    lora_dy: Tensor | None = None,
    lora_A: Tensor | None = None,
    add_to: Tensor | None = None,
    _tile: ProductTile | None = None,
) -> Tensor:
    """Return dy W_e + lora_dy lora_A_e for the rows of every expert e, the gradient of `grouped_linear`'s x.

    Args:
        dy: [M, N], sorted by expert; rows may be strided.
        weight: [E, N, K], dense of dy.dtype or NF4.
        offsets: [E + 1] int32.
        lora_dy: [M, R] of dy.dtype, or None for no LoRA term.
        lora_A: [E, R, K] of dy.dtype; given exactly if `lora_dy` is.
        add_to: [M, K] to which the result is added in place, before it is rounded.
        _tile: a tile other than `product_tile`'s, and NF4 decoded in the loop; for sweeps.
    Returns: `add_to`, or a new tensor [M, K] of dy.dtype.
    Raises: ValueError if a shape or dtype does not fit.
    """
    out = check_product(dy, weight, offsets, lora_dy, lora_A, add_to, backward=True)
    return _product(dy, weight, offsets, lora_dy, lora_A, out, _tile, backward=True, add=add_to is not None)


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, *, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """Return scaling * left_e^T right_e of every expert e, summed over its rows in float32.

    Args:
        left: [M, P], sorted by expert; rows may be strided.
        right: [M, Q] of left.dtype.
        offsets: [E + 1] int32.
        dtype: of the result, to which the scaled sums round once.
    Returns: [E, P, Q]; zero for an expert without rows.
    Raises: ValueError if a shape or dtype does not fit.
    """
    check_outer(left, right, offsets)
    left, right = with_contiguous_rows(left), with_contiguous_rows(right)
    experts, width_p, width_q = offsets.numel() - 1, left.shape[1], right.shape[1]
    tile = outer_tile(width_p, width_q, left.itemsize, device_capability(left.device))
    out = torch.empty((experts, width_p, width_q), dtype=dtype, device=left.device)
    grouped_outer_kernel[(experts * ceil_div(width_p, tile.left) * ceil_div(width_q, tile.right),)](
        left, right, offsets, out, left.stride(0), right.stride(0), scaling, width_p, width_q,
        BLOCK_P=tile.left, BLOCK_Q=tile.right, BLOCK_M=tile.rows, STAGES=tile.stages,
        EXACT=tile.left * tile.right <= NARROW_OUTER, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _product(
    left: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    lora_left: Tensor | None,
    lora_weight: Tensor | None,
    out: Tensor,
    tile: ProductTile | None,
    *,
    backward: bool,
    add: bool,
) -> Tensor:
    experts, out_features, in_features = weight.shape
    rows = left.shape[0]
    if rows == 0:
        return out
    if isinstance(weight, Nf4Experts) and tile is None and expands_first(rows, weight.shape, left.itemsize):
        weight = nf4_experts_dequantize(weight, dtype=left.dtype)
    is_nf4 = isinstance(weight, Nf4Experts)
    if isinstance(weight, Nf4Experts):
        weight_arguments = (weight.packed, *expert_absmax_arguments(weight), nf4_code(left.device))
        nested = weight.is_nested
    else:
        weight_arguments = (weight.contiguous(), None, None, None, None, None)
        nested = False
    left = with_contiguous_rows(left)
    lora_left = None if lora_left is None else with_contiguous_rows(lora_left)
    lora_weight = None if lora_weight is None else lora_weight.contiguous()
    rank = 0 if lora_left is None else lora_left.shape[1]

    rows_per_expert = next_power_of_2(ceil_div(rows, experts))
    columns = in_features if backward else out_features
    capability = device_capability(left.device)
    tile = tile or product_tile(min(256, rows_per_expert), columns, left.itemsize, is_nf4, capability)
    row_tiles = rows // tile.rows + experts
    grouped_product_kernel[(row_tiles * ceil_div(columns, tile.columns),)](
        left, *weight_arguments, lora_left, lora_weight, offsets, out,
        left.stride(0), 0 if lora_left is None else lora_left.stride(0), out.stride(0),
        rows, out_features, in_features, rank, row_tiles,
        BACKWARD=backward, NF4=is_nf4, NESTED=nested, HAS_LORA=rank > 0, ADD=add, EXPERTS=experts,
        SEARCH=next_power_of_2(experts), BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_I=tile.inner,
        BLOCK_R=max(16, min(64, next_power_of_2(max(1, rank)))), ROW_TILES=ROW_TILES_TOGETHER, STAGES=tile.stages,
        num_warps=tile.warps, enable_fp_fusion=not is_nf4,
    )  # fmt: skip
    return out
