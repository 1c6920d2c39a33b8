"""Attention of single tokens, or of a text's last tokens, over keys and values in pages (flash decoding).

Forward   for every query i of row r at position p and the keys j it sees, 0 <= j <= p, and with a window w also
          p - j < w:
          s_ij = scale * q_i . k_j              with a soft cap c: s_ij = c * tanh(scale * q_i . k_j / c)
          out_i = sum_j exp(s_ij - m_i) v_j / l_i,   m_i = max_j s_ij,   l_i = sum_j exp(s_ij - m_i)
Pages     Key j of row r lies in place j % page_size of page block_tables[r, j // page_size % width]: a row may use its
          pages as a ring, as long as they hold the window.
Parts     A text is cut into parts, each taken by a program of its own that leaves its m, l and sum of v; a second
          launch scales and adds them. How a text is cut depends on its length alone (and on the model's key heads), so
          the result does not depend on what else is in the batch. How many programs are launched depends on shapes
          alone, so a captured graph fits any lengths. A text of one part is finished by the first launch.
Tiles     All query heads that share a key head go through a program together: each key is read once. Several queries of
          one text in a row share a tile as well.
Shapes    q, out [Q, Hq, D]; k, v [pages, page_size, Hkv, D]; block_tables [rows, width]; row, position [Q].
          Q = queries, Hq and Hkv = query and key heads, D = head_dim; query head h reads key head h // (Hq / Hkv).
Dtypes    q, k, v, out float32 or 16-bit; softmax and sums float32.
Rounding  exp(s - m) is rounded to v.dtype before the product with v, as in FlashAttention.
Source    Dao et al. 2023, "Flash-Decoding for long-context inference"; pages: Kwon et al. 2023, arXiv:2309.06180.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.attention_blocks import HIDDEN, add_weighted_rows, dot_rows, scale_rows, visible, zero_rows
from slothcore.kernels.attention_tiles import (
    head_columns,
    scalar_tile,
    score_arguments,
    shared_memory_kib,
)
from slothcore.kernels.early import begins_early, signal_early, wait_early
from slothcore.kernels.gpu import device_capability
from slothcore.kernels.launch import ceil_div, next_power_of_2, warps_for
from slothcore.kernels.math import exponential, tanh

# Programs that one text is spread over, if it is long: about as many as a GPU has multiprocessors.
PROGRAMS = 128
# A part has at least so many keys: with fewer, adding up costs more than it brings. Microseconds on an H100 with 64,
# 128 and 256, 32 heads on 8 of 128: 6.9, 7.7, 8.2 for one text of 256 tokens; 8.5, 8.8, 9.9 for one of 1,024; 88, 85,
# 71 for 128 of 256.
KEYS_OF_A_PART = 256
# Parts that the second launch holds at a time.
PARTS_AT_ONCE = 16


class PagedTile(NamedTuple):
    """How the first launch cuts its work: keys of a block, and the launch options that go with it.

    `rows`: queries times heads of a tile, where several queries of one text share it.
    """

    block_k: int
    num_warps: int
    num_stages: int
    rows: int = 64


@triton.jit
def _load_piece(pointers, exists, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """[BLOCK, WIDTH] of the rows at `pointers` [BLOCK], from column FIRST on; zero where no row or column exists."""
    columns = FIRST + tl.arange(0, WIDTH)
    mask = exists[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_scattered(pointers, exists, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    """One head of the rows at `pointers` [BLOCK], in pieces."""
    wide = _load_piece(pointers, exists, HEAD_DIM, 0, WIDE)
    if TAIL == 0:
        return (wide,)
    else:
        return (wide, _load_piece(pointers, exists, HEAD_DIM, WIDE, TAIL))


@triton.jit
def _store_scattered(pointers, pieces, exists, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr):
    """The other way."""
    columns = tl.arange(0, WIDE)
    mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(pointers[:, None] + columns[None, :], pieces[0].to(pointers.dtype.element_ty), mask=mask)
    if TAIL > 0:
        columns = WIDE + tl.arange(0, TAIL)
        mask = exists[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(pointers[:, None] + columns[None, :], pieces[1].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _cut(
    positions_ptr, tile, queries, parts, window,
    TILE_QUERIES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCKS_OF_A_PART: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """How the text before a tile's consecutive queries is cut into blocks of BLOCK_K keys, and parts of several blocks.

    Returns: the first query's position, the last one's, the first block, the end of the blocks, blocks of a part, and
    the number of parts, at least one.
    """
    query = tile * TILE_QUERIES
    position = tl.load(positions_ptr + query).to(tl.int32)
    last = tl.load(positions_ptr + tl.minimum(query + TILE_QUERIES, queries) - 1).to(tl.int32)
    first_block = 0
    if WINDOWED:
        first_block = tl.maximum(position - window + 1, 0) // BLOCK_K
    end = (last + BLOCK_K) // BLOCK_K
    blocks = tl.maximum((end - first_block + parts - 1) // parts, BLOCKS_OF_A_PART)
    used = tl.maximum((end - first_block + blocks - 1) // blocks, 1)
    return position, last, first_block, end, blocks, used


@triton.jit
def _page_of(table_ptr, block, table_width, PAGE_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, WINDOWED: tl.constexpr):
    """The page that a block of a row lies in; that of its first block where there is no block, so `block` is -1."""
    column = tl.maximum(block, 0) * BLOCK_K // PAGE_SIZE
    if WINDOWED:
        column = column % table_width
    return tl.load(table_ptr + column)


@triton.jit(do_not_specialize=["table_width", "tiles", "queries", "parts", "window"])
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, stats_ptr, block_tables_ptr, rows_ptr, positions_ptr,
    stride_q_row, stride_q_head, stride_page, stride_place, stride_head,
    table_width, tiles, queries, parts, score_scale, cap_scale, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr, TAIL: tl.constexpr,
    PAGE_SIZE: tl.constexpr, TILE_QUERIES: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCKS_OF_A_PART: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """This program takes one part of a text for the GROUP heads of TILE_QUERIES queries that read one key head.

    EARLY: it gives no signal, see early.py: programs of the next kernels would take the room of this one's.
    """
    # Of the programs that have nothing to do, most come last.
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    tile = tl.program_id(0) // NUM_KV_HEADS % tiles
    part = tl.program_id(0) // NUM_KV_HEADS // tiles
    position, last, first_block, end, blocks, used = _cut(
        positions_ptr, tile, queries, parts, window, TILE_QUERIES, BLOCK_K, BLOCKS_OF_A_PART, WINDOWED
    )
    if not EARLY:  # noqa: SIM102
        if part >= used:
            return
    table_ptr = block_tables_ptr + tl.load(rows_ptr + tile * TILE_QUERIES).to(tl.int64) * table_width
    first_block += part * blocks
    end = tl.minimum(first_block + blocks, end)
    # A block ahead: else the loads of a block, which are to overlap with the work on those before, wait for its page.
    page = _page_of(table_ptr, tl.minimum(first_block, end - 1), table_width, PAGE_SIZE, BLOCK_K, WINDOWED)
    if EARLY:
        wait_early(EARLY)
        if part >= used:
            return

    BLOCK_Q: tl.constexpr = TILE_QUERIES * BLOCK_GROUP
    member = tl.arange(0, BLOCK_Q) % BLOCK_GROUP
    turn = tl.arange(0, BLOCK_Q) // BLOCK_GROUP
    query = (tile * TILE_QUERIES + turn).to(tl.int64)
    head = kv_head * GROUP + member
    exists = (member < GROUP) & (query < queries)
    q = _load_scattered(q_ptr + query * stride_q_row + head * stride_q_head, exists, HEAD_DIM, WIDE, TAIL)
    acc = zero_rows(BLOCK_Q, WIDE, TAIL)
    row_sum = tl.zeros([BLOCK_Q], dtype=tl.float32)
    row_max = tl.full([BLOCK_Q], HIDDEN, dtype=tl.float32)
    k_ptr += kv_head.to(tl.int64) * stride_head
    v_ptr += kv_head.to(tl.int64) * stride_head

    for block in tl.range(first_block, end):
        keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
        # What stands behind the last token belongs to nobody; even times zero, its infinities and NaNs would show.
        key_exists = keys <= last
        place = page.to(tl.int64) * stride_page + (keys % PAGE_SIZE) * stride_place
        page = _page_of(table_ptr, tl.minimum(block + 1, end - 1), table_width, PAGE_SIZE, BLOCK_K, WINDOWED)
        k = _load_scattered(k_ptr + place, key_exists, HEAD_DIM, WIDE, TAIL)
        scores = dot_rows(q, k)
        if CAPPED:
            scores = tanh(scores * cap_scale)
        # Scaled before it is masked, see attention.py.
        shown = visible((position + turn)[:, None], keys[None, :], window, WINDOWED)
        scores = tl.where(shown, scores * score_scale, HIDDEN)
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        p = exponential(scores - new_max[:, None], q[0].dtype == tl.float32)
        shrink = exponential(row_max - new_max, q[0].dtype == tl.float32)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        acc = scale_rows(acc, shrink[:, None])
        v = _load_scattered(v_ptr + place, key_exists, HEAD_DIM, WIDE, TAIL)
        acc = add_weighted_rows(acc, p.to(v[0].dtype), v)
        row_max = new_max

    out_row = query * (NUM_KV_HEADS * GROUP) + head
    if used == 1:
        # An idle row has seen nothing.
        acc = scale_rows(acc, 1.0 / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None])
        _store_scattered(out_ptr + out_row * HEAD_DIM, acc, exists, HEAD_DIM, WIDE, TAIL)
    else:
        place = out_row * parts + part
        _store_scattered(sums_ptr + place * HEAD_DIM, acc, exists, HEAD_DIM, WIDE, TAIL)
        tl.store(stats_ptr + 2 * place, row_max, mask=exists)
        tl.store(stats_ptr + 2 * place + 1, row_sum, mask=exists)


@triton.jit(do_not_specialize=["queries", "parts", "window"])
def paged_attention_join_kernel(
    out_ptr, sums_ptr, stats_ptr, positions_ptr,
    queries, parts, window,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, TILE_QUERIES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCKS_OF_A_PART: tl.constexpr, MOST_PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    WINDOWED: tl.constexpr, NATURAL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """This program joins the parts of one query and head, if there are several."""
    signal_early(EARLY)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(0) // NUM_HEADS // TILE_QUERIES
    _, _, _, _, _, used = _cut(
        positions_ptr, tile, queries, parts, window, TILE_QUERIES, BLOCK_K, BLOCKS_OF_A_PART, WINDOWED
    )
    # Also where there is nothing to do: whoever waits for this kernel relies on it.
    wait_early(EARLY)
    if used == 1:
        return
    part = tl.arange(0, MOST_PARTS)
    stats = stats_ptr + 2 * (row * parts + part)
    maxima = tl.load(stats, mask=part < used, other=HIDDEN)
    top = tl.max(maxima, axis=0)
    total = tl.sum(tl.load(stats + 1, mask=part < used, other=0.0) * exponential(maxima - top, NATURAL), axis=0)
    columns = tl.arange(0, COLUMNS)
    out = tl.zeros([COLUMNS], dtype=tl.float32)
    for first_part in range(0, used, AT_ONCE):
        turn = first_part + tl.arange(0, AT_ONCE)
        turn_maxima = tl.load(stats_ptr + 2 * (row * parts + turn), mask=turn < used, other=HIDDEN)
        sums = tl.load(
            sums_ptr + (row * parts + turn)[:, None] * HEAD_DIM + columns[None, :],
            mask=(turn < used)[:, None] & (columns < HEAD_DIM)[None, :],
            other=0.0,
        )
        out += tl.sum(sums * exponential(turn_maxima - top, NATURAL)[:, None], axis=0)
    tl.store(out_ptr + row * HEAD_DIM + columns, (out / total).to(out_ptr.dtype.element_ty), mask=columns < HEAD_DIM)


@cache
def most_parts(num_kv_heads: int) -> int:
    """Into how many parts a long text is cut; a function of the model alone, as the order of a sum has to be."""
    return next_power_of_2(ceil_div(PROGRAMS, num_kv_heads))


@cache
def paged_tile(head_dim: int, dtype: torch.dtype, capability: tuple[int, int] | None) -> PagedTile:
    """Tile of the first launch on a device of that capability (None: Triton's interpreter)."""
    if scalar_tile(head_dim, dtype, capability):
        # Multiplied without tensor cores, so that whole rows lie in registers.
        return PagedTile(16, 4, 1, 16) if capability is None else PagedTile(32 if head_dim <= 128 else 16, 8, 2, 16)
    assert capability is not None
    # 16 KiB of keys and as much of values are in flight two times over, or once where memory is short.
    return PagedTile(64 if head_dim <= 128 else 32, 4, 3 if shared_memory_kib(capability) >= 163 else 2)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    rows: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    one_row: bool = False,
) -> Tensor:
    """Attention of queries over the rows of a paged cache, each up to its own position.

    Args:
        query: [Q, Hq, D], any strides with the last dimension contiguous; D at most 256.
        keys, values: [pages, page_size, Hkv, D], strides alike, the last one 1; Hkv divides Hq; page_size at least 16
            and a power of two.
        block_tables: [rows, width] integers, contiguous: the pages of each row.
        rows, positions: [Q] integers: query i sees the keys 0 .. positions[i] of its row; at position -1 it sees none,
            and the result is zero.
        scale: positive factor of the scores.
        window: a query sees this many keys, itself included; None for all.
        softcap: positive bound on the magnitude of the scores; None for no bound.
        one_row: the queries are consecutive tokens of one row.
    Returns: [Q, Hq, D] contiguous in query.dtype.
    """
    tile = paged_tile(query.shape[2], query.dtype, device_capability(query.device))
    return _launch(
        tile, query, keys, values, block_tables, rows, positions, scale, window, softcap, one_row,
        KEYS_OF_A_PART, most_parts(keys.shape[2]),
    )  # fmt: skip


