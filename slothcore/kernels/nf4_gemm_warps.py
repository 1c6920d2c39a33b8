"""NF4 products for some hundred rows, whose warps take different parts of the work; in Gluon, for Hopper.

Forward   y^T  = W x^T + B u^T + b       a tile: 128 outputs by `TOKENS` tokens, summed over the columns of W
Backward  dx^T = W^T dy^T + A^T v^T      a tile: 128 columns by `TOKENS` tokens, summed over the rows of W
Shapes, rounding: nf4_gemm_group.py. W is one weight or up to three below each other, x is [M, K], dy [M, N].

Two groups of four warps bring what every second step of 64 summands multiplies into shared memory: x (or dy) and the
codes by the copy engine, the weight by decoding the codes (nf4_blocks.py). Eight warps only multiply, 64 outputs each
four. So decoding takes the integer units while the tensor cores work, which one set of warps that does both cannot
have. A group waits in half of its time, for shared memory or at barriers: hence two. The LoRA term is one more step.

The weight is the first operand of the product, so that a decoded weight meets 256 tokens and the tensor cores read
shared memory less than they would with x first. Backward they read the same tile of weights the other way.

Tiles that do not fill all multiprocessors once more are cut: their steps, one tile's after another's in units of four,
are dealt out evenly. How the parts are added up stands in nf4_gemm_sums.py.

The kernel may begin while the one in front of it ends (early.py): it reads weights until x is there.

Barriers: `ready` of a stage has two arrivals, that of the expected bytes and that of the decode; `empty` one from each
consumer. A producer awaits `empty` with the opposite parity, so that the first round passes.
A name must not begin as another name's value and be carried by the same loop: Triton would take it for constant.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slothcore.kernels import nf4_stream_ptx as ptx
from slothcore.kernels.nf4_blocks import UNIT, choose, decode, fetch_scales, read_words, request, weight_of
from slothcore.kernels.nf4_gemm_sums import PIECES, store_tile

ROWS = gl.constexpr(128)
STAGES = gl.constexpr(4)
BAND = gl.constexpr(8)  # tiles of tokens that are walked down before going right: they share a weight in the L2 cache
PRODUCERS = gl.constexpr(2)
WAIT_EARLY = gl.constexpr(ptx.WAIT_EARLY)
SIGNAL_EARLY = gl.constexpr(ptx.SIGNAL_EARLY)


def describe(matrix: Tensor, rows: int) -> TensorDescriptor:
    """For the copy engine: pieces of so many rows and 64 columns, laid out as the tensor cores read them."""
    return TensorDescriptor.from_tensor(matrix, [rows, 64], gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _segments(cut, share, units):
    """Where this program's share of the cut tiles begins and ends, in units, and of how many tiles it is a part."""
    end = cut * units
    begin = gl.minimum(gl.program_id(0) * share, end)
    end = gl.minimum(begin + share, end)
    return begin, end, gl.cdiv(end, units) - begin // units


