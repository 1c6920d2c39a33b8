"""Product with an NF4 weight that is decoded in the inner loop: for few rows, where reading the weight is the cost.

Forward   y = x W^T + u B^T + b,   W = x.dtype(code * absmax),   u = lora_x, B = lora_B (scaling inside one of them)
Shapes    x [M, K]; W [N, K] in NF4, K divisible by 64; u [M, R]; B [N, R]; b [N]; y [M, N].
          M = rows (tokens), N = out_features, K = in_features, R = LoRA rank.
Dtypes    x, u, B, b, y float32, bfloat16 or float16, all alike; sums float32.
Rounding  W is rounded to x.dtype before the product, as if dequantised first; y is rounded once.
Layout    A byte holds columns 2j (high nibble) and 2j + 1: joining the nibbles on the last axis restores the order.
Split K   Few rows give few tiles, so the columns are cut into parts, each summed by its own program into a workspace
          [parts, M, N] float32; a second launch adds the parts. No atomics: the result is the same every time.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.nf4 import Decode, absmax_arguments, decode_nf4, load_absmax
from slothcore.kernels.nf4_tensor import BLOCK, Nf4Tensor, check_linear, nf4_code

REDUCE_COLUMNS = 256


@triton.jit
def _store_result(
    sums, row, column, out_ptr, bias_ptr, stride_out_row, M, N, IN_PARTS: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """Round and store a tile of the result, or store it as this program's part. row, column: broadcast to the tile."""
    mask = (row < M) & (column < N)
    if IN_PARTS:
        part = tl.program_id(2).to(tl.int64)
        tl.store(out_ptr + (part * M + row) * N + column, sums, mask=mask)
    else:
        if HAS_BIAS:
            sums += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * stride_out_row + column, sums.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "blocks_per_part"])
def _nf4_linear_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    table_ptr,
    lora_x_ptr,
    lora_B_ptr,
    bias_ptr,
    out_ptr,  # the result, or the workspace if IN_PARTS
    stride_x_row,
    stride_lora_x_row,
    stride_out_row,
    M,
    N,
    K,
    R,
    blocks_per_part,
    NESTED: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,  # blocks of 64 columns in one turn of the loop
    DECODE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # This program sums one part of the columns for BLOCK_N weight rows and BLOCK_M tokens. The tile is transposed:
    # tensor cores want at least 64 rows of the first operand, and the weight has them however few the tokens are.
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the weight repeat its last one, which costs no mask; they are never stored.
    weight_row = tl.minimum(channel, N - 1)
    blocks = K // 64
    first = tl.program_id(2) * blocks_per_part
    last = tl.minimum(first + blocks_per_part, blocks)

    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        byte = start * 32 + tl.arange(0, STEP * 32)
        packed = tl.load(
            packed_ptr + weight_row[:, None] * (blocks * 32) + byte[None, :], mask=(byte < last * 32)[None, :], other=0
        )
        block = start + tl.arange(0, STEP)
        absmax = load_absmax(
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            nested_code_ptr,
            weight_row[:, None] * blocks + block[None, :],
            (block < last)[None, :],
            NESTED,
        )
        column = start * 64 + tl.arange(0, STEP * 64)
        x = tl.load(
            x_ptr + token[:, None] * stride_x_row + column[None, :],
            mask=(token < M)[:, None] & (column < last * 64)[None, :],
            other=0.0,
        )
        code = tl.reshape(tl.join(packed >> 4, packed & 15), [BLOCK_N, STEP, 64])
        weight = tl.reshape(decode_nf4(code, table_ptr, DECODE) * absmax[:, :, None], [BLOCK_N, STEP * 64])
        sums = tl.dot(weight.to(x.dtype), tl.trans(x), sums, input_precision="ieee")

    # Two conditions, because the first is decided when the kernel is compiled.
    if HAS_LORA:  # noqa: SIM102
        # The LoRA product is a few more columns, added by the part that comes first.
        if tl.program_id(2) == 0:
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                rank = start + tl.arange(0, BLOCK_R)
                lora_B = tl.load(
                    lora_B_ptr + weight_row[:, None] * R + rank[None, :], mask=(rank < R)[None, :], other=0.0
                )
                lora_x = tl.load(
                    lora_x_ptr + token[:, None] * stride_lora_x_row + rank[None, :],
                    mask=(token < M)[:, None] & (rank < R)[None, :],
                    other=0.0,
                )
                sums = tl.dot(lora_B, tl.trans(lora_x), sums, input_precision="ieee")

    _store_result(sums, token[None, :], channel[:, None], out_ptr, bias_ptr, stride_out_row, M, N, IN_PARTS, HAS_BIAS)


