"""NF4 quantisation and dequantisation in plain torch: the eager twin of nf4.py.

The layout and the equations are in nf4_tensor.py. The bits are those of bitsandbytes on the CPU, which differ from its
CUDA kernels (and so from nf4.py) in a few places:
    thresholds     here the float32 midpoints of adjacent codes; four of CUDA's fifteen are off by one last-place unit
    reciprocal     here rounded to nearest; on CUDA the hardware's approximation, off by one unit now and then
    zero blocks    here code 7, whose value is zero; on CUDA code 0, because 0 * (1 / 0) is NaN
    partial block  here divided by its absmax, which is at least 1e-38; on CUDA treated like any other
    8-bit absmax   here found in a table of 65536 cells; on CUDA by binary search
    offset         the mean of the absmax in float32, whose last bit depends on the order of summation
    subnormals     bitsandbytes flushes products below 2^-126 to zero on some devices; here they are kept
What was quantised on one device dequantises to the same bits on every device. (bitsandbytes 0.50.2 on a CPU with
AVX-512 misplaces absmax where K is divisible by 32 but not by 64; its other paths, and this one, do not.)
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from slothcore.kernels.nf4_tensor import (
    BLOCK,
    NESTED_BLOCK,
    Nf4Tensor,
    check_dequantize_output,
    check_group_output,
    check_quantizable,
    nested_code,
    nf4_code,
)

CHUNK_BLOCKS = 4096
"""Blocks handled at a time, so that the float32 intermediates (1 MiB each) stay in the cache."""
TINY_ABSMAX = 1e-38
"""bitsandbytes' lower bound on an absmax before it divides by it."""
NESTED_CELLS = 65536


