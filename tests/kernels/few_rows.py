"""Products of few rows in float64, for the tests of every kernel that makes them."""

import torch
from torch import Tensor

from slothcore.kernels import nf4_eager
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import Nf4Tensor


def exact_linear(x: Tensor, weights: list[Nf4Tensor], terms: Terms) -> Tensor:
    """The answer in float64 for weights and factors as rounded to x.dtype, which is part of the definition."""
    outputs, first = [], 0
    for weight, B, scaling, bias in zip(weights, terms.lora_B, terms.scalings, terms.biases, strict=True):
        y = x.double() @ nf4_eager.nf4_dequantize(weight, dtype=x.dtype).double().T
        if B is not None:
            assert terms.lora_x is not None
            u = terms.lora_x[:, first : first + B.shape[1]].double()
            y, first = y + u @ (B.float() * scaling).to(x.dtype).double().T, first + B.shape[1]
        outputs.append(y if bias is None else y + bias.double())
    return torch.cat(outputs, dim=1)
