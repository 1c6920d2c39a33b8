"""How the attention kernels cut their work: a pure function of head_dim, dtype, soft cap, longest document and device.

The tables are the outcome of `benchmarks/ops/sweep_attention.py`; a row serves every head_dim up to its number that no
earlier row serves. Every tile fits the shared memory of every device of its column.

A program loads the rows that it owns once, and walks over the rows of the other side in blocks. Those blocks come by
plain loads, for which every thread reckons addresses, or by the copy engine (TMA), which fetches a block by one
coordinate and leaves the registers to the products. Two descriptors for each launch cost the host some 20 us: nothing
beside a long document, and nothing in a captured graph.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slothcore.kernels.launch import ceil_div, next_power_of_2
from slothcore.kernels.math import LOG2_E


class Tile(NamedTuple):
    """How one kernel cuts its work: queries and keys of a block, and the launch options that go with them.

    `pad` rounds head_dim up to a power of two; else a head such as 96 = 64 + 32 is held in two pieces.
    """

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    pad: bool = False


class Tiles(NamedTuple):
    """The tiles of the kernels: out; dq; dk and dv together, or of dk and of dv where they have a launch each."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    value_gradient: Tile | None = None


# KiB of shared memory for one program -> largest head_dim -> tiles.
TILES = {
    227: {
        64: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        96: Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
        128: Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 64, 4, 3)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(64, 64, 8, 2)),
    },
    163: {
        64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
        256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 64, 8, 1)),
    },
    99: {
        64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        128: Tiles(Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)),
        256: Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
}
# Where a soft cap, whose tanh takes registers and time from the products, wants others: (KiB, head_dim) -> tiles.
SOFTCAP_TILES: dict[tuple[int, int], Tiles] = {
    (227, 256): Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(64, 128, 8, 2)),
}


class CopyEngineFrom(NamedTuple):
    """Length of the longest document from which on each kernel has its blocks fetched by the copy engine."""

    forward: int
    query_gradient: int
    key_gradient: int


# (KiB, head_dim) -> lengths; never where there is no row. TF/s by plain loads and by the copy engine, measured on an
# H100 with 32/8 heads of bfloat16, 8192 tokens in documents of
#             119         512         2048        8192
# forward     64,  61     212, 238    398, 434    483, 529
# dq          53,  48     210, 219    452, 470    596, 627
# dk and dv   105, 126    290, 350    497, 506    558, 563
COPY_ENGINE_FROM = {(227, 128): CopyEngineFrom(forward=512, query_gradient=512, key_gradient=1)}

# Programs that share the keys of a block, over all key heads: with fewer, 8192 tokens leave multiprocessors empty. With
# fewer query heads in each, adding up what they found costs more than it brings (measured at 8/1 and 4/1 heads).
KEY_GRADIENT_PROGRAMS = 2
QUERY_HEADS_IN_A_PROGRAM = 4


def shared_memory_kib(capability: tuple[int, int]) -> int:
    """Shared memory to plan a program for, from the table of compute capabilities in the CUDA C++ guide."""
    if capability < (8, 0):
        return 64
    if capability in ((8, 0), (8, 7)):
        return 163
    # Compute capability 10 has 227 as well, but what fits there on Hopper Triton brings to as much as 258 for it.
    return {9: 227, 10: 163}.get(capability[0], 99)


@cache
def head_columns(head_dim: int, pad: bool = False) -> tuple[int, int]:
    """Widths of the two pieces that hold a head, powers of two that a tensor core takes; 0 if one piece does."""
    whole = max(16, next_power_of_2(head_dim))
    half = whole // 2
    tail = max(16, next_power_of_2(head_dim - half))
    return (whole, 0) if pad or half + tail >= whole else (half, tail)


def scalar_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile | None:
    """Tile of every kernel where Triton multiplies without tensor cores; None where it has them.

    That is exact float32 anywhere, and every dtype before Ampere. Such products hold whole rows in registers, so the
    blocks are small. One case fits no tile: the backward pass for float32, head_dim 256, before Ampere.
    """
    if capability is None:
        # Triton's interpreter: small blocks, so that small tests meet whole, masked and ragged ones.
        return Tile(32, 16, 4, 1)
    before_ampere = capability < (8, 0)
    if dtype != torch.float32 and not before_ampere:
        return None
    widest = 64 if dtype == torch.float32 and before_ampere else 128
    return Tile(32, 32, 8, 1) if head_dim <= widest else Tile(16, 16, 8, 1)


