"""Eager twin of `attention.py`: each document's scores in full, documents of equal length together.

Runs on any device and in float64. 16-bit inputs are computed in float32, except that the probabilities are rounded
before their product with v, as the fused kernel rounds them.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

# Documents of equal length share a batch up to this many scores (256 MiB of float32).
SCORES_AT_ONCE = 2**26


def rows_of_documents(cu_seqlens: Tensor, num_heads: int) -> Iterator[Tensor]:
    """Row numbers [documents, length] of documents that are equally long; every non-empty document comes once."""
    bounds = cu_seqlens.tolist()
    starts_by_length = defaultdict(list)
    for start, end in pairwise(bounds):
        if end > start:
            starts_by_length[end - start].append(start)
    for length, starts in starts_by_length.items():
        at_once = max(1, SCORES_AT_ONCE // (num_heads * length * length))
        for first in range(0, len(starts), at_once):
            group = torch.tensor(starts[first : first + at_once], device=cu_seqlens.device)
            yield group[:, None] + torch.arange(length, device=cu_seqlens.device)


def heads_first(x: Tensor, rows: Tensor) -> Tensor:
    """[T, heads, D] to [documents, heads, length, D] in the dtype of the arithmetic."""
    documents = x[rows].transpose(1, 2)
    return documents if x.dtype == torch.float64 else documents.float()


def by_key_head(x: Tensor, num_key_heads: int) -> Tensor:
    """[documents, Hq, length, D] to [documents, Hkv, group * length, D]: the queries that read a key head, in a row."""
    return x.reshape(x.shape[0], num_key_heads, -1, x.shape[-1])


def masked_scores(q: Tensor, k: Tensor, *, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """Scores [documents, Hkv, group * length, length]; -inf where the key is hidden.

    Args:
        q: [documents, Hkv, group * length, D], see `by_key_head`.
        k: [documents, Hkv, length, D].
    """
    scores = (q @ k.transpose(-1, -2)).mul_(scale)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    positions = torch.arange(k.shape[2], device=k.device)
    distance = positions[:, None] - positions[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    scores.unflatten(2, (-1, k.shape[2])).masked_fill_(hidden, float("-inf"))
    return scores


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention.attention_forward`; lse is float64 for float64 inputs."""
    tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    out = q.new_empty((tokens, num_heads, head_dim))
    lse = q.new_empty((num_heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows in rows_of_documents(cu_seqlens, num_heads):
        queries = by_key_head(heads_first(q, rows), num_key_heads)
        keys, values = heads_first(k, rows), heads_first(v, rows)
        scores = masked_scores(queries, keys, scale=scale, window=window, softcap=softcap)
        row_lse = scores.logsumexp(-1, keepdim=True)
        p = scores.sub_(row_lse).exp_().to(v.dtype).to(values.dtype)
        by_head = (p @ values).reshape(rows.shape[0], num_heads, rows.shape[1], head_dim)
        out[rows] = by_head.transpose(1, 2).to(out.dtype)
        lse[:, rows] = row_lse.reshape(rows.shape[0], num_heads, rows.shape[1]).transpose(0, 1)
    return out, lse