@gluon.jit
def _segment(number, begin, end, parts, cut, units):
    """Segment `number` of this program: its tile, and the tile's units that it has. Its parts of tiles come first."""
    is_part = number < parts
    tile = gl.where(is_part, begin // units + number, cut + gl.program_id(0) + (number - parts) * gl.num_programs(0))
    first = gl.where(is_part, gl.maximum(begin - tile * units, 0), 0)
    last = gl.where(is_part, gl.minimum(end - tile * units, units), units)
    return tile, first, last


@gluon.jit
def _tile_position(tile, tiles_m, tiles_n, TOKENS: gl.constexpr):
    """First token and first output of a tile: neighbours share a weight, for BAND tiles of tokens at a time."""
    in_band = BAND * tiles_n
    start = tile // in_band * BAND
    height = gl.minimum(tiles_m - start, BAND)
    inside = tile % in_band
    return (start + inside % height) * TOKENS, inside // height * ROWS


@gluon.jit
def _next(stage, phase):
    """The stage after this, and its parity."""
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    return gl.where(stage == STAGES, 0, stage), phase


@gluon.jit
def _ranks_of(weight, ranks, COUNT: gl.constexpr):
    """Of a weight, the ranks that its factors have, and the first of them in u."""
    first = 0
    if COUNT > 1:
        first = gl.where(weight > 0, ranks[0], 0)
    if COUNT > 2:
        first += gl.where(weight > 1, ranks[1], 0)
    return choose(weight, ranks, COUNT), first


@gluon.jit
def _produce(
    x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty, ring, arrived,
    M, N, K, R, cut, share, ranks,
    COUNT: gl.constexpr, NESTED: gl.constexpr, TOKENS: gl.constexpr, BACKWARD: gl.constexpr, APART: gl.constexpr,
    WHICH: gl.constexpr,
):  # fmt: skip
    """Four warps that fill every second stage, from number WHICH on.

    weights: absmax, nested absmax, nested offset and nested code of all COUNT weights; starts: their first rows.
    """
    X_BYTES: gl.constexpr = TOKENS * 128
    units = gl.cdiv(N if BACKWARD else K, 64 * UNIT)
    lora_steps = gl.cdiv(R, 64)
    tiles_m = gl.cdiv(M, TOKENS)
    tiles_n = gl.cdiv(K if BACKWARD else N, ROWS)
    begin, end, parts = _segments(cut, share, units)
    whole = gl.cdiv(gl.maximum(tiles_m * tiles_n - cut - gl.program_id(0), 0), gl.num_programs(0))
    stage = 0
    phase = 1
    ring_phase = 0
    for number in range(parts + whole):
        tile, first, last = _segment(number, begin, end, parts, cut, units)
        token, output = _tile_position(tile, tiles_m, tiles_n, TOKENS)
        for place in gl.static_range(WHICH, UNIT, PRODUCERS):
            request(
                words_descs, starts, output, first * UNIT + place, place, ring, arrived, first < last, COUNT, BACKWARD
            )
        absmax, scale, weight = fetch_scales(weights, starts, output, first, N, K, COUNT, NESTED, BACKWARD)
        gl.inline_asm_elementwise(WAIT_EARLY, "=r,r", [stage], dtype=gl.int32, is_pure=False, pack=1)
        for unit in range(first, last):
            if NESTED:
                offset = gl.load(choose(weight, weights[2], COUNT))
                code_ptr = choose(weight, weights[3], COUNT)
                ready_absmax = ()
                for step in gl.static_range(UNIT):
                    ready_absmax += (gl.load(code_ptr + absmax[step].to(gl.int32)) * scale[step] + offset,)
            else:
                ready_absmax = absmax
            absmax, scale, weight = fetch_scales(
                weights, starts, output, gl.minimum(unit + 1, last - 1), N, K, COUNT, NESTED, BACKWARD
            )
            for part in gl.static_range(UNIT):
                if part % PRODUCERS == WHICH:
                    step = unit * UNIT + part
                    mbarrier.wait(empty.index(stage), phase)
                    mbarrier.expect(ready.index(stage), X_BYTES)
                    tma.async_copy_global_to_shared(x_desc, [token, step * 64], ready.index(stage), x_bufs.index(stage))
                    mbarrier.wait(arrived.index(part), ring_phase)
                    words = read_words(ring.index(part), BACKWARD)
                    w_bufs.index(stage).store(decode(words, ready_absmax[part], x_desc.dtype))
                    fence_async_shared()
                    mbarrier.arrive(ready.index(stage), count=1)
                    # The place that was read takes the codes of the same step of the next unit.
                    request(
                        words_descs, starts, output, step + UNIT, part, ring, arrived, unit + 1 < last, COUNT, BACKWARD
                    )
                stage, phase = _next(stage, phase)
            ring_phase ^= 1
        rank_first = 0
        if APART:
            lora_steps, rank_first = _ranks_of(weight_of(output, starts, COUNT), ranks, COUNT)
            lora_steps = gl.minimum(lora_steps, 1)
        for step in range(gl.where(last == units, lora_steps, 0)):
            if step % PRODUCERS == WHICH:
                w_buf = w_bufs.index(stage)._reinterpret(x_desc.dtype, [ROWS, 64], lora_w_desc.layout)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready.index(stage), X_BYTES if APART else X_BYTES + ROWS * 128)
                tma.async_copy_global_to_shared(
                    lora_x_desc, [token, rank_first + step * 64], ready.index(stage), x_bufs.index(stage)
                )
                for panel in gl.static_range(0 if APART else ROWS // 64):
                    at = [step * 64, output + 64 * panel] if BACKWARD else [output + 64 * panel, step * 64]
                    tma.async_copy_global_to_shared(lora_w_desc, at, ready.index(stage), w_buf.slice(64 * panel, 64))
                mbarrier.arrive(ready.index(stage), count=1)
            stage, phase = _next(stage, phase)
    # Not before: programs of the next kernel find no room beside this one, but on multiprocessors that have none of it.
    gl.inline_asm_elementwise(SIGNAL_EARLY, "=r,r", [stage], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _consume(
    bias_ptr, out_desc, x_bufs, w_bufs, out_buf, ready, empty, sums_ptr, flags_ptr, M, N, K, R, cut, share,
    starts, lora_Bs, ranks, scalings, COUNT: gl.constexpr, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr,
    TOGETHER: gl.constexpr, BACKWARD: gl.constexpr, APART: gl.constexpr, WHICH: gl.constexpr,
):  # fmt: skip
    """Four warps that sum 64 outputs of each tile, from 64 * WHICH on, for all of its tokens."""
    outputs = K if BACKWARD else N
    units = gl.cdiv(N if BACKWARD else K, 64 * UNIT)
    lora_steps = 0 if APART else gl.cdiv(R, 64)
    tiles_m = gl.cdiv(M, TOKENS)
    tiles_n = gl.cdiv(outputs, ROWS)
    program = gl.program_id(0)
    begin, end, parts = _segments(cut, share, units)
    whole = gl.cdiv(gl.maximum(tiles_m * tiles_n - cut - program, 0), gl.num_programs(0))
    # 256 tokens in one instruction want 154 registers a thread when the kernel starts, which more than 12 warps cannot
    # have.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(128, TOKENS), 16])
    stage = 0
    phase = 0
    for number in range(parts + whole):
        tile, first, last = _segment(number, begin, end, parts, cut, units)
        token, output = _tile_position(tile, tiles_m, tiles_n, TOKENS)
        if APART:
            weight = weight_of(output, starts, COUNT)
            rank = choose(weight, ranks, COUNT)
            operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
            row = output + 64 * WHICH + gl.arange(0, 64, gl.SliceLayout(1, operand))
            own_row = gl.expand_dims(row - choose(weight, starts, COUNT), 1)
            column = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, operand)), 0)
            wanted = gl.expand_dims(row < N, 1) & (column < rank) & (last == units)
            lora_B = gl.load(choose(weight, lora_Bs, COUNT) + own_row * rank + column, mask=wanted, other=0.0)
        output += 64 * WHICH
        steps = (last - first) * UNIT + gl.where(last == units, lora_steps, 0)
        sums = gl.zeros([64, TOKENS], gl.float32, layout)
        if HAS_BIAS:
            gl.inline_asm_elementwise(WAIT_EARLY, "=r,r", [stage], dtype=gl.int32, is_pure=False, pack=1)
            row = output + gl.arange(0, 64, gl.SliceLayout(1, layout))
            bias = gl.load(bias_ptr + row, mask=(row < N) & (first == 0), other=0.0)
            sums += gl.expand_dims(bias.to(gl.float32), 1)
        for step in range(steps):
            mbarrier.wait(ready.index(stage), phase)
            w = w_bufs.index(stage)._reinterpret(out_desc.dtype, [ROWS, 64], out_desc.layout).slice(64 * WHICH, 64)
            if BACKWARD:
                w = w.permute((1, 0))
            sums = warpgroup_mma(w, x_bufs.index(stage).permute((1, 0)), sums, is_async=True)
            # The product before this one is done, so its stage is free; this one goes on while the next is awaited.
            sums = warpgroup_mma_wait(num_outstanding=1, deps=(sums,))
            mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
            stage, phase = _next(stage, phase)
        sums = warpgroup_mma_wait(num_outstanding=0, deps=(sums,))
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1)
        # Two conditions, because the first is decided when the kernel is compiled.
        if APART:  # noqa: SIM102
            if (last == units) & (rank > 0):
                mbarrier.wait(ready.index(stage), phase)
                lora_B_rounded = (lora_B.to(gl.float32) * choose(weight, scalings, COUNT)).to(out_desc.dtype)
                sums = warpgroup_mma(lora_B_rounded, x_bufs.index(stage).permute((1, 0)), sums)
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase)
        store_tile(
            sums, tile, first, last, units, share, token, output, out_desc, out_buf, sums_ptr, flags_ptr,
            WHICH, TOKENS, TOGETHER,
        )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "R", "start_1", "start_2", "cut", "share", "rank_0", "rank_1", "rank_2"])