@triton.jit(do_not_specialize=["blocks_per_part"])
def _nf4_linear_one_row_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    nested_code_ptr,
    table_ptr,
    lora_x_ptr,
    lora_B_ptr,
    bias_ptr,
    out_ptr,  # the result, or the workspace if IN_PARTS
    stride_out_row,
    N,
    K,
    R,
    blocks_per_part,
    NESTED: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP: tl.constexpr,
    DECODE: tl.constexpr,
    STAGES: tl.constexpr,
):
    # This program sums one part of the columns for BLOCK_N weight rows and the only token. Tensor cores would idle, so
    # each lane keeps sums of its own until the end.
    channel = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = tl.minimum(channel, N - 1)
    blocks = K // 64
    first = tl.program_id(2) * blocks_per_part
    last = tl.minimum(first + blocks_per_part, blocks)

    lane_sums = tl.zeros([BLOCK_N, STEP * 64], dtype=tl.float32)
    for start in tl.range(first, last, STEP, num_stages=STAGES):
        byte = start * 32 + tl.arange(0, STEP * 32)
        packed = tl.load(
            packed_ptr + weight_row[:, None] * (blocks * 32) + byte[None, :], mask=(byte < last * 32)[None, :], other=0
        )
        block = start + tl.arange(0, STEP)
        absmax = load_absmax(
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            nested_code_ptr,
            weight_row[:, None] * blocks + block[None, :],
            (block < last)[None, :],
            NESTED,
        )
        column = start * 64 + tl.arange(0, STEP * 64)
        x = tl.load(x_ptr + column, mask=column < last * 64, other=0.0)
        code = tl.reshape(tl.join(packed >> 4, packed & 15), [BLOCK_N, STEP, 64])
        weight = tl.reshape(decode_nf4(code, table_ptr, DECODE) * absmax[:, :, None], [BLOCK_N, STEP * 64])
        weight = weight.to(x.dtype).to(tl.float32)
        # Spelled out, because the launch forbids the compiler to fuse (see nf4.py).
        lane_sums = tl.fma(weight, tl.broadcast_to(x.to(tl.float32)[None, :], lane_sums.shape), lane_sums)
    sums = tl.sum(lane_sums, axis=1)

    if HAS_LORA:  # noqa: SIM102
        if tl.program_id(2) == 0:
            rank = tl.arange(0, BLOCK_R)
            lora_x = tl.load(lora_x_ptr + rank, mask=rank < R, other=0.0).to(tl.float32)
            lora_B = tl.load(lora_B_ptr + weight_row[:, None] * R + rank[None, :], mask=(rank < R)[None, :], other=0.0)
            sums += tl.sum(lora_B.to(tl.float32) * lora_x[None, :], axis=1)

    _store_result(sums, 0, channel, out_ptr, bias_ptr, stride_out_row, 1, N, IN_PARTS, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "parts"])
