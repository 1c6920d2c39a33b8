"""Frozen projections of a few rows of which nothing needs a gradient: decoding text, in the fewest launches.

The results are those of `lora.py`, whose functions ask `takes` first; here the factors are read where they lie, in
whatever dtype they have, so that nothing is joined or kept between two tokens: one launch makes u = x A^T for a group,
one the products with their LoRA terms and, of gate and up, the activation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slothcore.autograd.lora_group import Projection
from slothcore.autograd.lora_projection import NF4_OVER_COPY_ROWS
from slothcore.kernels import nf4_few, nf4_few_eager
from slothcore.kernels.glu import Activation
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import Nf4Tensor


def takes(x: Tensor, projections: Sequence[Projection]) -> bool:
    """Whether `fused` and `gated` serve these projections: few rows on a GPU, NF4, and no gradient wanted."""
    if not x.is_cuda or x.shape[0] > nf4_few.MOST_ROWS:
        return False
    if any(p.magnitude is not None or p.dropout > 0 for p in projections):
        return False
    tensors = [x, *(t for p in projections for t in (p.lora_A, p.lora_B, p.bias) if t is not None)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    weights = _weights(projections)
    copies = any(weight.decoded is not None for weight in weights)
    if len(weights) < len(projections) or (copies and x.shape[0] > NF4_OVER_COPY_ROWS):
        return False
    lora_A, lora_B, biases = ([getattr(p, name) for p in projections] for name in ("lora_A", "lora_B", "bias"))
    return nf4_few.takes(x, weights, lora_A, lora_B, biases)


def fused(x: Tensor, projections: Sequence[Projection]) -> Tensor:
    """The outputs of all projections side by side, [T, sum of out_features], from x [T, in]."""
    ops = nf4_few if x.is_cuda else nf4_few_eager
    return ops.linear(x, _weights(projections), _terms(x, projections))


def gated(x: Tensor, projections: Sequence[Projection], *, activation: Activation) -> Tensor:
    """act(gate(x)) * up(x) [T, I]; the projections are gate and up, or one that has the outputs of both."""
    ops = nf4_few if x.is_cuda else nf4_few_eager
    return ops.gated(x, _weights(projections), _terms(x, projections), activation=activation)


def _weights(projections: Sequence[Projection]) -> list[Nf4Tensor]:
    return [p.weight for p in projections if isinstance(p.weight, Nf4Tensor)]


def _terms(x: Tensor, projections: Sequence[Projection]) -> Terms:
    ops = nf4_few if x.is_cuda else nf4_few_eager
    lora_A = [p.lora_A for p in projections]
    return Terms(
        lora_x=None if all(A is None for A in lora_A) else ops.lora_input(x, lora_A),
        lora_B=[p.lora_B for p in projections],
        scalings=[p.scaling for p in projections],
        biases=[p.bias for p in projections],
    )
