"""Product with an NF4 weight in plain torch: the eager twin of nf4_gemm.py.

y = x W^T + lora_x lora_B^T + bias, with W dequantised to x.dtype first. float64 inputs are multiplied in float64, by
the float32 values of W.
"""

import torch
from torch import Tensor

from slothcore.kernels.nf4_eager import nf4_dequantize
from slothcore.kernels.nf4_tensor import Nf4Tensor, check_linear


def nf4_linear(
    x: Tensor,
    weight: Nf4Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y = x W^T + lora_x lora_B^T + bias with W in NF4.

    Args:
        x: [M, K] float32, bfloat16, float16 or float64.
        weight: NF4 [N, K], K divisible by 64 (as the kernel asks, so that both accept the same).
        lora_x: [M, R] of x.dtype, or None.
        lora_B: [N, R] of x.dtype, or None; both or neither.
        bias: [N] of x.dtype, or None.
        out: [M, N] of x.dtype to write to; rows may be strided.
    Returns: `out`, or a new tensor [M, N] of x.dtype.
    Raises: ValueError if a shape or dtype does not fit, or K is not divisible by 64.
    """
    out = check_linear(x, weight, lora_x, lora_B, bias, out, also=(torch.float64,))
    dense = nf4_dequantize(weight, dtype=x.dtype)
    torch.mm(x, dense.T, out=out)
    if lora_x is not None and lora_B is not None:
        out.addmm_(lora_x, lora_B.T)
    if bias is not None:
        out.add_(bias)
    return out
