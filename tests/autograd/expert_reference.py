"""Random routed experts, and the fused Function's map in plain torch: a loop over experts as a model is written."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.autograd.experts import ExpertProjection
from slothcore.kernels import nf4, nf4_eager, nf4_experts_eager
from slothcore.kernels.nf4_experts import Nf4Experts

Projections = Sequence[ExpertProjection]


def projection(
    experts: int,
    out: int,
    inner: int,
    rank: int = 0,
    *,
    dtype: torch.dtype = torch.float64,
    factor_dtype: torch.dtype | None = None,
    device: str = "cpu",
    bits: int = 16,
    scaling: float = 1.0,
    dropout: float = 0.0,
    trainable: bool = False,
) -> ExpertProjection:
    """Random factors with gradients (rank 0: no LoRA term); a dense weight that trains if `trainable`."""

    def normal(*shape: int, summands: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, device=device) / summands**0.5).to(dtype)

    # One expert at a time, so that no float32 copy of all of them is ever made.
    parts = [normal(out, inner, summands=inner, dtype=dtype) for _ in range(experts)]
    weight: Tensor | Nf4Experts
    if bits == 4:
        ops = nf4 if device == "cuda" else nf4_eager
        weight = Nf4Experts.stack([ops.nf4_quantize(part) for part in parts])
    else:
        weight = torch.stack(parts).requires_grad_(trainable)
    factor_dtype = factor_dtype or dtype
    return ExpertProjection(
        weight=weight,
        lora_A=normal(experts, rank, inner, summands=inner, dtype=factor_dtype).requires_grad_() if rank else None,
        lora_B=normal(experts, out, rank, summands=rank, dtype=factor_dtype).requires_grad_() if rank else None,
        scaling=scaling,
        dropout=dropout,
    )


def mlp(
    experts: int, hidden: int, width: int, ranks: tuple[int, int, int] = (0, 0, 0), **options
) -> list[ExpertProjection]:
    """gate, up and down."""
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    return [projection(experts, *shape, rank, **options) for shape, rank in zip(shapes, ranks, strict=True)]


def dense_weight(weight: Tensor | Nf4Experts, dtype: torch.dtype) -> Tensor:
    return weight if isinstance(weight, Tensor) else nf4_experts_eager.nf4_experts_dequantize(weight, dtype=dtype)


def widened_projection(projection: ExpertProjection, dtype: torch.dtype) -> ExpertProjection:
    """The same map in float64 with leaves of its own; an NF4 weight is decoded in `dtype` first."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return replace(
        projection,
        weight=wide(dense_weight(projection.weight, dtype)),
        lora_A=wide(projection.lora_A),
        lora_B=wide(projection.lora_B),
    )


def plain_linear(x: Tensor, projection: ExpertProjection, expert: int) -> Tensor:
    """y = x W^T + scaling * (x A^T) B^T of one expert, each step an autograd op of its own."""
    y = F.linear(x, dense_weight(projection.weight, x.dtype)[expert])
    if projection.lora_A is None or projection.lora_B is None:
        return y
    u = F.linear(x, projection.lora_A[expert].to(x.dtype))
    return y + projection.scaling * F.linear(u, projection.lora_B[expert].to(x.dtype))


def plain_expert_mlp(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, projections: Projections, *, activation: str = "silu"
) -> Tensor:
    """Every expert on the tokens that chose it, its output times the router's weight added to theirs."""
    gate, up, down = projections
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    y = torch.zeros_like(x)
    for expert in range(gate.weight.shape[0]):
        token, choice = torch.where(expert_ids == expert)
        chosen = x[token]
        hidden = act(plain_linear(chosen, gate, expert)) * plain_linear(chosen, up, expert)
        y = y.index_add(0, token, plain_linear(hidden, down, expert) * expert_weights[token, choice, None])
    return y


def leaves(tensors: Sequence[Tensor], projections: Projections) -> list[Tensor]:
    """Those of `tensors`, then every weight and factor, that get a gradient."""
    parameters = [t for p in projections for t in (p.weight, p.lora_A, p.lora_B) if isinstance(t, Tensor)]
    return [t for t in (*tensors, *parameters) if t.requires_grad]
