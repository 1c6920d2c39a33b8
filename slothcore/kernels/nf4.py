"""NF4 quantisation and dequantisation in Triton; the layout and the equations are in nf4_tensor.py.

Shapes    W [N, K], flattened; packed [ceil(N K / 2)] uint8; absmax [B]; nested_absmax
          [ceil(B / 256)].  B = ceil(N K / 64), the number of blocks.
Dtypes    W float32, bfloat16 or float16; scales and products float32.
Rounding  W = dtype(code * absmax): one product in float32, then one rounding to dtype.
          absmax = code8 * nested_absmax + offset: rounded after the product and after the sum. Launches therefore
          forbid the compiler to fuse the two (enable_fp_fusion=False).
Exactness Bits equal those of bitsandbytes' CUDA kernels: their thresholds, the hardware's approximate reciprocal (on a
          GPU; the interpreter divides), subnormal weights taken for zero. A block of zeros gets code 0, not 7, because
          0 * (1 / 0) is NaN and NaN exceeds no threshold. Only products below 2^-126 differ: bitsandbytes flushes them.
Source    Dettmers et al. 2023, arXiv:2305.14314.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4_tensor import (
    BLOCK,
    NESTED_BLOCK,
    Nf4Tensor,
    block_count,
    check_dequantize_output,
    check_group_output,
    check_quantizable,
    nested_code,
    nf4_code,
)

Decode = Literal["gather", "select", "load"]
"""How a kernel finds the value of a code: in a table in shared memory, by a tree of selects, by a load through L1."""

QUANTIZE_BLOCKS = 64
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)

# Midpoints of adjacent codes as bitsandbytes' CUDA kernels compare against them, each exact in float32.
CODE_THRESHOLDS: tuple[float, ...] = (
    -0.848096430301666259765625,
    -0.61063289642333984375,
    -0.459995269775390625,
    -0.339679419994354248046875,
    -0.2346073985099792480468750,
    -0.137911736965179443359375,
    -0.045525018125772476196289,
    0.039790149778127670288086,
    0.12025525420904159545898,
    0.2035212516784667968750,
    0.292013764381408691406250,
    0.38931253552436828613281,
    0.501663386821746826171875,
    0.642786920070648193359375,
    0.861478388309478759765625,
)


@triton.jit
def _reciprocal(x, ON_GPU: tl.constexpr):
    """1 / x as bitsandbytes' CUDA build computes it (nvcc --use_fast_math): the hardware's approximation."""
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _flush_subnormal(x):
    return tl.where(tl.abs(x) < SMALLEST_NORMAL, 0.0, x)


@triton.jit
def _nf4_quantize_kernel(
    weight_ptr,
    packed_ptr,
    absmax_ptr,
    total,  # values in the weight
    BLOCKS: tl.constexpr,
    THRESHOLDS: tl.constexpr,
    ON_GPU: tl.constexpr,
):
    # This program quantises BLOCKS blocks of 64 values.
    first_block = tl.program_id(0).to(tl.int64) * BLOCKS
    block = first_block + tl.arange(0, BLOCKS)
    index = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    values = _flush_subnormal(tl.load(weight_ptr + index, mask=index < total, other=0.0).to(tl.float32))

    absmax = tl.max(tl.abs(values), axis=1)
    scaled = values * _reciprocal(absmax, ON_GPU)[:, None]
    code = tl.zeros_like(scaled).to(tl.int32)
    for i in tl.static_range(15):
        code += (scaled > THRESHOLDS[i]).to(tl.int32)

    # Beyond an odd end, the low nibble holds the code of zero.
    high, low = tl.split(tl.reshape(code, [BLOCKS, 32, 2]))
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(packed_ptr + byte, ((high << 4) | low).to(tl.uint8), mask=byte < (total + 1) // 2)
    tl.store(absmax_ptr + block, absmax, mask=block * 64 < total)


@triton.jit
def _nf4_quantize_absmax_kernel(centred_ptr, map_ptr, code_ptr, nested_absmax_ptr, blocks, ON_GPU: tl.constexpr):
    # This program quantises 256 absmax values, their mean already subtracted, to 8 bits.
    first = tl.program_id(0).to(tl.int64) * 256
    index = first + tl.arange(0, 256)
    values = _flush_subnormal(tl.load(centred_ptr + index, mask=index < blocks, other=0.0))
    nested_absmax = tl.max(tl.abs(values), axis=0)
    scaled = values * _reciprocal(nested_absmax, ON_GPU)

    # Nearest of the 256 ascending values by bisection; a tie goes to the even index, as in bitsandbytes' search.
    code = tl.zeros_like(scaled).to(tl.int32)
    for step in tl.static_range(8):
        upper = code + (128 >> step)
        midpoint = (tl.load(map_ptr + upper - 1) + tl.load(map_ptr + upper)) * 0.5
        beyond = (scaled > midpoint) | ((scaled == midpoint) & (upper % 2 == 0))
        code = tl.where(beyond, upper, code)
    tl.store(code_ptr + index, code.to(tl.uint8), mask=index < blocks)
    tl.store(nested_absmax_ptr + tl.program_id(0), nested_absmax)


@triton.jit
def _select(code, bit: tl.constexpr, when_clear, when_set):
    return tl.where((code & bit) != 0, when_set, when_clear)


@triton.jit
def decode_nf4(code, table_ptr, DECODE: tl.constexpr):
    """The float32 value of each 4-bit code in a tile of any shape.

    table_ptr: NF4_CODE, [16] float32; unused by "select", whose constants are the same.
    """
    code = code.to(tl.int32)
    if DECODE == "gather":
        # One read from shared memory a value: 16 entries lie in 16 banks, so lanes never wait for each other.
        flat = tl.reshape(code, [code.numel])
        return tl.reshape(tl.gather(tl.load(table_ptr + tl.arange(0, 16)), flat, 0), code.shape)
    elif DECODE == "load":
        return tl.load(table_ptr + code)
    else:
        low = _select(
            code,
            4,
            _select(
                code,
                2,
                _select(code, 1, -1.0, -0.6961928009986877),
                _select(code, 1, -0.5250730514526367, -0.39491748809814453),
            ),
            _select(
                code,
                2,
                _select(code, 1, -0.28444138169288635, -0.18477343022823334),
                _select(code, 1, -0.09105003625154495, 0.0),
            ),
        )
        high = _select(
            code,
            4,
            _select(
                code,
                2,
                _select(code, 1, 0.07958029955625534, 0.16093020141124725),
                _select(code, 1, 0.24611230194568634, 0.33791524171829224),
            ),
            _select(
                code,
                2,
                _select(code, 1, 0.44070982933044434, 0.5626170039176941),
                _select(code, 1, 0.7229568362236023, 1.0),
            ),
        )
        return _select(code, 8, low, high)


@triton.jit
def load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, mask, NESTED: tl.constexpr):
    """The float32 absmax of a tile of blocks; masked ones are finite and of no use.

    block: indices of blocks in the flattened weight. NESTED: whether absmax is stored in 8 bits.
    """
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    if NESTED:
        scale = tl.load(nested_absmax_ptr + block // 256, mask=mask, other=0.0)
        return tl.load(nested_code_ptr + absmax.to(tl.int32)) * scale + tl.load(nested_offset_ptr)
    else:
        return absmax


@triton.jit
def _expand_blocks(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, out_ptr, total, program,
    NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Write the values of BLOCKS blocks, from number program * BLOCKS on, of a weight of `total` values.

    WHOLE_BLOCKS: the last block is full too.
    """
    block = program.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    in_weight = block * 64 < total
    byte = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    index = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    # A mask that is constant along a block keeps the loads and stores wide.
    byte_mask = in_weight[:, None] if WHOLE_BLOCKS else byte < (total + 1) // 2
    value_mask = in_weight[:, None] if WHOLE_BLOCKS else index < total

    packed = tl.load(packed_ptr + byte, mask=byte_mask, other=0)
    absmax = load_absmax(absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, block, in_weight, NESTED)
    code = tl.reshape(tl.join(packed >> 4, packed & 15), [BLOCKS, 64])
    values = decode_nf4(code, table_ptr, DECODE) * absmax[:, None]
    tl.store(out_ptr + index, values.to(out_ptr.dtype.element_ty), mask=value_mask)


