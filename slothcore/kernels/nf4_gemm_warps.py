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
are dealt out evenly. A program that begins inside a tile leaves its sums, in float32, to the program with the first
steps of that tile, which adds them in order: always the same one. A program's parts of tiles come before its whole
tiles, and what it leaves to another before what it waits for, so nobody waits in a circle.

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

from slothcore.kernels.nf4_blocks import UNIT, choose, decode, fetch_scales, read_words, request

# Its name until Triton 3.6, and since.
warpgroup_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier

ROWS = gl.constexpr(128)
STAGES = gl.constexpr(4)
BAND = gl.constexpr(8)  # tiles of tokens that are walked down before going right: they share a weight in the L2 cache
PRODUCERS = gl.constexpr(2)
PIECES = gl.constexpr(4)  # of a tile's tokens, stored one after another: the buffer then fits beside the stages


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
def _produce(
    x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty, ring, arrived,
    M, N, K, R, cut, share,
    COUNT: gl.constexpr, NESTED: gl.constexpr, TOKENS: gl.constexpr, BACKWARD: gl.constexpr,
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
        for step in range(gl.where(last == units, lora_steps, 0)):
            if step % PRODUCERS == WHICH:
                w_buf = w_bufs.index(stage)._reinterpret(x_desc.dtype, [ROWS, 64], lora_w_desc.layout)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(ready.index(stage), X_BYTES + ROWS * 128)
                tma.async_copy_global_to_shared(
                    lora_x_desc, [token, step * 64], ready.index(stage), x_bufs.index(stage)
                )
                for panel in gl.static_range(ROWS // 64):
                    at = [step * 64, output + 64 * panel] if BACKWARD else [output + 64 * panel, step * 64]
                    tma.async_copy_global_to_shared(lora_w_desc, at, ready.index(stage), w_buf.slice(64 * panel, 64))
                mbarrier.arrive(ready.index(stage), count=1)
            stage, phase = _next(stage, phase)


@gluon.jit
def _piece_offsets(piece: gl.constexpr, TOKENS: gl.constexpr, layout: gl.constexpr):
    """Where a piece of a consumer's sums [64, TOKENS] lies among them: in squares of 8 x 8, as a warp has them."""
    row = gl.arange(0, 64, gl.SliceLayout(1, layout))
    column = gl.arange(0, TOKENS // PIECES, gl.SliceLayout(0, layout)) + piece * (TOKENS // PIECES)
    return gl.expand_dims(row % 8 * 8 + row // 8 * 64, 1) + gl.expand_dims(column % 8 + column // 8 * 512, 0)


@gluon.jit
def _consume(
    bias_ptr, out_desc, x_bufs, w_bufs, out_buf, ready, empty, sums_ptr, flags_ptr, M, N, K, R, cut, share,
    WHICH: gl.constexpr, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Four warps that sum 64 outputs of each tile, from 64 * WHICH on, for all of its tokens."""
    outputs = K if BACKWARD else N
    units = gl.cdiv(N if BACKWARD else K, 64 * UNIT)
    lora_steps = gl.cdiv(R, 64)
    tiles_m = gl.cdiv(M, TOKENS)
    tiles_n = gl.cdiv(outputs, ROWS)
    program = gl.program_id(0)
    begin, end, parts = _segments(cut, share, units)
    whole = gl.cdiv(gl.maximum(tiles_m * tiles_n - cut - program, 0), gl.num_programs(0))
    # 256 tokens in one instruction want 154 registers a thread when the kernel starts, which more than 12 warps cannot
    # have.
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS // 2, 16])
    stage = 0
    phase = 0
    for number in range(parts + whole):
        tile, first, last = _segment(number, begin, end, parts, cut, units)
        token, output = _tile_position(tile, tiles_m, tiles_n, TOKENS)
        output += 64 * WHICH
        steps = (last - first) * UNIT + gl.where(last == units, lora_steps, 0)
        sums = gl.zeros([64, TOKENS], gl.float32, layout)
        if HAS_BIAS:
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
        half_0, half_1 = gl.split(gl.permute(gl.reshape(sums, [64, 2, TOKENS // 2]), (0, 2, 1)))
        piece_0, piece_1 = gl.split(gl.permute(gl.reshape(half_0, [64, 2, TOKENS // 4]), (0, 2, 1)))
        piece_2, piece_3 = gl.split(gl.permute(gl.reshape(half_1, [64, 2, TOKENS // 4]), (0, 2, 1)))
        pieces = (piece_0, piece_1, piece_2, piece_3)
        if first > 0:
            own_ptr = sums_ptr + (program * 2 + WHICH) * (64 * TOKENS)
            for piece in gl.static_range(PIECES):
                offsets = _piece_offsets(piece, TOKENS, gl.constexpr(pieces[piece].type.layout))
                gl.store(own_ptr + offsets, pieces[piece])
            warpgroup_barrier()
            gl.atomic_xchg(flags_ptr + program * 2 + WHICH, 1, sem="release", scope="gpu")
        else:
            # Those who have the rest of this tile, in order; none if this program has all of it.
            for other in range(program + 1, gl.where(last < units, gl.cdiv((tile + 1) * units, share), 0)):
                while gl.atomic_add(flags_ptr + other * 2 + WHICH, 0, sem="acquire", scope="gpu") == 0:
                    pass
                gl.atomic_xchg(flags_ptr + other * 2 + WHICH, 0, sem="relaxed", scope="gpu")
                their_ptr = sums_ptr + (other * 2 + WHICH) * (64 * TOKENS)
                added = ()
                for piece in gl.static_range(PIECES):
                    offsets = _piece_offsets(piece, TOKENS, gl.constexpr(pieces[piece].type.layout))
                    added += (pieces[piece] + gl.load(their_ptr + offsets, cache_modifier=".cg"),)
                pieces = added
            for piece in gl.static_range(PIECES):
                tma.store_wait(0)
                out_buf.permute((1, 0)).store(pieces[piece].to(out_desc.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [token + piece * (TOKENS // PIECES), output], out_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "R", "start_1", "start_2", "cut", "share"])
def nf4_gemm_warps_kernel(
    x_desc, lora_x_desc, lora_w_desc, bias_ptr, out_desc,
    words_0_desc, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr,
    words_1_desc, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr,
    words_2_desc, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr,
    start_1, start_2, sums_ptr, flags_ptr, cut, share, M, N, K, R,
    COUNT: gl.constexpr, NESTED: gl.constexpr, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr, TOKENS: gl.constexpr,
):  # fmt: skip
    """out [M, outputs] = x W^T + lora_x lora_w^T + bias, BACKWARD without the transpositions.

    The first `cut` tiles are dealt out, `share` units a program; of the others this program takes every
    num_programs-th. Weights 1 and 2 begin at rows start_1 and start_2 of the N that all have together; those beyond
    COUNT repeat the last. flags: a zero for each consumer of each program, in the end too.
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
    gl.warp_specialize(
        [
            (_consume, (
                bias_ptr, out_desc, x_bufs, w_bufs, out_bufs.index(0), ready, empty, sums_ptr, flags_ptr,
                M, N, K, R, cut, share, 0, HAS_BIAS, TOKENS, BACKWARD,
            )),
            (_consume, (
                bias_ptr, out_desc, x_bufs, w_bufs, out_bufs.index(1), ready, empty, sums_ptr, flags_ptr,
                M, N, K, R, cut, share, 1, HAS_BIAS, TOKENS, BACKWARD,
            )),
            (_produce, (
                x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty,
                ring, arrived, M, N, K, R, cut, share, COUNT, NESTED, TOKENS, BACKWARD, 0,
            )),
            (_produce, (
                x_desc, lora_x_desc, lora_w_desc, words_descs, weights, starts, x_bufs, w_bufs, ready, empty,
                ring, arrived, M, N, K, R, cut, share, COUNT, NESTED, TOKENS, BACKWARD, 1,
            )),
        ],
        [4, 4, 4],
        [176, 80, 80],
    )  # fmt: skip
