"""The kernel of nf4_few.py: products of few rows with NF4 weights, in which every element of a tensor is a lane.

Hopper's `mma.sync.m16n8k16` multiplies 16 weight rows by 8 tokens. Lane 4 r + g of a warp gives it columns
2 g, 2 g + 1, 2 g + 8 and 2 g + 9 of rows r and r + 8 and of token r, and gets those rows' results for tokens 2 g and
2 g + 1. The order of the columns within a sum is free, so lane 4 r + g takes them from block number g of four: it
decodes whole blocks of 64 of its own (nf4_permute.py), and reads x as it lies, 16 bytes at a time, in the same order.
Nothing is exchanged between lanes and nothing passes through shared memory until the warps add up their sums.

A program owns 16 weight rows, warp w of it steps w, w + WARPS, .. of four blocks. The order of the sums depends on the
shape of the weight alone: the bits of a token do not depend on the tokens beside it, or on how many there are.

Where gate and up come out of one launch, rows r are the gate's and rows r + 8 those of up, so that a lane holds both.

Off a GPU (the interpreter) a lane's loads and a warp's product are spelled out in plain Triton, which has no starred
expressions: tuples are added up.
Letters, dtypes and rounding are those of nf4_few.py.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from slothcore.kernels.glu import activate
from slothcore.kernels.nf4_permute import decode_words, decoded_pairs, products
from slothcore.kernels.nf4_weights import chosen_weight


def multiply_ptx(dtype: str) -> str:
    """PTX that decodes 8 weights of row r and 8 of row r + 8, and multiplies them by x.

    Operands: two sets of four sums, which are a shorter chain of dependent products than one; then the inputs: those
    sums, the word of row r and its 8 planes, those of row r + 8, and four registers of x.
    """
    first_word, second_word, x = 16, 25, 34
    lines = [".reg .b32 a<4>, b<4>;"]
    for word, name in ((first_word, "a"), (second_word, "b")):
        lines += ["{", *decoded_pairs(word, [f"{name}{i}" for i in range(4)]), "}"]
    for half in range(2):
        weights = f"{{a{2 * half}, b{2 * half}, a{2 * half + 1}, b{2 * half + 1}}}"
        lines.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
            f"{_vector(4 * half)}, {weights}, {{${x + 2 * half}, ${x + 2 * half + 1}}}, {_vector(8 + 4 * half)};"
        )
    return "\n".join(["{", *lines, "}"])


def _vector(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def _registers(outputs: Sequence[str], inputs: Sequence[str]) -> str:
    return ",".join([f"={kind}" for kind in outputs] + list(inputs))


MULTIPLY_BFLOAT16 = tl.constexpr(multiply_ptx("bf16"))
MULTIPLY_FLOAT16 = tl.constexpr(multiply_ptx("f16"))
MULTIPLY_REGISTERS = tl.constexpr(_registers("f" * 8, "f" * 8 + "r" * 22))
EIGHT_FLOAT32 = tl.constexpr((tl.float32,) * 8)

# A weight is read once, so it leaves the second-level cache before x, the factors and the keys do. The words are for
# the next step: behind a barrier of the warp ptxas cannot move the loads down to where they are needed.
LOAD_BLOCK = tl.constexpr("""{
.reg .b64 once;
createpolicy.fractional.L2::evict_first.b64 once, 1.0;
ld.global.L2::cache_hint.v4.b32 {$0, $1, $2, $3}, [$8], once;
ld.global.L2::cache_hint.v4.b32 {$4, $5, $6, $7}, [$8 + 16], once;
bar.warp.sync 0xffffffff;
}""")
LOAD_BLOCK_REGISTERS = tl.constexpr(_registers("r" * 8, "l"))
LOAD_X = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD_X_REGISTERS = tl.constexpr(_registers("r" * 4, "l"))
FOUR_INT32 = tl.constexpr((tl.int32,) * 4)
EIGHT_INT32 = tl.constexpr((tl.int32,) * 8)


@triton.jit
def _load_block(words_ptr, ON_GPU: tl.constexpr):
    """The 8 words of a block of 64 codes."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            LOAD_BLOCK, LOAD_BLOCK_REGISTERS, [words_ptr.to(tl.int64)], dtype=EIGHT_INT32, is_pure=False, pack=1
        )
    else:
        words = ()
        for i in tl.static_range(8):
            words = words + (tl.load(words_ptr + i),)  # noqa: RUF005
        return words


