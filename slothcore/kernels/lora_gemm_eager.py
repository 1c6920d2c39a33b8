"""The frozen linear map with its LoRA term, in plain torch; the twin of `lora_gemm.py`.

Forward   y  = x W^T + u B^T + b,   u = x A^T as the caller computed it, scaling folded into B
Backward  dx = dy W + v A,          v = dy B
Shapes    x [M, K]; W [N, K]; u, v [M, R]; B [N, R]; b [N]; A [R, K]; y, dy [M, N].
          M = rows (tokens), K = in_features, N = out_features, R = rank.
Dtypes    one floating dtype for everything, float64 included.
Rounding  each matrix product rounds once to the dtype, as in a model built of nn.Linear: y is rounded after
          x W^T + b and again after the LoRA term. Sums inside a product are float32 or wider.
Source    Hu et al. 2021, arXiv:2106.09685.
"""

import torch
from torch import Tensor


def linear_add(
    x: Tensor,
    weight: Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x W^T + lora_x lora_B^T + bias.

    Args:
        x: [M, K], any strides.
        weight: [N, K].
        lora_x: [M, R], or None for no LoRA term.
        lora_B: [N, R] with the scaling folded in; given exactly if `lora_x` is.
        bias: [N] or None.
        out: [M, N] to write into, for example columns of a wider tensor.
    """
    if bias is None:
        result = torch.mm(x, weight.t(), out=out)
    else:
        result = torch.addmm(bias, x, weight.t(), out=out)
    if lora_x is not None and lora_B is not None:
        result.addmm_(lora_x, lora_B.t())
    return result


def linear_input_grad(
    dy: Tensor, weight: Tensor, *, lora_dy: Tensor | None = None, lora_A: Tensor | None = None
) -> Tensor:
    """Return dy W + lora_dy lora_A, the gradient of `linear_add` with respect to its x.

    Args:
        dy: [M, N], any strides.
        weight: [N, K].
        lora_dy: [M, R], or None for no LoRA term.
        lora_A: [R, K]; given exactly if `lora_dy` is.
    """
    dx = torch.mm(dy, weight)
    if lora_dy is not None and lora_A is not None:
        dx.addmm_(lora_dy, lora_A)
    return dx
