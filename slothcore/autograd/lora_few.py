"""Frozen projections of a few rows of which nothing needs a gradient: decoding text, in the fewest launches.

The results are those of `lora.py`, whose functions ask `takes` first; here the factors are read where they lie, in
whatever dtype they have, so that nothing is joined or kept between two tokens: one launch makes u = x A^T for a group,
if the norm that made x has not made it as well, one the products with their LoRA terms and, of gate and up, the
activation.
"""

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor

from slothcore.autograd.lora_group import Projection
from slothcore.autograd.lora_projection import NF4_OVER_COPY_ROWS
from slothcore.autograd.rms_norm import LoraInput, Normed, NormRule
from slothcore.kernels import nf4_few, nf4_few_eager, rms_norm_few, rms_norm_few_eager
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


def normed(
    x: Tensor, residual: Tensor | None, weight: Tensor, rule: NormRule, projections: Sequence[Projection]
) -> Normed | None:
    """The norm of x [T, H], or of x + residual, and beside it u for the projections that will read it, in one launch.

    Returns: None where norm and u are better two launches, or `takes` would not have what the norm gives.
    """
    lora_A = tuple([p.lora_A for p in projections])
    if not (rms_norm_few.takes(x, lora_A) and takes(x, projections)):
        return None
    ops = rms_norm_few if x.is_cuda else rms_norm_few_eager
    y, rstd, h, u = ops.rms_norm_input(x, weight, lora_A, **rule._asdict(), residual=residual)
    return Normed(y, h, rstd, weight, rule, LoraInput(u, lora_A))


def fused(x: Tensor, projections: Sequence[Projection], known: LoraInput | None = None) -> Tensor:
    """The outputs of all projections side by side, [T, sum of out_features], from x [T, in].

    known: u, if it was made beside x.
    """
    ops = nf4_few if x.is_cuda else nf4_few_eager
    return ops.linear(x, _weights(projections), _terms(x, projections, known))


def gated(
    x: Tensor, projections: Sequence[Projection], known: LoraInput | None = None, *, activation: Activation
) -> Tensor:
    """act(gate(x)) * up(x) [T, I]; the projections are gate and up, or one that has the outputs of both."""
    ops = nf4_few if x.is_cuda else nf4_few_eager
    return ops.gated(x, _weights(projections), _terms(x, projections, known), activation=activation)


def _weights(projections: Sequence[Projection]) -> list[Nf4Tensor]:
    return [p.weight for p in projections if isinstance(p.weight, Nf4Tensor)]


def _terms(x: Tensor, projections: Sequence[Projection], known: LoraInput | None) -> Terms:
    return Terms(
        lora_x=_lora_input(x, [p.lora_A for p in projections], known),
        lora_B=[p.lora_B for p in projections],
        scalings=[p.scaling for p in projections],
        biases=[p.bias for p in projections],
    )


def _lora_input(x: Tensor, lora_A: Sequence[Tensor | None], known: LoraInput | None) -> Tensor | None:
    if all(A is None for A in lora_A):
        return None
    if known is not None and len(known.lora_A) == len(lora_A) and all(map(is_, known.lora_A, lora_A)):
        return known.u
    ops = nf4_few if x.is_cuda else nf4_few_eager
    return ops.lora_input(x, lora_A)
