"""The kernel of nf4_gemm.py that decodes by byte permutes (nf4_permute.py), for 16-bit x.

The order of the columns within a sum is free, so the kernel chooses one in which a thread owns whole blocks of 64, and
reads x in the same order. The weight is the first operand [N, K], which Hopper's tensor cores take from registers: lane
l of a warp holds columns 2 (l % 4) + {0, 1} of each 8 and rows l // 4 and l // 4 + 8 of each 16. Giving lane l the
block number l % 4 of four makes that fragment out of the lane's own 64 weights, with no exchange at all.
The price: neighbouring columns of x must come from four blocks. Read as they lie, 16 bytes at a time, they are put in
that order on their way into shared memory, 4 bytes at a time.

A step handles half of each block at a time (32 weights, one 16-byte load), so that x and the weight need half the
room. The loop is not pipelined by the compiler: the words would pass through shared memory, which costs more than it
hides. Letters, dtypes and rounding are those of nf4_gemm.py.
"""

import triton
import triton.language as tl

from slothcore.kernels.nf4 import load_absmax
from slothcore.kernels.nf4_permute import decode_words, products
from slothcore.kernels.nf4_weights import chosen_weight

BLOCKS_OF_STEP = 4
"""Blocks of a row in a step: one for each of the four lanes that share a row."""


@triton.jit
def _load_products(
    absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, mask,
    NESTED: tl.constexpr, DTYPE: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """The planes [blocks, rows] of a tile of blocks."""
    # Loads as wide as the bytes would allow put neighbouring blocks into one thread, and an exchange behind them.
    block = tl.max_contiguous(block.to(tl.uint32), [1, 1])
    absmax = load_absmax(
        absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, mask, NESTED
    )  # fmt: skip
    return products(absmax, DTYPE, ON_GPU)


@triton.jit
def _word_pointers(words_ptr, row, blocks):
    """[4, rows, 4]: where the first half of each of a row's first blocks lies."""
    block = row[None, :].to(tl.int64) * blocks + tl.arange(0, 4)[:, None]
    return words_ptr + (block * 8)[:, :, None] + tl.arange(0, 4)[None, None, :]


@triton.jit
def _decode(word, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3, ON_GPU: tl.constexpr):
    """[blocks, rows, 4, 2, 2, 2] bits of weights from words [blocks, rows, 4] and planes [blocks, rows]."""
    return decode_words(
        word,
        low_0[:, :, None], low_1[:, :, None], low_2[:, :, None], low_3[:, :, None],
        high_0[:, :, None], high_1[:, :, None], high_2[:, :, None], high_3[:, :, None],
        ON_GPU,
    )  # fmt: skip


@triton.jit
def _fetch_absmax(absmax_ptr, nested_absmax_ptr, block, mask, NESTED: tl.constexpr):
    """What memory holds of the absmax of a tile of blocks: code and scale, or where it is not nested itself, twice."""
    block = tl.max_contiguous(block.to(tl.uint32), [1, 1])
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    scale = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0) if NESTED else absmax
    return absmax, scale