@triton.jit
def _load_x(x_ptr, inside, WHOLE: tl.constexpr, ON_GPU: tl.constexpr):
    """8 elements of x in four registers; zeros unless `inside`."""
    if ON_GPU:
        x = tl.inline_asm_elementwise(
            LOAD_X, LOAD_X_REGISTERS, [x_ptr.to(tl.int64)], dtype=FOUR_INT32, is_pure=False, pack=1
        )
    else:
        pairs = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        x = tl.load(pairs), tl.load(pairs + 1), tl.load(pairs + 2), tl.load(pairs + 3)
    if not WHOLE:
        x = tl.where(inside, x[0], 0), tl.where(inside, x[1], 0), tl.where(inside, x[2], 0), tl.where(inside, x[3], 0)
    return x


@triton.jit
def _weights(word, planes, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """Off a GPU: [warp, row, column] of what the lanes have decoded."""
    bits = decode_words(
        word, planes[0], planes[1], planes[2], planes[3], planes[4], planes[5], planes[6], planes[7], False
    )
    return tl.reshape(bits.to(DTYPE, bitcast=True).to(tl.float32), [WARPS, 8, 32])


@triton.jit
def _elements(x, DTYPE: tl.constexpr, WARPS: tl.constexpr):
    """Off a GPU: [warp, token, column] of what the lanes have read."""
    even = tl.join(tl.join(x[0] & 65535, x[2] & 65535), tl.join(x[1] & 65535, x[3] & 65535))
    odd = tl.join(tl.join(x[0] >> 16, x[2] >> 16), tl.join(x[1] >> 16, x[3] >> 16))
    bits = tl.join(even, odd).to(tl.int16)
    return tl.reshape(bits.to(DTYPE, bitcast=True).to(tl.float32), [WARPS, 8, 32])


@triton.jit
def _products_of_rows(weights, x, WARPS: tl.constexpr):
    """Off a GPU: what a lane gets of its row and tokens 2 g and 2 g + 1."""
    every = tl.sum(weights[:, :, None, :] * x[:, None, :, :], axis=3)
    even, odd = tl.split(tl.reshape(every, [WARPS, 8, 4, 2]))
    return tl.reshape(even, [32 * WARPS]), tl.reshape(odd, [32 * WARPS])


@triton.jit
def _multiply(
    sums, word_0, planes_0, word_1, planes_1, x, DTYPE: tl.constexpr, WARPS: tl.constexpr, ON_GPU: tl.constexpr
):
    """The sums after 8 more columns of each lane."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            MULTIPLY_FLOAT16 if DTYPE.is_fp16() else MULTIPLY_BFLOAT16,
            MULTIPLY_REGISTERS,
            sums + (word_0,) + planes_0 + (word_1,) + planes_1 + x,  # noqa: RUF005
            dtype=EIGHT_FLOAT32,
            is_pure=True,
            pack=1,
        )
    else:
        elements = _elements(x, DTYPE, WARPS)
        even_0, odd_0 = _products_of_rows(_weights(word_0, planes_0, DTYPE, WARPS), elements, WARPS)
        even_1, odd_1 = _products_of_rows(_weights(word_1, planes_1, DTYPE, WARPS), elements, WARPS)
        new = sums[0] + even_0, sums[1] + odd_0, sums[2] + even_1, sums[3] + odd_1
        return new + sums[4:]


@triton.jit
def _fetch_absmax(weight, block, NESTED: tl.constexpr):
    """What memory holds of the absmax of a block: code and scale, or where it is not nested itself, twice."""
    absmax = tl.load(weight[1] + block)
    scale = tl.load(weight[2] + block // 256) if NESTED else absmax
    return absmax, scale


@triton.jit
def _planes(
    weight, fetched, inside, DTYPE: tl.constexpr, NESTED: tl.constexpr, WHOLE: tl.constexpr, ON_GPU: tl.constexpr
):
    """The planes of nf4_permute.py of a block; those of zeros unless `inside`."""
    absmax = fetched[0]
    if NESTED:
        absmax = tl.load(weight[4] + absmax.to(tl.int32)) * fetched[1] + tl.load(weight[3])
    if not WHOLE:
        absmax = tl.where(inside, absmax, 0.0)
    return products(absmax, DTYPE, ON_GPU)


@triton.jit
def _over_warps(one, other, WARPS: tl.constexpr):
    return tl.sum(tl.reshape(one + other, [WARPS, 32]), axis=0)


@triton.jit
def _factor(weight, row, rank, DTYPE: tl.constexpr):
    """scaling * B, rounded, of some rows [32] and ranks [BLOCK_R]: float32."""
    B = tl.load(weight[5] + row[:, None] * weight[8] + rank[None, :], mask=(rank < weight[8])[None, :], other=0.0)
    return (B.to(tl.float32) * weight[9]).to(DTYPE).to(tl.float32)


@triton.jit
def _times_u(B, u_ptr, token, rank, M, ranks):
    """u B^T of some rows [32], each with a token of its own."""
    u = tl.load(u_ptr, mask=(token < M)[:, None] & (rank < ranks)[None, :], other=0.0)
    return tl.sum(u.to(tl.float32) * B, axis=1)


@triton.jit
def _gated(gate, up, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr):
    """act(gate) * up, rounded where separate operations would round."""
    activated, _ = activate(gate.to(DTYPE).to(tl.float32), ACTIVATION)
    return (activated.to(DTYPE).to(tl.float32) * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit(do_not_specialize=["M", "rank_0", "rank_1", "rank_2"])
def nf4_few_kernel(
    x_ptr, lora_x_ptr, out_ptr,
    words_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr, lora_B_0_ptr, bias_0_ptr,
    words_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr, lora_B_1_ptr, bias_1_ptr,
    words_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr, lora_B_2_ptr, bias_2_ptr,
    N_0, N_1, N_2, rank_0, rank_1, rank_2, scaling_0, scaling_1, scaling_2,
    stride_x_row, stride_lora_x_row, stride_out_row, M, K,
    WEIGHTS: tl.constexpr, NESTED: tl.constexpr, HAS_LORA: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, WARPS: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE: tl.constexpr, ON_GPU: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """This program computes 16 rows of one weight, or with an ACTIVATION 8 of the gate and 8 of up, for all tokens.

    WHOLE: the blocks of a row are a multiple of 4 * WARPS. Else those beyond its end are read as its last one, and
    multiplied as zeros.
    EARLY: the program may begin before the kernel in front has ended, and reads of the weights what it can until then.
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    program = tl.program_id(0)
    blocks = K // 64
    steps = tl.cdiv(blocks, 4 * WARPS)
    every = tl.arange(0, 32 * WARPS)
    row = every % 32 // 4

    first = (
        words_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr,
        lora_B_0_ptr, bias_0_ptr, N_0, rank_0, scaling_0,
    )  # fmt: skip
    second = (
        words_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr,
        lora_B_1_ptr, bias_1_ptr, N_1, rank_1, scaling_1,
    )  # fmt: skip
    third = (
        words_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr,
        lora_B_2_ptr, bias_2_ptr, N_2, rank_2, scaling_2,
    )  # fmt: skip
    # The weight of rows r and that of rows r + 8, their first rows in it and their first rank.
    if ACTIVATION is None:
        upper, number, out_first, upper_rank = chosen_weight(program, first, second, third, 16, WEIGHTS)
        upper_first = number * 16
        lower, lower_first, lower_rank, rows = upper, upper_first + 8, upper_rank, upper[7]
    elif WEIGHTS == 1:
        upper, upper_first, out_first, upper_rank = first, program * 8, 0, 0
        lower, lower_first, lower_rank, rows = first, upper_first + N_0 // 2, 0, N_0 // 2
    else:
        upper, upper_first, out_first, upper_rank = first, program * 8, 0, 0
        lower, lower_first, lower_rank, rows = second, upper_first, rank_0, N_0
    # Rows beyond the last repeat it, which costs no mask; they are never stored.
    last_upper = rows - 1
    last_lower = N_0 - 1 if ACTIVATION is not None else last_upper

    four = every // 32 * 4 + every % 4
    # Of the first block of a row in its weight; of the first in this lane.
    upper_row = tl.minimum(upper_first + row, last_upper) * blocks
    lower_row = tl.minimum(lower_first + row, last_lower) * blocks
    block = four if WHOLE else tl.minimum(four, blocks - 1)
    words_0 = _load_block(upper[0] + (upper_row + block).to(tl.int64) * 8, ON_GPU)
    words_1 = _load_block(lower[0] + (lower_row + block).to(tl.int64) * 8, ON_GPU)
    absmax_0 = _fetch_absmax(upper, upper_row + block, NESTED)
    absmax_1 = _fetch_absmax(lower, lower_row + block, NESTED)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    x_row_ptr = x_ptr + tl.minimum(row, M - 1).to(tl.int64) * stride_x_row

    zero = tl.zeros([32 * WARPS], dtype=tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    for step in tl.range(0, steps, num_stages=1):
        inside = four + step * (4 * WARPS) < blocks
        at_ptr = x_row_ptr + block * 64
        # The next step's words and scales are on their way while this step's are decoded.
        now_0, now_1, scales_0, scales_1 = words_0, words_1, absmax_0, absmax_1
        block = four + tl.minimum(step + 1, steps - 1) * (4 * WARPS)
        if not WHOLE:
            block = tl.minimum(block, blocks - 1)
        absmax_0 = _fetch_absmax(upper, upper_row + block, NESTED)
        absmax_1 = _fetch_absmax(lower, lower_row + block, NESTED)
        words_0 = _load_block(upper[0] + (upper_row + block).to(tl.int64) * 8, ON_GPU)
        words_1 = _load_block(lower[0] + (lower_row + block).to(tl.int64) * 8, ON_GPU)
        planes_0 = _planes(upper, scales_0, inside, DTYPE, NESTED, WHOLE, ON_GPU)
        planes_1 = _planes(lower, scales_1, inside, DTYPE, NESTED, WHOLE, ON_GPU)
        for i in tl.static_range(8):
            x = _load_x(at_ptr + 8 * i, inside, WHOLE, ON_GPU)
            sums = _multiply(sums, now_0[i], planes_0, now_1[i], planes_1, x, DTYPE, WARPS, ON_GPU)

    # Not before: programs of the next kernel would take the places of this one's and leave other multiprocessors idle.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    upper_even = _over_warps(sums[0], sums[4], WARPS)
    upper_odd = _over_warps(sums[1], sums[5], WARPS)
    lower_even = _over_warps(sums[2], sums[6], WARPS)
    lower_odd = _over_warps(sums[3], sums[7], WARPS)
    lane = tl.arange(0, 32)
    row = lane // 4
    upper_row = tl.minimum(upper_first + row, last_upper)
    lower_row = tl.minimum(lower_first + row, last_lower)
    token = lane % 4 * 2
    if HAS_LORA:
        for start in tl.range(0, tl.maximum(upper[8], lower[8]), BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)
            upper_B = _factor(upper, upper_row, rank, DTYPE)
            lower_B = _factor(lower, lower_row, rank, DTYPE)
            u_ptr = lora_x_ptr + token[:, None] * stride_lora_x_row + rank[None, :]
            upper_even += _times_u(upper_B, u_ptr + upper_rank, token, rank, M, upper[8])
            lower_even += _times_u(lower_B, u_ptr + lower_rank, token, rank, M, lower[8])
            u_ptr += stride_lora_x_row
            upper_odd += _times_u(upper_B, u_ptr + upper_rank, token + 1, rank, M, upper[8])
            lower_odd += _times_u(lower_B, u_ptr + lower_rank, token + 1, rank, M, lower[8])
    if HAS_BIAS:
        upper_bias = tl.load(upper[6] + upper_row).to(tl.float32)
        lower_bias = tl.load(lower[6] + lower_row).to(tl.float32)
        upper_even, upper_odd = upper_even + upper_bias, upper_odd + upper_bias
        lower_even, lower_odd = lower_even + lower_bias, lower_odd + lower_bias
    out_row_ptr = out_ptr + token.to(tl.int64) * stride_out_row + out_first + upper_first + row
    upper_exists, lower_exists = upper_first + row < rows, upper_first + 8 + row < rows
    if ACTIVATION is None:
        tl.store(out_row_ptr, upper_even.to(DTYPE), mask=(token < M) & upper_exists)
        tl.store(out_row_ptr + 8, lower_even.to(DTYPE), mask=(token < M) & lower_exists)
        out_row_ptr += stride_out_row
        tl.store(out_row_ptr, upper_odd.to(DTYPE), mask=(token + 1 < M) & upper_exists)
        tl.store(out_row_ptr + 8, lower_odd.to(DTYPE), mask=(token + 1 < M) & lower_exists)
    else:
        tl.store(out_row_ptr, _gated(upper_even, lower_even, DTYPE, ACTIVATION), mask=(token < M) & upper_exists)
        out_row_ptr += stride_out_row
        tl.store(out_row_ptr, _gated(upper_odd, lower_odd, DTYPE, ACTIVATION), mask=(token + 1 < M) & upper_exists)