def nf4_gemm_warps_kernel(
    x_desc, lora_x_desc, lora_w_desc, bias_ptr, out_desc,
    words_0_desc, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr,
    words_1_desc, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr,
    words_2_desc, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr,
    start_1, start_2, sums_ptr, flags_ptr, cut, share, M, N, K, R,
    lora_B_0_ptr, lora_B_1_ptr, lora_B_2_ptr, rank_0, rank_1, rank_2, scaling_0, scaling_1, scaling_2,
    COUNT: gl.constexpr, NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr, TOKENS: gl.constexpr,
    TOGETHER: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """out [M, outputs] = x W^T + lora_x lora_w^T + bias, BACKWARD without the transpositions.

    The first `cut` tiles are dealt out, `share` units a program; of the others this program takes every
    num_programs-th. Weights 1 and 2 begin at rows start_1 and start_2 of the N that all have together; those beyond
    COUNT repeat the last. flags: a zero for each consumer of each program, in the end too.
    TOGETHER: in how many equal parts the cut tiles are, if their programs add them up together; else 1.
    APART: instead of lora_w, each weight has a factor of its own [N_i, rank_i], which is multiplied by its scaling and
    then rounded; at most 64 ranks each, which follow one another in lora_x.
    """
    words_layout: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, TOKENS, 64], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 32], words_layout)
    out_bufs = gl.allocate_shared_memory(x_desc.dtype, [2, TOKENS // PIECES, 64], out_desc.layout)
    ring_shape: gl.constexpr = [UNIT] + words_0_desc.block_type.shape  # noqa: RUF005 - Gluon unpacks no list
    ring = gl.allocate_shared_memory(gl.int32, ring_shape, words_0_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    arrived = gl.allocate_shared_memory(gl.int64, [UNIT, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=2)
        mbarrier.init(empty.index(stage), count=2)
    for place in gl.static_range(UNIT):
        mbarrier.init(arrived.index(place), count=1)
    words_descs = (words_0_desc, words_1_desc, words_2_desc)
    weights = (
        (absmax_0_ptr, absmax_1_ptr, absmax_2_ptr),
        (nested_absmax_0_ptr, nested_absmax_1_ptr, nested_absmax_2_ptr),
        (nested_offset_0_ptr, nested_offset_1_ptr, nested_offset_2_ptr),
        (nested_code_0_ptr, nested_code_1_ptr, nested_code_2_ptr),
    )
    starts = (0, start_1, start_2)
    lora_Bs = (lora_B_0_ptr, lora_B_1_ptr, lora_B_2_ptr)
    ranks = (rank_0, rank_1, rank_2)
    scalings = (scaling_0, scaling_1, scaling_2)
    gl.warp_specialize(
        [
            (_consume, (
                bias_ptr, out_desc, x_bufs, w_bufs, out_bufs.index(0), ready, empty, sums_ptr, flags_ptr,
                M, N, K, R, cut, share, starts, lora_Bs, ranks, scalings,
                COUNT, HAS_BIAS, TOKENS, TOGETHER, BACKWARD, APART, 0,
            )),
            (_consume, (
                bias_ptr, out_desc, x_bufs, w_bufs, out_bufs.index(1), ready, empty, sums_ptr, flags_ptr,
                M, N, K, R, cut, share, starts, lora_Bs, ranks, scalings,
                COUNT, HAS_BIAS, TOKENS, TOGETHER, BACKWARD, APART, 1,
            )),
            (_produce, (
                x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty,
                ring, arrived, M, N, K, R, cut, share, ranks, COUNT, NESTED, TOKENS, BACKWARD, APART, 0,
            )),
            (_produce, (
                x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty,
                ring, arrived, M, N, K, R, cut, share, ranks, COUNT, NESTED, TOKENS, BACKWARD, APART, 1,
            )),
        ],
        [4, 4, 4],
        [176, 80, 80],
    )  # fmt: skip
