"""The kernels of nf4_gemm.py that find the value of a code in a table, and the one that adds up parts.

They take any dtype and run on any GPU, and the interpreter; nf4_gemm_permute.py decodes faster where it can be used.
Letters, dtypes and rounding are those of nf4_gemm.py.
"""

import triton
import triton.language as tl

from slothcore.kernels.early import signal_early, wait_early
from slothcore.kernels.glu import activate
from slothcore.kernels.nf4 import decode_nf4, load_absmax


@triton.jit
def store_result(
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
def nf4_linear_kernel(
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

    store_result(sums, token[None, :], channel[:, None], out_ptr, bias_ptr, stride_out_row, M, N, IN_PARTS, HAS_BIAS)


@triton.jit(do_not_specialize=["blocks_per_part"])
def nf4_linear_one_row_kernel(
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

    store_result(sums, 0, channel, out_ptr, bias_ptr, stride_out_row, 1, N, IN_PARTS, HAS_BIAS)


@triton.jit(do_not_specialize=["M", "parts"])
def nf4_linear_reduce_kernel(
    parts_ptr,
    bias_ptr,
    out_ptr,
    stride_out_row,
    M,
    N,
    parts,
    PARTS: tl.constexpr,  # parts rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of a gated unit: the row holds N outputs of the gate, then N of up; or None
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    # This program adds the parts of COLUMNS values of one row. All are loaded at once, and added in a fixed order.
    signal_early(EARLY)
    wait_early(EARLY)
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < N
    width = N if ACTIVATION is None else 2 * N
    part = tl.arange(0, PARTS)
    index = (part[:, None] * M + row) * width + column[None, :]
    exists = (part < parts)[:, None] & mask[None, :]
    sums = tl.load(parts_ptr + index, mask=exists, other=0.0)
    if ACTIVATION is not None:
        up = tl.load(parts_ptr + N + index, mask=exists, other=0.0)
    sums = tl.sum(sums, axis=0)
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    result = sums.to(out_ptr.dtype.element_ty)
    if ACTIVATION is not None:
        # Rounded where separate operations would round.
        activated, _ = activate(result.to(tl.float32), ACTIVATION)
        up = tl.sum(up, axis=0).to(out_ptr.dtype.element_ty).to(tl.float32)
        result = (activated.to(out_ptr.dtype.element_ty).to(tl.float32) * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out_row + column, result, mask=mask)
