"""Products of few rows with NF4 weights in plain torch: the eager twin of nf4_few.py, where the equations stand."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.kernels.glu_eager import Activation, glu_forward
from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_eager import nf4_dequantize
from slothcore.kernels.nf4_tensor import Nf4Tensor


class Terms(NamedTuple):
    """What is added to the products with several weights.

    Attributes:
        lora_x: u [M, sum of the ranks] of the dtype of x, as `lora_input` makes it; None without LoRA.
        lora_B: B_i [N_i, r_i] of each weight, or None.
        scalings: c_i of each weight.
        biases: b_i [N_i] of each weight, or None.
    """

    lora_x: Tensor | None
    lora_B: Factors
    scalings: Sequence[float]
    biases: Sequence[Tensor | None]


def lora_input(x: Tensor, lora_A: Factors) -> Tensor:
    """u = x [A_1; A_2; ..]^T, [M, sum of the ranks], each factor rounded to the dtype of x; None counts as rank 0."""
    return torch.cat([x @ A.to(x.dtype).T for A in lora_A if A is not None], dim=1)


def linear(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms) -> Tensor:
    """y_i = x W_i^T + u_i (c_i B_i)^T + b_i, side by side: [M, sum of N_i]."""
    outputs, first = [], 0
    for weight, B, scaling, bias in zip(weights, terms.lora_B, terms.scalings, terms.biases, strict=True):
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide) @ nf4_dequantize(weight, dtype=x.dtype).to(wide).T
        if B is not None and terms.lora_x is not None:
            u = terms.lora_x[:, first : first + B.shape[1]].to(wide)
            y += u @ (B.to(torch.promote_types(B.dtype, wide)) * scaling).to(x.dtype).to(wide).T
            first += B.shape[1]
        outputs.append((y if bias is None else y + bias.to(x.dtype).to(wide)).to(x.dtype))
    return torch.cat(outputs, dim=1)


def gated(x: Tensor, weights: Sequence[Nf4Tensor], terms: Terms, *, activation: Activation) -> Tensor:
    """act(gate) * up [M, I] of the products with gate and up, or with one weight that holds the rows of both."""
    return glu_forward(linear(x, weights, terms), activation=activation)