@triton.jit
def _nf4_dequantize_kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, out_ptr, total,
    NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    # This program expands BLOCKS blocks of 32 bytes into 64 values each.
    _expand_blocks(
        packed_ptr, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, nested_code_ptr, table_ptr, out_ptr, total,
        tl.program_id(0), NESTED, WHOLE_BLOCKS, BLOCKS, DECODE,
    )  # fmt: skip


@triton.jit
def _nf4_dequantize_group_kernel(
    packed_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr, total_0,
    packed_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr, total_1,
    packed_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr, total_2,
    table_ptr, out_ptr,
    NESTED: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    # This program expands BLOCKS blocks of one weight; the weights' programs and values follow each other.
    program = tl.program_id(0)
    programs_0 = tl.cdiv(total_0, 64 * BLOCKS)
    programs_1 = tl.cdiv(total_1, 64 * BLOCKS)
    # A branch for each weight, not a choice of pointers: the compiler then still knows how each is aligned.
    if program < programs_0:
        _expand_blocks(
            packed_0_ptr, absmax_0_ptr, nested_absmax_0_ptr, nested_offset_0_ptr, nested_code_0_ptr, table_ptr,
            out_ptr, total_0, program, NESTED, WHOLE_BLOCKS, BLOCKS, DECODE,
        )  # fmt: skip
    elif program < programs_0 + programs_1:
        _expand_blocks(
            packed_1_ptr, absmax_1_ptr, nested_absmax_1_ptr, nested_offset_1_ptr, nested_code_1_ptr, table_ptr,
            out_ptr + total_0, total_1, program - programs_0, NESTED, WHOLE_BLOCKS, BLOCKS, DECODE,
        )  # fmt: skip
    elif packed_2_ptr is not None:
        _expand_blocks(
            packed_2_ptr, absmax_2_ptr, nested_absmax_2_ptr, nested_offset_2_ptr, nested_code_2_ptr, table_ptr,
            out_ptr + total_0 + total_1, total_2, program - programs_0 - programs_1,
            NESTED, WHOLE_BLOCKS, BLOCKS, DECODE,
        )  # fmt: skip


@dataclass(frozen=True)
class DequantizeConfig:
    """How nf4_dequantize is launched; the result does not depend on it.

    By default a thread turns 4 bytes into 8 values: one wide store of 16-bit values, with no exchange between threads.
    """

    blocks: int = 64
    """Blocks of 64 values a program expands; a power of two."""
    num_warps: int = 4
    decode: Decode = "gather"


DEFAULT_CONFIG = DequantizeConfig()
LARGEST_GROUP = 3
NO_WEIGHT = (None, None, None, None, None, 0)


def nf4_quantize(weight: Tensor, *, double_quant: bool = True) -> Nf4Tensor:
    """Quantise a weight to NF4, bit for bit as bitsandbytes does on a GPU.

    Args:
        weight: [N, K] float32, bfloat16 or float16; need not be contiguous.
        double_quant: store absmax in 8 bits too.
    Returns: the NF4 weight, on the device of `weight`.
    Raises: ValueError if `weight` is not a non-empty matrix of one of these dtypes.
    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    check_quantizable(weight)
    weight = weight.detach().contiguous()
    shape = (weight.shape[0], weight.shape[1])
    total, blocks = weight.numel(), block_count(shape)
    packed = torch.empty((total + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    _nf4_quantize_kernel[(ceil_div(blocks, QUANTIZE_BLOCKS),)](
        weight,
        packed,
        absmax,
        total,
        BLOCKS=QUANTIZE_BLOCKS,
        THRESHOLDS=CODE_THRESHOLDS,
        ON_GPU=weight.is_cuda,
        num_warps=4,
        enable_fp_fusion=False,
    )
    if not double_quant:
        return Nf4Tensor(packed, absmax, None, None, None, shape)

    # torch's own mean, as in bitsandbytes: another order of summation would move the offset by a bit.
    offset = absmax.mean()
    codes, nested_absmax, code_map = quantize_absmax(absmax - offset)
    return Nf4Tensor(packed, codes, nested_absmax, offset, code_map, shape)


def quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of the absmax less its mean, [B] float32.

    Returns: codes [B] uint8; nested_absmax [ceil(B / 256)] float32; nested_code [256] float32.
    """
    code_map = nested_code(centred.device)
    codes = torch.empty(centred.shape, dtype=torch.uint8, device=centred.device)
    nested_absmax = torch.empty(-(-centred.numel() // NESTED_BLOCK), dtype=torch.float32, device=centred.device)
    _nf4_quantize_absmax_kernel[(nested_absmax.numel(),)](
        centred,
        code_map,
        codes,
        nested_absmax,
        centred.numel(),
        ON_GPU=centred.is_cuda,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, nested_absmax, code_map


def nf4_dequantize(
    weight: Nf4Tensor, *, dtype: torch.dtype, out: Tensor | None = None, _config: DequantizeConfig | None = None
) -> Tensor:
    """Expand an NF4 weight in one launch, bit for bit as bitsandbytes does.

    Args:
        weight: the NF4 weight [N, K].
        dtype: float32, bfloat16 or float16: each value is the float32 product rounded to it.
        out: where to write, [N, K] contiguous of `dtype` (a slice of rows of a larger buffer, say).
        _config: a launch configuration other than the default; for benchmarks.
    Returns: `out`, or a new tensor [N, K].
    Raises: ValueError if `out` does not fit or `dtype` is not one of these.
    """
    out = check_dequantize_output(weight, dtype, out)
    config = _config or DEFAULT_CONFIG
    total = out.numel()
    _nf4_dequantize_kernel[(ceil_div(total, BLOCK * config.blocks),)](
        weight.packed, *absmax_arguments(weight), nf4_code(out.device), out, total,
        NESTED=weight.is_nested, WHOLE_BLOCKS=total % BLOCK == 0,
        BLOCKS=config.blocks, DECODE=config.decode, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def nf4_dequantize_group(weights: Sequence[Nf4Tensor], *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand weights of equal width one below the other, two or three in one launch; bits as `nf4_dequantize`.

    Args:
        weights: at least one, [N_i, K].
        dtype: float32, bfloat16 or float16.
        out: where to write, [sum of N_i, K] contiguous of `dtype`.
    Returns: `out`, or a new tensor [sum of N_i, K].
    Raises: ValueError if the widths differ, `out` does not fit or `dtype` is not one of these.
    """
    out = check_group_output(weights, dtype, out)
    totals = [weight.shape[0] * weight.shape[1] for weight in weights]
    mixed = any(weight.is_nested != weights[0].is_nested for weight in weights)
    if mixed or not 1 < len(weights) <= LARGEST_GROUP:
        for weight, rows in zip(weights, out.split([weight.shape[0] for weight in weights]), strict=True):
            nf4_dequantize(weight, dtype=dtype, out=rows)
        return out
    parts = [(weight.packed, *absmax_arguments(weight), n) for weight, n in zip(weights, totals, strict=True)]
    if len(weights) < LARGEST_GROUP:
        parts.append(NO_WEIGHT)
    config = DEFAULT_CONFIG
    _nf4_dequantize_group_kernel[(sum(ceil_div(n, BLOCK * config.blocks) for n in totals),)](
        *parts[0], *parts[1], *parts[2], nf4_code(out.device), out,
        NESTED=weights[0].is_nested, WHOLE_BLOCKS=all(n % BLOCK == 0 for n in totals),
        BLOCKS=config.blocks, DECODE=config.decode, num_warps=config.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def absmax_arguments(weight: Nf4Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The pointers that `load_absmax` takes, in its order."""
    return weight.absmax, weight.nested_absmax, weight.nested_offset, weight.nested_code
