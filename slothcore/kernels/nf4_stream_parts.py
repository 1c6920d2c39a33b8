"""Parts of nf4_stream_kernel.py: what a lane or a warp of it does, in Gluon.

Decoding is what the time goes to, so it is divided between parts of the multiprocessor: every other word is decoded by
a table in shared memory, which holds both codes of a byte in float32, in 16 copies, so that no two lanes ask one bank
for different words; the others by byte permutes (nf4_permute.py). Both give dtype(code * absmax), to the bit.
The LoRA term is one more product of the tensor cores: a warp has 16 ranks.

Shared memory  the rings [warp][stage][unit], two buffers of sums [warp][lane][4], the table [byte][copy][2],
               x [token][block][144 bytes] (the padding keeps lanes apart), four barriers
A unit         words [16 rows][128 bytes], their 16-byte pieces permuted by row; the codes of absmax and the scales
A place        the weights of a tile's rows r and r + 8, as nf4_weights.py has them; their first rows there and their
               last ones; the first output of the tile's weight; the first ranks of both in u
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slothcore.kernels import nf4_stream_layout as layout
from slothcore.kernels import nf4_stream_ptx as ptx
from slothcore.kernels.glu import activate
from slothcore.kernels.nf4_permute import EIGHT_INT32, PRODUCTS_BFLOAT16, PRODUCTS_FLOAT16, PRODUCTS_REGISTERS
from slothcore.kernels.nf4_tensor import NF4_CODE
from slothcore.kernels.nf4_weights import chosen_weight

WARPS = gl.constexpr(layout.WARPS)
NESTED_UNIT = gl.constexpr(layout.UNIT_BYTES[True])
FLAT_UNIT = gl.constexpr(layout.UNIT_BYTES[False])
SUMS = gl.constexpr(layout.SUMS_BYTES)
TABLE = gl.constexpr(layout.TABLE_BYTES)
PITCH = gl.constexpr(layout.BLOCK_BYTES)
BETWEEN = gl.constexpr(layout.BETWEEN_TOKENS)
CODE = gl.constexpr(NF4_CODE)

SHARED_BASE = gl.constexpr(ptx.base())
POLICY = gl.constexpr(ptx.POLICY)
FETCH = gl.constexpr([ptx.fetch(nested=nested) for nested in (False, True)])
FETCH_REGISTERS = gl.constexpr(ptx.registers("r", "rrllllrlrllrr"))
READ_NESTED = gl.constexpr([ptx.read(nested=True, outstanding=i) for i in range(8)])
READ_FLAT = gl.constexpr([ptx.read(nested=False, outstanding=i) for i in range(8)])
READ_NESTED_REGISTERS = gl.constexpr(ptx.registers("r" * 18 + "ff", "rrrr"))
READ_FLAT_REGISTERS = gl.constexpr(ptx.registers("r" * 16 + "ff", "rrr"))
READ_NESTED_TYPES = gl.constexpr((gl.int32,) * 18 + (gl.float32,) * 2)
READ_FLAT_TYPES = gl.constexpr((gl.int32,) * 16 + (gl.float32,) * 2)
# By what decodes, then by dtype.
MULTIPLY = gl.constexpr([[ptx.multiply(dtype, tabled=t) for dtype in ("bf16", "f16")] for t in (False, True)])
MULTIPLY_REGISTERS = gl.constexpr([ptx.multiply_registers(tabled=t) for t in (False, True)])
LORA = gl.constexpr([ptx.lora(dtype) for dtype in ("bf16", "f16")])
LORA_REGISTERS = gl.constexpr(ptx.registers("ffff", "f" * 16))
GIVE = gl.constexpr(ptx.give())
GIVE_REGISTERS = gl.constexpr(ptx.registers("r", "rrrrrffff"))
TAKE = gl.constexpr(ptx.take(layout.WARPS))
TAKE_REGISTERS = gl.constexpr(ptx.registers("ffff", "rrrrrr"))
COPY_X = gl.constexpr(ptx.copy_x())
STORE_ENTRY = gl.constexpr(ptx.store_entry())
MAKE_BARRIERS = gl.constexpr(ptx.make_barriers(layout.WARPS))
LOAD_SHARED = gl.constexpr(ptx.LOAD_SHARED)
EVERYBODY = gl.constexpr(ptx.EVERYBODY)
WAIT_EARLY = gl.constexpr(ptx.WAIT_EARLY)
SIGNAL_EARLY = gl.constexpr(ptx.SIGNAL_EARLY)
FOUR_INT32 = gl.constexpr((gl.int32,) * 4)
FOUR_FLOAT32 = gl.constexpr((gl.float32,) * 4)
EIGHT_FLOAT32 = gl.constexpr((gl.float32,) * 8)


@gluon.jit
def place_of(tile, first, second, third, WEIGHTS: gl.constexpr, GATED: gl.constexpr):
    """The place of a tile."""
    if not GATED:
        weight, number, out_first, rank_first = chosen_weight(tile, first, second, third, 16, WEIGHTS)
        last = weight[7] - 1
        return weight, weight, number * 16, number * 16 + 8, last, last, out_first, rank_first, rank_first
    elif WEIGHTS == 1:
        half = first[7] // 2
        return first, first, tile * 8, tile * 8 + half, half - 1, first[7] - 1, 0, 0, 0
    else:
        return first, second, tile * 8, tile * 8, first[7] - 1, second[7] - 1, 0, 0, first[8]


@gluon.jit
def places_of_lane(ring, lane, NESTED: gl.constexpr):
    """In the first unit of a ring: where a lane copies to, and what it reads (even and odd pieces, codes, scales)."""
    row = lane // 4
    four = lane % 4
    piece = (lane % 8) ^ (lane // 8)
    to_even = ring + lane // 8 * 128 + piece * 16
    to_odd = ring + lane // 8 * 128 + (piece ^ 4) * 16
    at_even = ring + row * 128 + ((2 * four) ^ row) * 16
    at_odd = ring + row * 128 + ((2 * four + 1) ^ row) * 16
    if NESTED:
        to = (to_even, to_odd, ring + 2048 + lane % 16 * 4, ring + 2112 + lane % 16 * 4)
        at = (at_even, at_odd, ring + 2048 + row * 4 + four, ring + 2112 + row * 4)
    else:
        to = (to_even, to_odd, ring + 2048 + lane % 16 * 16, ring)
        at = (at_even, at_odd, ring + 2048 + row * 16 + four * 4, ring)
    return to, at


@gluon.jit
def fetch(
    place, to, slot_at, lane, step, steps, there, blocks, policy,
    NESTED: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """Copy a unit into its place, or only count it."""
    upper, lower, upper_first, lower_first, last_upper, last_lower, _, _, _ = place
    first = step * 4
    piece = lane % 8 * 4
    row_0 = gl.minimum(upper_first + lane // 8, last_upper) * blocks + first
    row_1 = gl.minimum(upper_first + lane // 8 + 4, last_upper) * blocks + first
    row_2 = gl.minimum(lower_first + lane // 8, last_lower) * blocks + first
    row_3 = gl.minimum(lower_first + lane // 8 + 4, last_lower) * blocks + first
    upper_words = upper[0] + piece
    lower_words = lower[0] + piece
    from_0 = (upper_words + row_0.to(gl.int64) * 8).to(gl.int64)
    from_1 = (upper_words + row_1.to(gl.int64) * 8).to(gl.int64)
    from_2 = (lower_words + row_2.to(gl.int64) * 8).to(gl.int64)
    from_3 = (lower_words + row_3.to(gl.int64) * 8).to(gl.int64)
    row = lane % 8
    upper_row = gl.minimum(upper_first + row, last_upper) * blocks + first
    lower_row = gl.minimum(lower_first + row, last_lower) * blocks + first
    is_upper = lane % 16 < 8
    of_row = gl.where(is_upper, upper_row, lower_row)
    if GATED:
        absmax = gl.where(is_upper, (upper[1] + of_row).to(gl.int64), (lower[1] + of_row).to(gl.int64))
    else:
        absmax = (upper[1] + of_row).to(gl.int64)
    scale = absmax
    if NESTED:
        if GATED:
            scale = gl.where(is_upper, (upper[2] + of_row // 256).to(gl.int64), (lower[2] + of_row // 256).to(gl.int64))
        else:
            scale = (upper[2] + of_row // 256).to(gl.int64)
    wanted = lane * 0 + there.to(gl.int32)
    if not WHOLE:
        wanted = gl.where(step < steps, wanted, 0)
    gl.inline_asm_elementwise(
        FETCH[NESTED], FETCH_REGISTERS,
        [to[0] + slot_at, to[1] + slot_at, from_0, from_1, from_2, from_3,
         to[2] + slot_at, absmax, to[3] + slot_at, scale, policy, wanted, (lane < 16).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read(place, at, slot_at, inside, STAGES: gl.constexpr, NESTED: gl.constexpr, WHOLE: gl.constexpr):
    """A unit: the words of rows r and r + 8, and absmax, which is zero unless the unit is `inside` of the columns."""
    if NESTED:
        v0, v1, v2, v3, v4, v5, v6, v7, w0, w1, w2, w3, w4, w5, w6, w7, code_0, code_1, scale_0, scale_1 = (
            gl.inline_asm_elementwise(
                READ_NESTED[STAGES - 1], READ_NESTED_REGISTERS,
                [at[0] + slot_at, at[1] + slot_at, at[2] + slot_at, at[3] + slot_at],
                dtype=READ_NESTED_TYPES, is_pure=False, pack=1,
            )
        )  # fmt: skip
        absmax_0 = gl.load(place[0][4] + code_0) * scale_0 + gl.load(place[0][3])
        absmax_1 = gl.load(place[1][4] + code_1) * scale_1 + gl.load(place[1][3])
    else:
        v0, v1, v2, v3, v4, v5, v6, v7, w0, w1, w2, w3, w4, w5, w6, w7, absmax_0, absmax_1 = gl.inline_asm_elementwise(
            READ_FLAT[STAGES - 1], READ_FLAT_REGISTERS, [at[0] + slot_at, at[1] + slot_at, at[2] + slot_at],
            dtype=READ_FLAT_TYPES, is_pure=False, pack=1,
        )  # fmt: skip
    if not WHOLE:
        absmax_0 = gl.where(inside, absmax_0, 0.0)
        absmax_1 = gl.where(inside, absmax_1, 0.0)
    return (v0, v1, v2, v3, v4, v5, v6, v7), (w0, w1, w2, w3, w4, w5, w6, w7), absmax_0, absmax_1


@gluon.jit
def planes_of(absmax, DTYPE: gl.constexpr):
    return gl.inline_asm_elementwise(
        PRODUCTS_FLOAT16 if DTYPE.is_fp16() else PRODUCTS_BFLOAT16, PRODUCTS_REGISTERS, [absmax],
        dtype=EIGHT_INT32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fill_table(table, thread):
    """Of entry b, whose bytes are [128 b, 128 b + 128), a thread writes 16, for b = thread / 8 + 32 i."""
    low = gl.full([32 * WARPS], CODE[0], gl.float32, thread.type.layout)
    for i in gl.static_range(1, 16):
        low = gl.where(thread // 8 % 16 == i, CODE[i], low)
    for i in gl.static_range(8):
        high = gl.where(thread < 128, CODE[2 * i], CODE[2 * i + 1])
        gl.inline_asm_elementwise(
            STORE_ENTRY, "=r,r,f,f", [table + 4096 * i + thread * 16, high, low],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def copy_x(x_ptr, stride_x_row, x_at, thread, M, K):
    """x of all tokens into shared memory."""
    for token in range(M):
        from_ptr = x_ptr + token.to(gl.int64) * stride_x_row
        to = x_at + token * (K // 64 * PITCH + BETWEEN)
        for start in range(0, K // 8, 32 * WARPS):
            chunk = gl.minimum(start + thread, K // 8 - 1)
            gl.inline_asm_elementwise(
                COPY_X, "=r,l,r", [(from_ptr + chunk * 8).to(gl.int64), to + chunk // 8 * PITCH + chunk % 8 * 16],
                dtype=gl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@gluon.jit
def load_x(address):
    """8 elements of x in four registers."""
    return gl.inline_asm_elementwise(LOAD_SHARED, "=r,=r,=r,=r,r", [address], dtype=FOUR_INT32, is_pure=False, pack=1)


@gluon.jit
def multiply(
    sums, word_0, absmax_0, planes_0, word_1, absmax_1, planes_1, table, bytes_of_entry, x,
    BY_TABLE: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The sums after 8 more columns of each lane."""
    if BY_TABLE:
        weights = (word_0, absmax_0, word_1, absmax_1, table, bytes_of_entry)
    else:
        weights = (word_0,) + planes_0 + (word_1,) + planes_1  # noqa: RUF005
    return gl.inline_asm_elementwise(
        MULTIPLY[BY_TABLE][DTYPE.is_fp16()], MULTIPLY_REGISTERS[BY_TABLE], sums + weights + x,
        dtype=EIGHT_FLOAT32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def factors_of(place, lora_x_ptr, stride_lora_x_row, M, row, rank):
    """Four ranks of B in rows r and r + 8, and of u; zeros beyond the ranks there are."""
    upper, lower, upper_first, lower_first, last_upper, last_lower, _, upper_rank, lower_rank = place
    upper_B = upper[5] + gl.minimum(upper_first + row, last_upper) * upper[8] + rank
    below = rank - (lower_rank - upper_rank)
    lower_B = lower[5] + gl.minimum(lower_first + row, last_lower) * lower[8] + below
    u_ptr = lora_x_ptr + gl.minimum(row, M - 1) * stride_lora_x_row + upper_rank + rank
    ranks = gl.maximum(upper[8], lower_rank - upper_rank + lower[8])
    a = ()
    b = ()
    u = ()
    for i in gl.static_range(4):
        a = a + (gl.load(upper_B + i, mask=rank + i < upper[8], other=0.0),)  # noqa: RUF005
        b = b + (gl.load(lower_B + i, mask=(below + i >= 0) & (below + i < lower[8]), other=0.0),)  # noqa: RUF005
        u = u + (gl.load(u_ptr + i, mask=rank + i < ranks, other=0.0),)  # noqa: RUF005
    return a, b, u


@gluon.jit
def with_lora(sums, place, factors, DTYPE: gl.constexpr):
    """The four sums after 16 more ranks."""
    a, b, u = factors
    operands = sums
    for i in gl.static_range(4):
        operands = operands + (a[i].to(gl.float32) * place[0][9],)  # noqa: RUF005
    for i in gl.static_range(4):
        operands = operands + (b[i].to(gl.float32) * place[1][9],)  # noqa: RUF005
    for i in gl.static_range(4):
        operands = operands + (u[i].to(gl.float32),)  # noqa: RUF005
    return gl.inline_asm_elementwise(
        LORA[DTYPE.is_fp16()], LORA_REGISTERS, operands, dtype=FOUR_FLOAT32, is_pure=True, pack=1
    )


@gluon.jit
def _gated(gate, up, DTYPE: gl.constexpr, ACTIVATION: gl.constexpr):
    """act(gate) * up, rounded where separate operations would round."""
    activated, _ = activate(gate.to(DTYPE).to(gl.float32), ACTIVATION)
    return (activated.to(DTYPE).to(gl.float32) * up.to(DTYPE).to(gl.float32)).to(DTYPE)


@gluon.jit
def give(sums, turn, smem_sums, barriers, thread):
    """Leave a warp's sums of its tile number `turn` to the warp that adds them up."""
    buffer = turn % 2
    to = smem_sums + buffer * SUMS + thread * 16
    parity = thread * 0 + (turn // 2 + 1) % 2
    where = (to, barriers + 16 + buffer * 8, parity, barriers + buffer * 8, thread % 32)
    gl.inline_asm_elementwise(GIVE, GIVE_REGISTERS, where + sums, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def finish(
    place, turn, smem_sums, barriers, thread, out_ptr, stride_out_row, M,
    HAS_BIAS: gl.constexpr, ACTIVATION: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """One warp adds up the sums of a tile, when all have given theirs, and stores its outputs."""
    upper, lower, upper_first, lower_first, last_upper, last_lower, out_first, _, _ = place
    lane = thread % 32
    mine = thread // 32 == turn % WARPS
    buffer = turn % 2
    sums = gl.inline_asm_elementwise(
        TAKE, TAKE_REGISTERS,
        [smem_sums + buffer * SUMS + lane * 16, barriers + buffer * 8, lane * 0 + turn // 2 % 2,
         barriers + 16 + buffer * 8, lane, mine.to(gl.int32)],
        dtype=FOUR_FLOAT32, is_pure=False, pack=1,
    )  # fmt: skip
    row = lane // 4
    upper_row = upper_first + row
    lower_row = lower_first + row
    upper_exists = mine & (upper_row <= last_upper)
    lower_exists = mine & (lower_row <= last_lower)
    if HAS_BIAS:
        upper_bias = gl.load(upper[6] + upper_row, mask=upper_exists, other=0.0).to(gl.float32)
        lower_bias = gl.load(lower[6] + lower_row, mask=lower_exists, other=0.0).to(gl.float32)
    for i in gl.static_range(2):
        # Of tokens 2 g and 2 g + 1.
        token = lane % 4 * 2 + i
        of_upper = sums[i]
        of_lower = sums[i + 2]
        if HAS_BIAS:
            of_upper += upper_bias
            of_lower += lower_bias
        to_ptr = out_ptr + token.to(gl.int64) * stride_out_row + out_first + upper_row
        if ACTIVATION is None:
            gl.store(to_ptr, of_upper.to(DTYPE), mask=upper_exists & (token < M))
            gl.store(to_ptr + 8, of_lower.to(DTYPE), mask=lower_exists & (token < M))
        else:
            gl.store(to_ptr, _gated(of_upper, of_lower, DTYPE, ACTIVATION), mask=upper_exists & (token < M))
