"""Blocks of NF4 weights on their way into shared memory, for the warps of nf4_gemm_warps.py; in Gluon.

A step has 128 blocks of 64 weights: a column of 128 rows of W, or 64 rows of two columns. The copy engine brings their
codes; a thread reads whole blocks, decodes them as nf4_permute.py says, and writes each as 128 bytes: a row of the
swizzled tile [64, 64] that the tensor cores read. Of the scales, those of `UNIT` steps are loaded at a time.

Several weights below each other count as one, `starts` are their first rows; a step has rows or columns of one of them.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from slothcore.kernels.nf4_permute import (
    EIGHT_INT32,
    PRODUCTS_BFLOAT16,
    PRODUCTS_FLOAT16,
    PRODUCTS_REGISTERS,
    pairs_ptx,
)
from slothcore.kernels.nf4_tensor import Nf4Tensor

PAIRS = gl.constexpr(pairs_ptx())
# Written before all planes are read: no output may share a register with an input.
PAIRS_REGISTERS = gl.constexpr(",".join(["=&r"] * 4 + ["r"] * 9))
FOUR_INT32 = gl.constexpr((gl.int32,) * 4)

UNIT = gl.constexpr(4)  # steps whose scales are loaded at a time; tiles are cut between units
BYTES_OF_CODES = gl.constexpr(128 * 32)
THREAD_BLOCKS = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))  # a block's words to a thread


def describe_words(weight: Nf4Tensor, *, backward: bool) -> TensorDescriptor:
    """The codes of a weight as words [N, K / 8]: the 128 blocks of a step, below each other or in two columns."""
    box, swizzle = ([64, 16], 64) if backward else ([128, 8], 32)
    words = weight.packed.view(torch.int32).view(weight.shape[0], weight.shape[1] // 8)
    return TensorDescriptor.from_tensor(words, box, gl.NVMMASharedLayout(swizzle, 32, 2))


@gluon.jit
def choose(index, parts, COUNT: gl.constexpr):
    """parts[index], of COUNT that are looked at."""
    if COUNT == 1:
        return parts[0]
    elif COUNT == 2:
        return gl.where(index == 0, parts[0], parts[1])
    else:
        return gl.where(index == 0, parts[0], gl.where(index == 1, parts[1], parts[2]))


@gluon.jit
def weight_of(row, starts, COUNT: gl.constexpr):
    """Which weight a row of all is in."""
    weight = 0
    if COUNT > 1:
        weight = (row >= starts[1]).to(gl.int32)
    if COUNT > 2:
        weight += (row >= starts[2]).to(gl.int32)
    return weight


@gluon.jit
def request(
    words_descs, starts, output, step, place, ring, arrived, wanted, COUNT: gl.constexpr, BACKWARD: gl.constexpr
):
    """Have the codes of a step brought into a place of the ring, if they are wanted."""
    mbarrier.expect(arrived.index(place), BYTES_OF_CODES, pred=wanted)
    weight = weight_of(step * 64 if BACKWARD else output, starts, COUNT)
    start = choose(weight, starts, COUNT)
    if BACKWARD:
        at = [step * 64 - start, output // 8]
    else:
        at = [output - start, step * 8]
    for w in gl.static_range(COUNT):
        tma.async_copy_global_to_shared(
            words_descs[w], at, arrived.index(place), ring.index(place), pred=wanted & (weight == w)
        )


@gluon.jit
def read_words(place_buf, BACKWARD: gl.constexpr):
    """A step's words [128, 8] from a place of the ring."""
    if BACKWARD:
        two_columns: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 1], [0, 2], [0, 4]], [[1, 0], [2, 0], [4, 0], [8, 0], [16, 0]], [[32, 0], [0, 8]], [], [64, 16]
        )
        words = gl.reshape(place_buf.load(two_columns), [64, 2, 8])
        words = gl.reshape(gl.permute(words, (1, 0, 2)), [128, 8])
        return gl.convert_layout(words, THREAD_BLOCKS, assert_trivial=True)
    else:
        return place_buf.load(THREAD_BLOCKS)


@gluon.jit
def fetch_scales(
    weights, starts, output, unit, N, K, COUNT: gl.constexpr, NESTED: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Of the four steps of a unit: each block's absmax, or its code, and the nested absmax (or the absmax again)."""
    weight = weight_of(unit * (64 * UNIT) if BACKWARD else output, starts, COUNT)
    start = choose(weight, starts, COUNT)
    end = N
    if COUNT > 1:
        end = gl.where(weight == COUNT - 1, N, choose(weight + 1, starts, COUNT))
    absmax_ptr = choose(weight, weights[0], COUNT)
    nested_absmax_ptr = choose(weight, weights[1], COUNT) if NESTED else absmax_ptr
    blocks = K // 64
    i = gl.arange(0, 128, gl.SliceLayout(1, THREAD_BLOCKS))
    if BACKWARD:
        # The second column may lie beyond the last: what is decoded there is not stored.
        block = (unit * (64 * UNIT) + i % 64 - start) * blocks + gl.minimum(output // 64 + i // 64, blocks - 1)
        absmax = ()
        scale = ()
        for step in gl.static_range(UNIT):
            absmax += (gl.load(absmax_ptr + block),)
            scale += (gl.load(nested_absmax_ptr + (block >> 8)) if NESTED else absmax[step],)
            block += 64 * blocks
    else:
        block = (gl.minimum(output + i, end - 1) - start) * blocks + unit * UNIT
        if NESTED:
            # Four codes are one word, and their blocks have one nested absmax.
            word = gl.load(absmax_ptr.to(gl.pointer_type(gl.int32)) + (block >> 2))
            code = word.to(gl.uint32, bitcast=True)
            absmax = (code & 255, (code >> 8) & 255, (code >> 16) & 255, code >> 24)
            one = gl.load(nested_absmax_ptr + (block >> 8))
            scale = (one, one, one, one)
        else:
            absmax = (
                gl.load(absmax_ptr + block), gl.load(absmax_ptr + block + 1),
                gl.load(absmax_ptr + block + 2), gl.load(absmax_ptr + block + 3),
            )  # fmt: skip
            scale = absmax
    return absmax, scale, weight


@gluon.jit
def decode(words, absmax, DTYPE: gl.constexpr):
    """[blocks, 32] pairs of weights from words [blocks, 8] and the float32 absmax [blocks]."""
    low_0, low_1, low_2, low_3, high_0, high_1, high_2, high_3 = gl.inline_asm_elementwise(
        PRODUCTS_FLOAT16 if DTYPE.is_fp16() else PRODUCTS_BFLOAT16, PRODUCTS_REGISTERS, [absmax],
        dtype=EIGHT_INT32, is_pure=True, pack=1,
    )  # fmt: skip
    pair_0, pair_1, pair_2, pair_3 = gl.inline_asm_elementwise(
        PAIRS, PAIRS_REGISTERS,
        [
            words,
            gl.expand_dims(low_0, 1), gl.expand_dims(low_1, 1), gl.expand_dims(low_2, 1), gl.expand_dims(low_3, 1),
            gl.expand_dims(high_0, 1), gl.expand_dims(high_1, 1), gl.expand_dims(high_2, 1), gl.expand_dims(high_3, 1),
        ],
        dtype=FOUR_INT32, is_pure=True, pack=1,
    )  # fmt: skip
    pairs = gl.join(gl.join(pair_0, pair_2), gl.join(pair_1, pair_3))
    return gl.reshape(pairs, [128, 32])
