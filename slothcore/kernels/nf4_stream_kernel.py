"""The kernel of nf4_stream.py: products of few rows with NF4 weights that never stop reading; in Gluon, for Hopper.

A program is a multiprocessor's: it walks over tiles of 16 weight rows, and its warps divide their columns in units of
four blocks of 64. Each warp has a ring of its own in shared memory, into which it copies the codes and scales of units
ahead, so that memory is read while the warp decodes, and even before x is there. Nothing but the sums of a tile passes
between warps, by buffers and barriers at which only the one that adds them up waits, a tile later.

A lane has the rows and columns that nf4_lanes.py says, and the order of the sums depends on the shape of the weight
alone. Where gate and up come out of one launch, rows r of a tile are the gate's and rows r + 8 those of up.
Letters, dtypes and rounding are those of nf4_few.py; what is done by hand is in nf4_stream_parts.py.
A name must not begin as another name's value and be carried by the same loop: Triton would take it for constant.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from slothcore.kernels.nf4_stream_parts import (
    BETWEEN,
    EVERYBODY,
    FLAT_UNIT,
    MAKE_BARRIERS,
    NESTED_UNIT,
    PITCH,
    POLICY,
    SHARED_BASE,
    SIGNAL_EARLY,
    SUMS,
    TABLE,
    WAIT_EARLY,
    WARPS,
    copy_x,
    factors_of,
    fetch,
    fill_table,
    finish,
    give,
    load_x,
    multiply,
    place_of,
    places_of_lane,
    planes_of,
    read,
    with_lora,
)


@gluon.jit(
    do_not_specialize=[
        "M", "N_0", "N_1", "N_2", "rank_0", "rank_1", "rank_2", "stride_lora_x_row", "stride_out_row", "tiles",
        "bytes_of_entry",
    ]
)  # fmt: skip
def nf4_stream_kernel(
    x_ptr, lora_x_ptr, out_ptr,
    words_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr, lora_B_0_ptr, bias_0_ptr,
    words_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr, lora_B_1_ptr, bias_1_ptr,
    words_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr, lora_B_2_ptr, bias_2_ptr,
    N_0, N_1, N_2, rank_0, rank_1, rank_2, scaling_0, scaling_1, scaling_2,
    stride_x_row, stride_lora_x_row, stride_out_row, M, K, tiles, bytes_of_entry,
    WEIGHTS: gl.constexpr, NESTED: gl.constexpr, HAS_LORA: gl.constexpr, HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr, STAGES: gl.constexpr, X_BYTES: gl.constexpr, WHOLE: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """This program computes every so many-th tile of 16 weight rows, or of 8 gate's and 8 of up, for all tokens.

    X_BYTES: of x in shared memory, and behind it of the barriers.
    WHOLE: the units of a row are a multiple of WARPS.
    bytes_of_entry: 128; a constant would be turned into a shift, which is the permutes' unit's.
    """
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    GATED: gl.constexpr = ACTIVATION is not None
    THREADS: gl.constexpr = 32 * WARPS
    UNIT: gl.constexpr = NESTED_UNIT if NESTED else FLAT_UNIT
    RING: gl.constexpr = WARPS * STAGES * UNIT
    TABLE_AT: gl.constexpr = RING + 2 * SUMS
    X_AT: gl.constexpr = TABLE_AT + TABLE
    BYTES: gl.constexpr = X_AT + X_BYTES
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    shared = gl.allocate_shared_memory(gl.int32, [BYTES // 128, 32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Unless something is stored by its name, the name of the shared memory is not there for the other instructions.
    shared.index(RING // 128).store(gl.full([32], 0, gl.int32, layout))
    thread = gl.arange(0, THREADS, layout)
    if EARLY:
        # At once: nf4_stream.py leaves no room in which the next one's programs could be packed.
        gl.inline_asm_elementwise(SIGNAL_EARLY, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
    lane = thread % 32
    warp = thread // 32
    row = lane // 4
    four = lane % 4
    blocks = K // 64
    steps = blocks // 4
    rounds = gl.cdiv(steps, WARPS)
    programs = gl.num_programs(0)

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

    smem = gl.inline_asm_elementwise(SHARED_BASE, "=r,r", [thread * 0], dtype=gl.int32, is_pure=False, pack=1)
    ring = smem + warp * (STAGES * UNIT)
    smem_sums = smem + RING
    barriers = smem + (BYTES - 32)
    to, at = places_of_lane(ring, lane, NESTED)
    policy = gl.inline_asm_elementwise(POLICY, "=l,r", [thread], dtype=gl.int64, is_pure=False, pack=1)

    fetch_tile = gl.program_id(0)
    fetch_round = 0
    for i in gl.static_range(STAGES):
        coming = place_of(fetch_tile, first, second, third, WEIGHTS, GATED)
        fetch(
            coming, to, i * UNIT, lane, fetch_round * WARPS + warp, steps, fetch_tile < tiles, blocks, policy,
            NESTED, GATED, WHOLE,
        )  # fmt: skip
        fetch_round += 1
        fetch_tile = gl.where(fetch_round == rounds, fetch_tile + programs, fetch_tile)
        fetch_round = gl.where(fetch_round == rounds, 0, fetch_round)
    gl.inline_asm_elementwise(MAKE_BARRIERS, "=r,r,r", [barriers, thread], dtype=gl.int32, is_pure=False, pack=1)
    table = smem + TABLE_AT + lane % 16 * 8
    fill_table(smem + TABLE_AT, thread)
    if EARLY:
        gl.inline_asm_elementwise(WAIT_EARLY, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)
    x_row = smem + X_AT + gl.minimum(row, M - 1) * (blocks * PITCH + BETWEEN)
    copy_x(x_ptr, stride_x_row, smem + X_AT, thread, M, K)
    gl.inline_asm_elementwise(EVERYBODY, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)

    zero = gl.full([THREADS], 0.0, gl.float32, layout)
    here = place_of(gl.program_id(0), first, second, third, WEIGHTS, GATED)
    next_0, next_1, next_absmax_0, next_absmax_1 = read(here, at, 0, warp < steps, STAGES, NESTED, WHOLE)
    slot = 0
    turn = 0
    for tile in range(gl.program_id(0), tiles, programs):
        place = place_of(tile, first, second, third, WEIGHTS, GATED)
        if HAS_LORA:
            factors = factors_of(place, lora_x_ptr, stride_lora_x_row, M, row, warp * 16 + four * 4)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for r in range(rounds):
            words_0 = next_0
            words_1 = next_1
            absmax_0 = next_absmax_0
            absmax_1 = next_absmax_1
            # The words just read leave their place to a unit further on; those of the next unit are read meanwhile.
            wanted = place_of(fetch_tile, first, second, third, WEIGHTS, GATED)
            fetch(
                wanted, to, slot * UNIT, lane, fetch_round * WARPS + warp, steps, fetch_tile < tiles, blocks, policy,
                NESTED, GATED, WHOLE,
            )  # fmt: skip
            fetch_round += 1
            fetch_tile = gl.where(fetch_round == rounds, fetch_tile + programs, fetch_tile)
            fetch_round = gl.where(fetch_round == rounds, 0, fetch_round)
            slot = gl.where(slot == STAGES - 1, 0, slot + 1)
            is_last = r == rounds - 1
            following = place_of(gl.where(is_last, tile + programs, tile), first, second, third, WEIGHTS, GATED)
            next_step = gl.where(is_last, 0, r + 1) * WARPS + warp
            next_0, next_1, next_absmax_0, next_absmax_1 = read(
                following, at, slot * UNIT, next_step < steps, STAGES, NESTED, WHOLE
            )
            planes_0 = planes_of(absmax_0, DTYPE)
            planes_1 = planes_of(absmax_1, DTYPE)
            block = (r * WARPS + warp) * 4 + four
            if not WHOLE:
                block = gl.minimum(block, blocks - 1)
            for i in gl.static_range(8):
                x = load_x(x_row + block * PITCH + 16 * i)
                sums = multiply(
                    sums, words_0[i], absmax_0, planes_0, words_1[i], absmax_1, planes_1, table, bytes_of_entry, x,
                    i % 2 == 1, DTYPE,
                )  # fmt: skip
        of_tile = (sums[0] + sums[4], sums[1] + sums[5], sums[2] + sums[6], sums[3] + sums[7])
        if HAS_LORA:
            of_tile = with_lora(of_tile, place, factors, DTYPE)
            ranks = gl.maximum(place[0][8], place[8] - place[7] + place[1][8])
            for rank in range(16 * WARPS, ranks, 16 * WARPS):
                more = factors_of(place, lora_x_ptr, stride_lora_x_row, M, row, rank + warp * 16 + four * 4)
                of_tile = with_lora(of_tile, place, more, DTYPE)
        give(of_tile, turn, smem_sums, barriers, thread)
        # The tile before, whose sums all warps have given meanwhile.
        if turn > 0:
            before = place_of(tile - programs, first, second, third, WEIGHTS, GATED)
            finish(
                before, turn - 1, smem_sums, barriers, thread, out_ptr, stride_out_row, M, HAS_BIAS, ACTIVATION, DTYPE
            )
        turn += 1
    last = place_of(gl.program_id(0) + (turn - 1) * programs, first, second, third, WEIGHTS, GATED)
    finish(last, turn - 1, smem_sums, barriers, thread, out_ptr, stride_out_row, M, HAS_BIAS, ACTIVATION, DTYPE)
    shared._keep_alive()