@cache
def attention_tiles(
    head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None, *, capped: bool = False
) -> Tiles:
    """Tiles of the three kernels on a device of that capability (None: Triton's interpreter)."""
    if scalar := scalar_tile(head_dim, dtype, capability):
        return Tiles(scalar, scalar, scalar)
    memory = shared_memory_kib(capability)
    row = min(width for width in TILES[memory] if width >= head_dim)
    tiles = TILES[memory][row]
    return SOFTCAP_TILES.get((memory, row), tiles) if capped else tiles


@cache
def copy_engine_from(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> CopyEngineFrom | None:
    """Where the copy engine is the faster way, on a device of that capability; None: nowhere."""
    if capability is None or scalar_tile(head_dim, dtype, capability):
        return None
    return COPY_ENGINE_FROM.get((shared_memory_kib(capability), head_dim))


def aligned_rows(x: Tensor) -> bool:
    """Whether x [T, heads, D] can be read in units of 16 bytes, its rows in order and apart from each other."""
    width = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    steps = (x.stride(0), x.stride(1), x.shape[2])
    return (
        x.numel() > 0
        and x.stride(2) == 1
        and x.stride(0) >= width
        and all(step * x.element_size() % 16 == 0 for step in steps)
        and x.data_ptr() % 16 == 0
    )


def copied_pair(
    first: Tensor, second: Tensor, rows: int
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """How the copy engine fetches blocks [rows, D] of two [T, heads, D]; two None where it cannot read both.

    To the engine each is a matrix whose rows hold all heads; head h starts in column h * stride(1).
    """
    head_dim = first.shape[2]
    if head_columns(head_dim) != (head_dim, 0) or not (aligned_rows(first) and aligned_rows(second)):
        return None, None

    def describe(x: Tensor) -> TensorDescriptor:
        width = (x.shape[1] - 1) * x.stride(1) + head_dim
        return TensorDescriptor(x, [x.shape[0], width], [x.stride(0), 1], [rows, head_dim])

    return describe(first), describe(second)


@cache
def key_gradient_parts(num_heads: int, num_key_heads: int) -> int:
    """Into how many programs the query heads of one key head are divided; their sums are added afterwards.

    A function of the model alone: the order of a sum must not depend on the batch.
    """
    group = num_heads // num_key_heads
    parts = min(ceil_div(KEY_GRADIENT_PROGRAMS, num_key_heads), max(1, group // QUERY_HEADS_IN_A_PROGRAM))
    return ceil_div(group, ceil_div(group, parts))


def score_arguments(
    dtype: torch.dtype, max_seqlen: int, scale: float, window: int | None, softcap: float | None
) -> dict[str, object]:
    """Kernel arguments that say how scores are scaled, capped and masked; a window that hides nothing is dropped."""
    unit = 1.0 if dtype == torch.float32 else LOG2_E.value
    windowed = window is not None and window < max_seqlen
    capped = softcap is not None
    return {
        "score_scale": unit * (softcap if capped else scale),
        "cap_scale": scale / softcap if capped else 0.0,
        "window": window if windowed else 0,
        "WINDOWED": windowed,
        "CAPPED": capped,
    }


def tile_arguments(tile: Tile, block: int, cu_seqlens: Tensor, max_seqlen: int, q: Tensor) -> dict[str, int | bool]:
    """Kernel arguments and launch options that follow from a tile; `block` is the side of it that a program owns.

    SEARCH says whether to search for a tile's document; see `locate_tile`.
    """
    tokens, _, head_dim = q.shape
    documents = cu_seqlens.numel() - 1
    if_equal, if_searched = documents * ceil_div(max_seqlen, block), tokens // block + documents
    wide, tail = head_columns(head_dim, tile.pad)
    return {
        "documents": documents,
        "tiles": min(if_equal, if_searched),
        "tokens": tokens,
        "SEARCH": if_searched < if_equal,
        "HEAD_DIM": head_dim,
        "WIDE": wide,
        "TAIL": tail,
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
