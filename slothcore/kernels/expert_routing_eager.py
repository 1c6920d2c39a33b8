"""Tokens sorted by the experts that they go to, and back, in plain torch; the twin of `expert_routing.py`.

Shapes, dtypes and the meaning of `order`, `position` and `offsets` stand there; float64 is taken too.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where each of the T * k (token, choice) pairs goes; a pair's number is token * k + choice.

    Attributes:
        order: [T * k] int64, the pair of each row; rows are sorted by expert, and by pair within an expert.
        offsets: [E + 1] int32; expert e has the rows from offsets[e] to offsets[e + 1].
        position: [T * k] int64, the row of each pair: the inverse of `order`.
    """

    order: Tensor
    offsets: Tensor
    position: Tensor


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> Routing:
    """Sort (token, choice) pairs by expert, without waiting for the device.

    Args:
        expert_ids: [T, k] of any integer dtype, each at least 0 and below `num_experts`.
    """
    flat = expert_ids.reshape(-1)
    # Narrow keys are sorted in fewer passes.
    key_dtype = torch.uint8 if num_experts <= 256 else torch.int32
    sorted_ids, order = torch.sort(flat.to(key_dtype), stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets = torch.searchsorted(sorted_ids.int(), experts, out_int32=True)
    position = torch.empty_like(order)
    position.scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Routing(order, offsets, position)


def gather_rows(x: Tensor, order: Tensor) -> Tensor:
    """The row of x [T, H] that each pair of `order` [T * k] reads: x[order // k], [T * k, H]."""
    choices = _choices(order, x.shape[0])
    return x.index_select(0, torch.div(order, choices, rounding_mode="floor"))


def combine_rows(rows: Tensor, position: Tensor, num_tokens: int) -> Tensor:
    """Sum the rows [T * k, H] of each token's pairs, in the order of its choices: [T, H], rounded once."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    pairs = rows.index_select(0, position).view(num_tokens, _choices(position, num_tokens), rows.shape[1])
    return pairs.to(wide).sum(dim=1).to(rows.dtype)


def _choices(pairs: Tensor, num_tokens: int) -> int:
    """k, experts of a token; 1 where there is no token."""
    return pairs.numel() // num_tokens if num_tokens else 1