def _nf4_linear_reduce_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    stride_out_row,
    M,
    N,
    parts,
    PARTS: tl.constexpr,  # parts rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # This program adds the parts of COLUMNS values of one row. All are loaded at once, and added in a fixed order.
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < N
    part = tl.arange(0, PARTS)
    index = (part[:, None] * M + row) * N + column[None, :]
    sums = tl.sum(tl.load(parts_ptr + index, mask=(part < parts)[:, None] & mask[None, :], other=0.0), axis=0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * stride_out_row + column, sums.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class LinearConfig:
    """How nf4_linear is launched."""

    block_m: int
    """Tokens of a tile, at least 16; 1 chooses the kernel for a single row."""
    block_n: int
    """Weight rows of a tile."""
    parts: int
    """Parts into which the columns are cut; fewer if there are not as many blocks of 64."""
    step: int = 1
    """Blocks of 64 columns in one turn of the loop."""
    num_warps: int = 4
    num_stages: int = 4
    decode: Decode = "gather"


def linear_config(rows: int, out_features: int, in_features: int, *, itemsize: int = 2) -> LinearConfig:
    """Launch configuration for M, N and K: enough programs to fill a large GPU, each with work enough.

    itemsize: bytes of an element of x; float32 keeps fewer turns in flight, to fit the shared memory of smaller GPUs.
    """
    if rows == 1:
        shape, wanted, columns = LinearConfig(block_m=1, block_n=8, parts=1, step=4, num_stages=3), 512, 2048
    elif rows <= 16:
        shape, wanted, columns = LinearConfig(block_m=16, block_n=64, parts=1), 512, 512
    elif rows <= 64:
        shape, wanted, columns = LinearConfig(block_m=triton.next_power_of_2(rows), block_n=64, parts=1), 396, 2304
    else:
        block_m = min(256, triton.next_power_of_2(rows)) if itemsize == 2 else 128
        shape = LinearConfig(block_m=block_m, block_n=128, parts=1, num_warps=8, num_stages=3)
        wanted, columns = 132, 1024
    tiles = triton.cdiv(rows, shape.block_m) * triton.cdiv(out_features, shape.block_n)
    # From 1.5 programs on each of 132 multiprocessors on, splitting K costs more than it fills.
    parts = 1 if tiles >= 198 else max(1, min(wanted // tiles, in_features // columns, 8))
    return replace(shape, parts=parts, num_stages=shape.num_stages if itemsize == 2 else 2)


def nf4_linear(
    x: Tensor,
    weight: Nf4Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    _config: LinearConfig | None = None,
) -> Tensor:
    """y = x W^T + lora_x lora_B^T + bias with W in NF4, decoded on the way.

    Args:
        x: [M, K] float32, bfloat16 or float16; rows may be strided.
        weight: NF4 [N, K], K divisible by 64.
        lora_x: [M, R] of x.dtype, the input already multiplied by lora_A (and the scaling), or None.
        lora_B: [N, R] of x.dtype, or None; both or neither.
        bias: [N], or None.
        out: [M, N] of x.dtype to write to; rows may be strided.
        _config: a launch configuration other than `linear_config`'s; for benchmarks.
    Returns: `out`, or a new tensor [M, N] of x.dtype.
    Raises: ValueError if a shape or dtype does not fit, or K is not divisible by 64.
    """
    out = check_linear(x, weight, lora_x, lora_B, bias, out)
    rows, (out_features, in_features) = x.shape[0], weight.shape
    if rows == 0:
        return out
    x = _with_dense_rows(x)
    lora_x = None if lora_x is None else _with_dense_rows(lora_x)
    lora_B = None if lora_B is None else lora_B.contiguous()
    bias = None if bias is None else bias.contiguous()
    rank = 0 if lora_B is None else lora_B.shape[1]

    config = _config or linear_config(rows, out_features, in_features, itemsize=x.itemsize)
    blocks = in_features // BLOCK
    blocks_per_part = triton.cdiv(blocks, config.parts)
    parts = triton.cdiv(blocks, blocks_per_part)
    target = out if parts == 1 else torch.empty(parts, rows, out_features, dtype=torch.float32, device=x.device)

    one_row = config.block_m == 1
    arguments = (weight.packed, *absmax_arguments(weight), nf4_code(x.device), lora_x, lora_B, bias, target)
    constants = {
        "NESTED": weight.is_nested,
        "HAS_LORA": lora_B is not None,
        "HAS_BIAS": bias is not None,
        "IN_PARTS": parts > 1,
        "BLOCK_N": config.block_n,
        # tl.dot wants at least 16; longer ranks are walked in steps of 64, except by the kernel for a single row.
        "BLOCK_R": max(16, triton.next_power_of_2(rank) if one_row else min(64, triton.next_power_of_2(rank))),
        "STEP": config.step,
        "DECODE": config.decode,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
        "enable_fp_fusion": False,
    }
    tiles = triton.cdiv(out_features, config.block_n)
    if one_row:
        assert rows == 1, f"the kernel for a single row was asked to multiply {rows}"
        _nf4_linear_one_row_kernel[(tiles, 1, parts)](
            x, *arguments, out.stride(0), out_features, in_features, rank, blocks_per_part, **constants
        )
    else:
        _nf4_linear_kernel[(tiles, triton.cdiv(rows, config.block_m), parts)](
            x,
            *arguments,
            x.stride(0),
            0 if lora_x is None else lora_x.stride(0),
            out.stride(0),
            rows,
            out_features,
            in_features,
            rank,
            blocks_per_part,
            BLOCK_M=config.block_m,
            **constants,
        )
    if parts > 1:
        _nf4_linear_reduce_kernel[(triton.cdiv(out_features, REDUCE_COLUMNS), rows)](
            target,
            bias,
            out,
            out.stride(0),
            rows,
            out_features,
            parts,
            PARTS=triton.next_power_of_2(parts),
            HAS_BIAS=bias is not None,
            COLUMNS=REDUCE_COLUMNS,
            num_warps=4,
        )
    return out


def _with_dense_rows(tensor: Tensor) -> Tensor:
    """The kernels step through a row one element at a time; between rows any stride will do."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