@triton.jit(do_not_specialize=["M", "blocks_per_part", "rank_0", "rank_1", "rank_2"])
def nf4_linear_registers_kernel(
    x_ptr, lora_x_ptr, out_ptr,
    words_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr, lora_B_0_ptr, bias_0_ptr,
    words_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr, lora_B_1_ptr, bias_1_ptr,
    words_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr, lora_B_2_ptr, bias_2_ptr,
    N_0, N_1, N_2, rank_0, rank_1, rank_2, scaling_0, scaling_1, scaling_2,
    stride_x_row, stride_lora_x_row, stride_out_row, M, K, blocks_per_part,
    WEIGHTS: tl.constexpr, NESTED: tl.constexpr, HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr, IN_PARTS: tl.constexpr,
    ON_GPU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SLICES: tl.constexpr,
    WARPS: tl.constexpr, PREFETCH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """This program sums one part of the columns for BLOCK_N rows of a weight and BLOCK_M tokens, four blocks a step.

    The weights lie one below the other, each with tiles of its own; u has the ranks of all, and lora_B_i [N_i, rank_i].

    SLICES cuts the program's columns once more. The tensor cores multiply at least 64 rows by 16 tokens; where the
    tokens are fewer, row s * BLOCK_N + n of the product is weight row n in slice s, its column s * BLOCK_M + m is token
    m in slice s, and what rows and columns of unequal slices make together is dropped in the end.
    PREFETCH: the words and scales of the next step are loaded into registers while this one is decoded.
    EARLY: the program may begin before the kernel in front has ended, and prefetches until then.
    """
    ROWS: tl.constexpr = BLOCK_N * SLICES
    COLUMNS: tl.constexpr = BLOCK_M * SLICES
    first_weight = (
        words_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr,
        lora_B_0_ptr, bias_0_ptr, N_0, rank_0, scaling_0,
    )  # fmt: skip
    second_weight = (
        words_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr,
        lora_B_1_ptr, bias_1_ptr, N_1, rank_1, scaling_1,
    )  # fmt: skip
    third_weight = (
        words_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr,
        lora_B_2_ptr, bias_2_ptr, N_2, rank_2, scaling_2,
    )  # fmt: skip
    chosen, row_tile, out_first, rank_first = chosen_weight(
        tl.program_id(0), first_weight, second_weight, third_weight, BLOCK_N, WEIGHTS
    )
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr = chosen[:5]
    lora_B_ptr, bias_ptr, N, R, scaling = chosen[5:]

    blocks = K // 64
    first = tl.program_id(2) * blocks_per_part
    last = tl.minimum(first + blocks_per_part, blocks)
    slice_blocks = tl.cdiv(last - first, 4 * SLICES) * 4

    # Threads load rows 8 to a warp, then the next 8 of all warps; the tensor cores take 16 to a warp.
    i = tl.arange(0, ROWS)
    name = i // (16 * WARPS) * (16 * WARPS) + i // 8 % WARPS * 16 + i // (8 * WARPS) % 2 * 8 + i % 8
    # Weight rows and tokens beyond the last repeat it, which costs no mask; they are never stored.
    row = tl.minimum(row_tile * BLOCK_N + name % BLOCK_N, N - 1)
    row_first = first + name // BLOCK_N * slice_blocks
    row_last = tl.minimum(row_first + slice_blocks, last)
    word_ptrs = _word_pointers(words_ptr, row, blocks) + (row_first * 8)[None, :, None]

    j = tl.arange(0, COLUMNS)
    token = tl.minimum(tl.program_id(1) * BLOCK_M + j % BLOCK_M, M - 1).to(tl.int64)
    token_first = first + j // BLOCK_M * slice_blocks
    token_last = tl.minimum(token_first + slice_blocks, last)
    # Column k of a half step of x, in binary: block (2 bits), word (2), pair of weights (2), weight of the pair (1).
    k = tl.arange(0, 128)
    x_ptrs = x_ptr + (token * stride_x_row + token_first * 64)[:, None] + (k // 32 * 64 + k % 32)[None, :]

    four = tl.arange(0, 4)[:, None]
    block = row[None, :] * blocks + row_first[None, :] + four
    if PREFETCH:
        mask = row_first[None, :] + four < row_last[None, :]
        absmax, scale = _fetch_absmax(absmax_ptr, nested_absmax_ptr, block, mask, NESTED)
        word_0 = tl.load(word_ptrs, mask=mask[:, :, None], other=0)
        word_1 = tl.load(word_ptrs + 4, mask=mask[:, :, None], other=0)
        if NESTED:
            offset = tl.load(nested_offset_ptr)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, slice_blocks, 4, num_stages=1):
        x_mask = token_first[:, None] + start + (k // 32)[None, :] < token_last[:, None]
        if PREFETCH:
            if NESTED:
                absmax = tl.load(nested_code_ptr + absmax.to(tl.int32)) * scale + offset
            low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3 = products(
                absmax, x_ptr.dtype.element_ty, ON_GPU
            )
            mask = row_first[None, :] + start + 4 + four < row_last[None, :]
            absmax, scale = _fetch_absmax(absmax_ptr, nested_absmax_ptr, block + start + 4, mask, NESTED)
        else:
            mask = row_first[None, :] + start + four < row_last[None, :]
            low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3 = _load_products(
                absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block + start, mask,
                NESTED, x_ptr.dtype.element_ty, ON_GPU,
            )  # fmt: skip
        for half in tl.static_range(2):
            x = tl.load(x_ptrs + (start * 64 + half * 32), mask=x_mask, other=0.0)
            x = tl.reshape(tl.permute(tl.reshape(x, [COLUMNS, 4, 16, 2]), (0, 2, 1, 3)), [COLUMNS, 128])
            half_ptrs = word_ptrs + (start * 8 + half * 4)
            if PREFETCH:
                word = word_0 if half == 0 else word_1
            else:
                word = tl.load(half_ptrs, mask=mask[:, :, None], other=0)
            bits = _decode(word, low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3, ON_GPU)
            if PREFETCH:
                following = tl.load(half_ptrs + 32, mask=mask[:, :, None], other=0)
                if half == 0:
                    word_0 = following
                else:
                    word_1 = following
            # From [block, tile of 16 a warp, upper 8 or not, warp, 8, word, pair, pair, weight] to the name's order,
            # and the columns from (block, word, pairs, weight) to (word, pairs, block, weight).
            bits = tl.reshape(bits, [4, ROWS // (16 * WARPS), 2, WARPS, 8, 4, 2, 2, 2])
            bits = tl.reshape(tl.permute(bits, (1, 3, 2, 4, 5, 6, 7, 0, 8)), [ROWS, 128])
            weight = bits.to(x.dtype, bitcast=True)
            sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")

    # Not before: programs of the next kernel would take the places of this one's and leave other multiprocessors idle.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    if HAS_LORA:  # noqa: SIM102
        if tl.program_id(2) == 0:
            # Of the slices, the first takes the LoRA product.
            lora_row = tl.minimum(row_tile * BLOCK_N + i % BLOCK_N, N - 1).to(tl.int64)
            for start in tl.range(0, R, BLOCK_R, num_stages=1):
                rank = start + tl.arange(0, BLOCK_R)
                in_rank = (rank < R)[None, :]
                lora_B = tl.load(
                    lora_B_ptr + lora_row[:, None] * R + rank[None, :], mask=in_rank & (i < BLOCK_N)[:, None], other=0.0
                )
                lora_B = (lora_B.to(tl.float32) * scaling).to(x_ptr.dtype.element_ty)
                lora_x = tl.load(
                    lora_x_ptr + token[:, None] * stride_lora_x_row + rank_first + rank[None, :],
                    mask=in_rank, other=0.0,
                )  # fmt: skip
                sums = tl.dot(lora_B, tl.trans(lora_x), sums, input_precision="ieee")
    if SLICES > 1:
        same = (i // BLOCK_N)[:, None] == (j // BLOCK_M)[None, :]
        sums = tl.reshape(tl.where(same, sums, 0.0), [SLICES, BLOCK_N, SLICES, BLOCK_M])
        sums = tl.sum(tl.sum(sums, axis=2), axis=0)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = row_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (channel < N)[:, None] & (token < M)[None, :]
    if HAS_BIAS:  # noqa: SIM102
        if tl.program_id(2) == 0:
            sums += tl.load(bias_ptr + channel, mask=channel < N, other=0.0).to(tl.float32)[:, None]
    column = (out_first + channel)[:, None]
    if IN_PARTS:
        part = tl.program_id(2).to(tl.int64)
        tl.store(out_ptr + (part * M + token)[None, :] * stride_out_row + column, sums, mask=exists)
    else:
        result = sums.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + token[None, :] * stride_out_row + column, result, mask=exists)
