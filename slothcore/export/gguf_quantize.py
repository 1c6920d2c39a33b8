"""Numbers as the kinds of a GGUF file, as bytes; see gguf_types.py for which tensor gets which."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from slothcore.export.gguf_k_quants import Pack, extreme, half_bytes, q4_k, q5_k, q6_k, quotient
from slothcore.export.gguf_types import BLOCKS, Kind, row_bytes

# How many numbers a thread works on at once: few enough for the cache, enough that Python costs little beside them.
NUMBERS_A_THREAD = 2**19
NUMBERS_ON_GPU = 2**24
BEFORE_HALF = 0.5 - 2.0**-25  # the largest float32 below a half
FLOATS: dict[Kind, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def quantize(weight: Tensor, kind: Kind) -> np.ndarray:
    """Round a weight and pack it, on the device where it is.

    Args:
        weight: [..., columns], of any floating dtype.
        kind: one of `BLOCKS`.
    Returns: [..., bytes of a row] uint8, on the host.
    Raises: ValueError if a row is no multiple of the kind's block, or a number is not finite or too large.
    Source: llama.cpp's quantisers without an importance matrix; on a CPU the bytes are theirs.
    """
    size = row_bytes(kind, weight.shape[-1])
    weight = weight.detach()
    if kind in FLOATS:
        return _as_floats(weight, FLOATS[kind]).reshape(*weight.shape[:-1], size)
    numbers, block_bytes = BLOCKS[kind]
    blocks = weight.reshape(-1, numbers)
    packed = torch.empty(len(blocks), block_bytes, dtype=torch.uint8)
    at_once = (NUMBERS_ON_GPU if weight.is_cuda else NUMBERS_A_THREAD) // numbers

    def pack(part: slice) -> None:
        packed[part] = PACKS[kind](blocks[part].float())

    if weight.is_cuda:
        as_memory_allows(pack, len(blocks), at_once, least=NUMBERS_A_THREAD // numbers)
    else:
        _on_all_threads(pack, [slice(start, start + at_once) for start in range(0, len(blocks), at_once)])
    return packed.numpy().reshape(*weight.shape[:-1], size)


def as_memory_allows(work: Callable[[slice], None], count: int, at_once: int, *, least: int) -> None:
    """Do `work` to `count` things, so many at once; half as many from where the GPU's memory is full.

    Raises: torch.OutOfMemoryError if not even `least` fit.
    """
    start = 0
    while start < count:
        try:
            work(slice(start, start + at_once))
            start += at_once
        except torch.OutOfMemoryError:
            if at_once <= least:
                raise
            at_once = max(least, at_once // 2)


def _on_all_threads(work: Callable[[slice], None], items: Sequence[slice]) -> None:
    """Do `work` to each.

    Each thread's operations stay on that thread, even if there is but one: they are many and short, and where all
    threads share each of them, all wait for the slowest, for seconds on a busy machine.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(min(threads, len(items)), "quantize", torch.set_num_threads, (1,)) as pool:
            list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)


def q8_0(blocks: Tensor) -> Tensor:
    """[n, 32] float32 to [n, 34] uint8: d, then numbers in -127..127."""
    largest = blocks.abs().amax(1, keepdim=True)
    d = quotient(largest, torch.full_like(largest, 127))
    x = blocks * _inverse(d)
    # Halves are rounded away from zero. Adding a half itself would lift the number before it to one.
    q = torch.copysign(x.new_full((), BEFORE_HALF), x).add_(x).to(torch.int8)
    return torch.cat((half_bytes(d), q.view(torch.uint8)), 1)


def q5_0(blocks: Tensor) -> Tensor:
    """[n, 32] float32 to [n, 22] uint8: d, the fifth bits, two numbers a byte; x ~ d * (q - 16)."""
    largest = extreme(blocks.t()).unsqueeze(1)
    d = largest / -16
    q = (blocks * _inverse(d)).add_(16.5).clamp_(max=31).to(torch.uint8)
    return torch.cat((half_bytes(d), _fifth_bits(q), _nibbles(q)), 1)


def q5_1(blocks: Tensor) -> Tensor:
    """[n, 32] float32 to [n, 24] uint8: d, m, the fifth bits, two numbers a byte; x ~ d * q + m."""
    m = blocks.amin(1, keepdim=True)
    spread = blocks.amax(1, keepdim=True) - m
    d = quotient(spread, torch.full_like(spread, 31))
    q = (blocks - m).mul_(_inverse(d)).add_(0.5).to(torch.uint8)
    return torch.cat((half_bytes(d), half_bytes(m), _fifth_bits(q), _nibbles(q)), 1)


PACKS: dict[Kind, Pack] = {"Q8_0": q8_0, "Q5_0": q5_0, "Q5_1": q5_1, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}


def _as_floats(weight: Tensor, dtype: torch.dtype) -> np.ndarray:
    rounded = weight.to(dtype)
    if not rounded.isfinite().all():
        raise ValueError(f"a weight is not finite, or too large for {dtype}; check the model, or write BF16")
    return rounded.contiguous().view(torch.uint8).cpu().numpy()


def _inverse(d: Tensor) -> Tensor:
    return quotient(1.0, d).masked_fill_(d == 0, 0)


def _nibbles(q: Tensor) -> Tensor:
    """[n, 32] in [n, 16] bytes: the first half low, the second high."""
    return q[:, :16] & 15 | (q[:, 16:] & 15) << 4


def _fifth_bits(q: Tensor) -> Tensor:
    """Of [n, 32], in [n, 4] bytes: number i is bit i."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=q.device)
    return ((q >> 4).reshape(-1, 4, 8) * weights).sum(2, dtype=torch.uint8)
