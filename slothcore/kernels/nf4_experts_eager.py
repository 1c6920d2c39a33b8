"""Expansion of stacked NF4 experts in plain torch: the eager twin of nf4_experts.py, where the layout stands."""

import torch
from torch import Tensor

from slothcore.kernels.nf4_eager import nf4_dequantize
from slothcore.kernels.nf4_experts import Nf4Experts, check_experts_output


def nf4_experts_dequantize(experts: Nf4Experts, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Expand the NF4 weights of all experts, bit for bit as bitsandbytes expands each alone.

    Args:
        experts: NF4 [E, N, K].
        dtype: float32, bfloat16 or float16; float64 holds the float32 product.
        out: where to write, [E, N, K] contiguous of `dtype`.
    Returns: `out`, or a new tensor [E, N, K].
    Raises: ValueError if `out` does not fit or `dtype` is not one of these.
    """
    out = check_experts_output(experts, dtype, out, also=(torch.float64,))
    for index, dense in enumerate(out):
        nf4_dequantize(experts.expert(index), dtype=dtype, out=dense)
    return out