def nf4_quantize(weight: Tensor, *, double_quant: bool = True) -> Nf4Tensor:
    """Quantise a weight to NF4, bit for bit as bitsandbytes does on the CPU.

    Args:
        weight: [N, K] float32, bfloat16 or float16; need not be contiguous.
        double_quant: store absmax in 8 bits too.
    Returns: the NF4 weight, on the device of `weight`.
    Raises: ValueError if `weight` is not a non-empty matrix of one of these dtypes.
    Source: Dettmers et al. 2023, arXiv:2305.14314.
    """
    check_quantizable(weight)
    values = weight.detach().reshape(-1)
    total = values.numel()
    full_blocks = total // BLOCK
    packed = torch.empty((total + 1) // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-total // BLOCK), dtype=torch.float32, device=weight.device)

    for first in range(0, full_blocks, CHUNK_BLOCKS):
        last = min(first + CHUNK_BLOCKS, full_blocks)
        blocks = values[first * BLOCK : last * BLOCK].float().view(-1, BLOCK)
        largest = torch.amax(blocks.abs(), dim=1, out=absmax[first:last])
        scaled = blocks * (1.0 / largest.clamp(min=TINY_ABSMAX))[:, None]
        packed[first * BLOCK // 2 : last * BLOCK // 2] = _pack(_nearest_codes(scaled.view(-1)))

    if full_blocks * BLOCK < total:
        partial = values[full_blocks * BLOCK :].float()
        absmax[-1] = partial.abs().max().clamp(min=TINY_ABSMAX)
        # An odd count leaves half a byte, filled with the code of zero.
        scaled = torch.nn.functional.pad(partial / absmax[-1], (0, partial.numel() % 2))
        packed[full_blocks * BLOCK // 2 :] = _pack(_nearest_codes(scaled))

    shape = (weight.shape[0], weight.shape[1])
    if not double_quant:
        return Nf4Tensor(packed, absmax, None, None, None, shape)
    offset = absmax.mean()
    codes, nested_absmax, code_map = quantize_absmax(absmax - offset)
    return Nf4Tensor(packed, codes, nested_absmax, offset, code_map, shape)


def nf4_dequantize(weight: Nf4Tensor, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand an NF4 weight, bit for bit as bitsandbytes does.

    Args:
        weight: the NF4 weight [N, K].
        dtype: float32, bfloat16 or float16: each value is the float32 product rounded to it; float64 holds the product.
        out: where to write, [N, K] contiguous of `dtype` (a slice of rows of a larger buffer, say).
    Returns: `out`, or a new tensor [N, K].
    Raises: ValueError if `out` does not fit or `dtype` is not one of these.
    """
    out = check_dequantize_output(weight, dtype, out, also=(torch.float64,))
    flat = out.view(-1)
    absmax = dequantize_absmax(weight)
    pairs = _byte_values(weight.device)
    for first in range(0, absmax.numel(), CHUNK_BLOCKS):
        begin, end = first * BLOCK, min((first + CHUNK_BLOCKS) * BLOCK, flat.numel())
        bytes_here = weight.packed[begin // 2 : (end + 1) // 2]
        values = torch.index_select(pairs, 0, bytes_here.int()).view(torch.float32)
        rows = values.numel() // BLOCK
        scales = absmax[first : first + CHUNK_BLOCKS]
        values[: rows * BLOCK].view(rows, BLOCK).mul_(scales[:rows, None])
        # Whatever is left belongs to the partial last block; for full chunks this is empty.
        values[rows * BLOCK :].mul_(scales[-1])
        flat[begin:end] = values[: end - begin]
    return out


def nf4_dequantize_group(weights: Sequence[Nf4Tensor], *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand weights of equal width one below the other.

    Args:
        weights: at least one, [N_i, K].
        dtype: float32, bfloat16 or float16; float64 holds the product.
        out: where to write, [sum of N_i, K] contiguous of `dtype`.
    Returns: `out`, or a new tensor [sum of N_i, K].
    Raises: ValueError if the widths differ, `out` does not fit or `dtype` is not one of these.
    """
    out = check_group_output(weights, dtype, out, also=(torch.float64,))
    for weight, rows in zip(weights, out.split([weight.shape[0] for weight in weights]), strict=True):
        nf4_dequantize(weight, dtype=dtype, out=rows)
    return out


def dequantize_absmax(weight: Nf4Tensor) -> Tensor:
    """The float32 absmax of every block, [blocks]: the stored one, or the 8-bit one expanded in two roundings."""
    if weight.nested_absmax is None or weight.nested_offset is None or weight.nested_code is None:
        return weight.absmax
    scales = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return (weight.nested_code[weight.absmax.int()] * scales).add_(weight.nested_offset)


def _nearest_codes(scaled: Tensor) -> Tensor:
    """Index of the code nearest to each value in [-1, 1], as uint8; a tie goes to the lower code.

    The index is the number of midpoints below the value. Fifteen comparisons of whole vectors are 3.5 times faster than
    torch.bucketize, which searches for each element on its own.
    """
    codes = torch.zeros(scaled.numel(), dtype=torch.uint8, device=scaled.device)
    for midpoint in _nf4_midpoints():
        codes += (scaled > midpoint).view(torch.uint8)
    return codes


@lru_cache(maxsize=1)
def _nf4_midpoints() -> tuple[float, ...]:
    code = nf4_code(torch.device("cpu"))
    return tuple(((code[:-1] + code[1:]) / 2).tolist())


def _pack(codes: Tensor) -> Tensor:
    return (codes[::2] << 4) | codes[1::2]


@lru_cache(maxsize=4)
def _byte_values(device: torch.device) -> Tensor:
    """The two float32 values of every byte, high nibble first, [256].

    A pair is held as one float64 bit pattern, because selecting one 8-byte element is faster than a row of two.
    """
    code = nf4_code(device)
    return torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.float64).view(-1)


def quantize_absmax(centred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes of the absmax less its mean, [B] float32.

    Returns: codes [B] uint8; nested_absmax [ceil(B / 256)] float32; nested_code [256] float32.

    The scaled value x in [-1, 1] falls into cell floor((x + 1) / 2 * 65535 + 1/2) of a table of 65536 codes. Codes
    near zero lie closer together than the cells, so this is not always the nearest code; it is the one that
    bitsandbytes picks.
    """
    blocks = centred.numel()
    padded = torch.nn.functional.pad(centred, (0, -blocks % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / nested_absmax)[:, None]).clamp_(-1, 1)
    # The C++ code compiles to a fused multiply-add; the product is exact in float64, which gives the same rounding.
    cells = (((scaled + 1.0) * 0.5).double() * (NESTED_CELLS - 1) + 0.5).float()
    # A block of zeros has no scale: 0 * (1 / 0) is NaN, and its codes are zero.
    cells = torch.where(nested_absmax[:, None] == 0, 0, cells).to(torch.int32)
    codes = torch.where(nested_absmax[:, None] == 0, 0, _nested_cells(centred.device)[cells])
    return codes.view(-1)[:blocks], nested_absmax, nested_code(centred.device)


@lru_cache(maxsize=4)
def _nested_cells(device: torch.device) -> Tensor:
    """The 8-bit code of each cell, [65536] uint8: the number of midpoints of the map below the cell's value."""
    code = nested_code()
    midpoints = (code[:-1] + code[1:]) * 0.5
    values = torch.arange(NESTED_CELLS, dtype=torch.float32, device="cpu") * 2.0 / (NESTED_CELLS - 1) - 1.0
    return torch.bucketize(values, midpoints, out_int32=True).to(torch.uint8).to(device)
