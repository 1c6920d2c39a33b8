"""Eager twin of `paged_attention.py`: the visible keys are gathered from their pages, and every score is written out.

Runs on any device and in float64. 16-bit inputs are computed in float32 and rounded once, at the end.
"""

import torch
from torch import Tensor

# Queries share a batch up to this many scores (256 MiB of float32).
SCORES_AT_ONCE = 2**26


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
    """As `paged_attention.paged_attention`."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    last = int(positions.max()) if len(query) else -1
    if last < 0:
        return out
    lowest = int(positions.masked_fill(positions < 0, last).min())
    first = 0 if window is None else max(0, lowest - window + 1)
    seen = torch.arange(first, last + 1, device=query.device)
    per_query = query.shape[1] * len(seen)
    if not one_row:
        per_query = max(per_query, len(seen) * keys.shape[2] * keys.shape[3])
    pieces = zip(*(x.split(max(1, SCORES_AT_ONCE // per_query)) for x in (query, rows, positions, out)), strict=True)
    for part, part_rows, part_positions, part_out in pieces:
        places = _places(block_tables, part_rows[:1] if one_row else part_rows, seen, keys.shape[1])
        mixed = _attend(part, keys[places], values[places], seen, part_positions, scale, window, softcap, one_row)
        part_out.copy_(mixed.masked_fill_((part_positions < 0)[:, None, None], 0.0))
    return out


def _places(block_tables: Tensor, rows: Tensor, positions: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Page [rows, L] and place in it [L] of the tokens at `positions` [L] of each of `rows`."""
    columns = positions // page_size % block_tables.shape[1]
    return block_tables[rows.long()][:, columns].long(), positions % page_size


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    one_row: bool,
) -> Tensor:
    """Attention of query [Q, heads, D] over keys and values [Q, or 1 if `one_row`, L, kv heads, D] at `seen` [L]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (keys.shape[2], -1))
    visible = seen <= positions[:, None]
    if window is not None:
        visible &= seen > positions[:, None] - window
    if one_row:
        scores = torch.einsum("qkgd,lkd->qkgl", grouped, keys[0].to(wide)) * scale
    else:
        # A page may hold anything behind a row's last token, and 0 * NaN is NaN.
        values = torch.where(visible[..., None, None], values, 0.0)
        scores = torch.einsum("qkgd,qlkd->qkgl", grouped, keys.to(wide)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    if one_row:
        mixed = torch.einsum("qkgl,lkd->qkgd", weights, values[0].to(wide))
    else:
        mixed = torch.einsum("qkgl,qlkd->qkgd", weights, values.to(wide))
    return mixed.flatten(1, 2).to(query.dtype)