def _launch(
    tile: PagedTile, query: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, rows: Tensor,
    positions: Tensor, scale: float, window: int | None, softcap: float | None, one_row: bool, keys_of_a_part: int,
    parts: int,
) -> Tensor:  # fmt: skip
    """`keys_of_a_part`: the fewest; `parts`: the most, as far as the rows' pages can fill so many."""
    queries, num_heads, head_dim = query.shape
    _, page_size, num_kv_heads, _ = keys.shape
    assert keys.shape == values.shape
    assert keys.stride() == values.stride(), "keys and values must be laid out alike"
    assert num_heads % num_kv_heads == 0
    assert query.stride(2) == keys.stride(3) == 1
    assert block_tables.is_contiguous()
    block_k = min(tile.block_k, page_size)
    assert page_size % block_k == 0, f"a page must consist of blocks of {block_k} keys, got {page_size} tokens"
    out = torch.empty((queries, num_heads, head_dim), dtype=query.dtype, device=query.device)
    if queries == 0:
        return out
    group = num_heads // num_kv_heads
    tile_queries, block_group = 1, max(16, next_power_of_2(group))
    if one_row:
        block_group = next_power_of_2(group)
        tile_queries = max(1, tile.rows // block_group)
        # Many queries fill the GPU themselves.
        parts = min(parts, ceil_div(PROGRAMS, ceil_div(queries, tile_queries) * num_kv_heads))
    tiles = ceil_div(queries, tile_queries)
    blocks_of_a_part = ceil_div(keys_of_a_part, block_k)
    most = next_power_of_2(parts)
    capacity = block_tables.shape[1] * page_size
    # One more than a ring's blocks: a window may begin within one.
    parts = min(parts, ceil_div(ceil_div(capacity, block_k) + (window is not None), blocks_of_a_part))
    sums = torch.empty(
        (queries * num_heads, parts, head_dim) if parts > 1 else 1, dtype=torch.float32, device=out.device
    )
    stats = torch.empty((queries * num_heads, parts, 2) if parts > 1 else 1, dtype=torch.float32, device=out.device)
    wide, tail = head_columns(head_dim)
    if wide > 128 and query.dtype == torch.float32:
        # A score is the sum of two chains of products, half as long.
        wide, tail = 128, 128
    early = begins_early(query)
    # No longest text: what a window hides depends on positions that only the device knows.
    scores = score_arguments(query.dtype, 2**62, scale, window, softcap)
    cut = {
        "window": scores["window"],
        "queries": queries,
        "parts": parts,
        "TILE_QUERIES": tile_queries,
        "BLOCK_K": block_k,
        "BLOCKS_OF_A_PART": blocks_of_a_part,
        "WINDOWED": scores["WINDOWED"],
    }
    paged_attention_kernel[(tiles * num_kv_heads * parts,)](
        query, keys, values, out, sums, stats, block_tables, rows, positions,
        query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
        table_width=block_tables.shape[1], tiles=tiles,
        score_scale=scores["score_scale"], cap_scale=scores["cap_scale"],
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, WIDE=wide, TAIL=tail, PAGE_SIZE=page_size,
        BLOCK_GROUP=block_group, CAPPED=scores["CAPPED"], EARLY=early, num_warps=tile.num_warps,
        num_stages=tile.num_stages, launch_pdl=early, **cut,
    )  # fmt: skip
    if parts > 1:
        columns, at_once = next_power_of_2(head_dim), min(most, PARTS_AT_ONCE)
        paged_attention_join_kernel[(queries * num_heads,)](
            out, sums, stats, positions,
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, COLUMNS=columns, MOST_PARTS=most, AT_ONCE=at_once,
            NATURAL=query.dtype == torch.float32, EARLY=early, num_warps=warps_for(at_once * columns),
            launch_pdl=early, **cut,
        )  # fmt: skip
    return out
