"""Random LoRA projections, and the fused Functions' maps in plain torch as PEFT writes them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.autograd.lora import Projection, lora_fused, lora_mlp
from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor


def projection(
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
    bias: str | None = None,
) -> Projection:
    """Random factors with gradients (rank 0: no LoRA term); bias is None, "frozen" or "trainable"."""

    def normal(*shape: int, summands: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(*shape, device=device) / summands**0.5).to(dtype)

    weight = normal(out, inner, summands=inner, dtype=dtype)
    if bits == 4:
        weight = (nf4 if device == "cuda" else nf4_eager).nf4_quantize(weight)
    factor_dtype = factor_dtype or dtype
    return Projection(
        weight=weight,
        lora_A=normal(rank, inner, summands=inner, dtype=factor_dtype).requires_grad_() if rank else None,
        lora_B=normal(out, rank, summands=rank, dtype=factor_dtype).requires_grad_() if rank else None,
        scaling=scaling,
        dropout=dropout,
        bias=normal(out, summands=1, dtype=dtype).requires_grad_(bias == "trainable") if bias else None,
    )


def dense_weight(weight: Tensor | Nf4Tensor, dtype: torch.dtype) -> Tensor:
    """NF4 decoded, or the weight itself."""
    if isinstance(weight, Tensor):
        return weight
    ops = nf4 if weight.device.type == "cuda" else nf4_eager
    return ops.nf4_dequantize(weight, dtype=dtype)


def widened_projection(projection: Projection, dtype: torch.dtype) -> Projection:
    """The same map in float64 with leaves of its own; an NF4 weight is decoded in `dtype` first."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)

    return replace(
        projection,
        weight=dense_weight(projection.weight, dtype).double(),
        lora_A=wide(projection.lora_A),
        lora_B=wide(projection.lora_B),
        bias=wide(projection.bias),
    )


def plain_linear(x: Tensor, projection: Projection) -> Tensor:
    """y = x W^T + b + scaling * (x A^T) B^T, each step an autograd op of its own."""
    bias = None if projection.bias is None else projection.bias.to(x.dtype)
    y = F.linear(x, dense_weight(projection.weight, x.dtype), bias)
    if projection.lora_A is None or projection.lora_B is None:
        return y
    u = F.linear(x, projection.lora_A.to(x.dtype))
    return y + projection.scaling * F.linear(u, projection.lora_B.to(x.dtype))


def plain_fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    return torch.cat([plain_linear(x, p) for p in projections], dim=-1)


def plain_mlp(x: Tensor, gate_up: Sequence[Projection], down: Projection, *, activation: str) -> Tensor:
    act = F.silu if activation == "silu" else lambda g: F.gelu(g, approximate="tanh")
    gate, up = plain_fused(x, gate_up).chunk(2, dim=-1)
    return plain_linear(act(gate) * up, down)


def leaves(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    """x and every factor and bias that gets a gradient."""
    tensors = [x, *(t for p in projections for t in (p.lora_A, p.lora_B, p.bias))]
    return [t for t in tensors if t is not None and t.requires_grad]


def fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    return lora_fused(x, projections)


def mlp(x: Tensor, projections: Sequence[Projection], activation: str = "silu") -> Tensor:
    return lora_mlp(x, projections[:-1], projections[-1], activation=activation, inplace=False)
