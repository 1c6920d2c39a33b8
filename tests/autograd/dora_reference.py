"""Random DoRA projections, and the fused Functions' maps in plain torch as PEFT writes them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.autograd.lora import Projection, lora_fused, lora_mlp
from slothcore.autograd.lora_group import Group, dropout_masks
from tests.autograd.lora_reference import dense_weight, projection, widened_projection


def dora_projection(out: int, inner: int, rank: int, *, known: bool = False, **options: Any) -> Projection:
    """A projection of `lora_reference` with magnitudes that are not the norms.

    Args:
        known: take random norms for known, so that finite differences see constants in them.
    """
    p = projection(out, inner, rank, **options)
    wide = torch.promote_types(p.lora_A.dtype, torch.float32)
    draws = 0.5 + torch.rand(2, out, dtype=wide, device=p.lora_A.device)
    return replace(p, magnitude=draws[0].clone().requires_grad_(), norms=draws[1] if known else None)


def widened(p: Projection, dtype: torch.dtype) -> Projection:
    """`widened_projection` with the magnitude."""
    wide = widened_projection(p, dtype)
    return wide if p.magnitude is None else replace(wide, magnitude=p.magnitude.detach().double().requires_grad_())


def peft_linear(x: Tensor, p: Projection, mask: Tensor | None = None) -> Tensor:
    """PEFT's DoraLinearVariant over its Linear, each step an autograd op of its own; mask is of 0 and 1."""
    weight = dense_weight(p.weight, x.dtype)
    bias = None if p.bias is None else p.bias.to(x.dtype)
    result = F.linear(x, weight, bias)
    if p.lora_A is None or p.lora_B is None:
        return result
    A, B = p.lora_A.to(x.dtype), p.lora_B.to(x.dtype)
    dropped = x if mask is None else x * mask / (1 - p.dropout)
    lora = p.scaling * F.linear(F.linear(dropped, A), B)
    if p.magnitude is None:
        return result + lora
    wide = torch.promote_types(x.dtype, torch.float32)
    total = dense_weight(p.weight, wide).to(wide) + p.scaling * B.detach().to(wide) @ A.detach().to(wide)
    scale = (p.magnitude / torch.linalg.norm(total, dim=1)).to(x.dtype)
    return result + (scale - 1) * F.linear(dropped, weight) + scale * lora


def peft_fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """With the masks that `lora_fused` draws from the same state of torch's generator."""
    group = Group.of(projections)
    masks = [None] * len(projections) if group.seed is None else list(dropout_masks(group, x))
    return torch.cat([peft_linear(x, p, mask) for p, mask in zip(projections, masks, strict=True)], dim=-1)


def peft_mlp(x: Tensor, gate_up: Sequence[Projection], down: Projection, *, activation: str) -> Tensor:
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    group, last = Group.of(gate_up), Group.of((down,))
    masks = [None] * len(gate_up) if group.seed is None else list(dropout_masks(group, x))
    gate, up = torch.cat([peft_linear(x, p, mask) for p, mask in zip(gate_up, masks, strict=True)], -1).chunk(2, -1)
    h = act(gate) * up
    return peft_linear(h, down, None if last.seed is None else next(dropout_masks(last, h)))


def leaves(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """x and every factor, bias and magnitude that gets a gradient."""
    tensors = [x, *(t for p in projections for t in (p.lora_A, p.lora_B, p.bias, p.magnitude))]
    return [t for t in tensors if t is not None and t.requires_grad]


def fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    return lora_fused(x, projections)


def mlp(x: Tensor, projections: Sequence[Projection], activation: str = "silu", **choices: Any) -> Tensor:
    return lora_mlp(x, projections[:-1], projections[-1], activation=activation, **{"inplace": False, **choices})
