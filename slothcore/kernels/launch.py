"""Launch configurations of the kernels that stream rows through memory.

Every choice is a pure function of model dimensions, never of a timing or of the number of tokens: a run is
reproducible, nothing is tuned during training, and one compiled kernel serves every batch.

A row kernel is bound by memory, so the figures aim at bytes in flight: each thread holds 8 to 16 elements of each
operand (one or two 16-byte loads of a 16-bit type), and programs are small enough that several share a multiprocessor.
"""

from functools import cache
from typing import NamedTuple

from torch import Tensor

ELEMENTS_PER_THREAD = 16
WARP_SIZE = 32
MAX_WARPS = 32
MIN_TILE = 2048
# 40 heads of 128 all at once are turned 2 to 4% faster than 16 at a time (H100).
ROTARY_PAIRS = 4096

# Most programs that share a sum over tokens. The same on every GPU, so that the order of the sum depends on the shapes
# alone; four for each multiprocessor of an H100, where the partial sums add 6% to the traffic of 8192 tokens.
REDUCTION_PROGRAMS = 528


class Tile(NamedTuple):
    """What one program holds at a time, and how many warps hold it. `rows` and `columns` are powers of two."""

    rows: int
    columns: int
    warps: int


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def warps_for(elements: int, *, elements_per_thread: int = ELEMENTS_PER_THREAD) -> int:
    """Warps, a power of two, that give each thread about `elements_per_thread` of a tile of `elements`."""
    wanted = next_power_of_2(max(1, elements // (elements_per_thread * WARP_SIZE)))
    return min(MAX_WARPS, wanted)


@cache
def whole_row_tile(width: int) -> Tile:
    """Rows that must be seen whole (norms): one row a program, or several where rows are short."""
    columns = next_power_of_2(width)
    rows = max(1, MIN_TILE // columns)
    return Tile(rows, columns, warps_for(rows * columns))


@cache
def partial_row_tile(width: int) -> Tile:
    """Elementwise work along a row: a piece of one row, with enough pieces that any number of rows fills the GPU."""
    columns = min(next_power_of_2(width), MIN_TILE)
    return Tile(1, columns, warps_for(columns))


@cache
def head_tile(num_heads: int, half_dim: int, pairs: int = MIN_TILE // 2) -> Tile:
    """Rotary work on one token: `rows` heads at a time, `columns` covers half of the head dimension.

    A thread holds both halves, so 8 elements of each are its 16; a program holds `pairs` of them.
    """
    columns = next_power_of_2(half_dim)
    rows = min(next_power_of_2(num_heads), max(1, pairs // columns))
    return Tile(rows, columns, warps_for(rows * columns, elements_per_thread=ELEMENTS_PER_THREAD // 2))


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x` if its last dimension is contiguous, else a copy: kernels take a row stride but no column stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
