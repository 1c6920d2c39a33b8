"""Row norms of W + f B A in plain torch; the twin of `dora_norms.py`, where the equations stand.

Takes float64 too; 16-bit tensors are summed in float32. W + f B A exists in slices of a few rows.
"""

import torch
from torch import Tensor

from slothcore.kernels.nf4_eager import nf4_dequantize
from slothcore.kernels.nf4_tensor import Nf4Tensor

SMALLEST_NORM = 2.0**-126
"""The smallest normal number of float32: what a row of zeros is divided by."""
SLICE = 2**22
"""Elements of W + f B A that exist at once."""


def row_norms(
    weight: Tensor | Nf4Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    factor: float = 1.0,
    magnitude: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norms of the rows of W + factor * B A, and what DoRA multiplies them with.

    Args:
        weight: [N, K] dense, or NF4.
        lora_A: [R, K].
        lora_B: [N, R].
        factor: of B A.
        magnitude: m [N], or None.
        out: where n and c go, [N] float32 (or float64) each.
    Returns: n [N] in float32, or float64 if a factor is; c [N], or None without m.
    """
    wide = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    dense = nf4_dequantize(weight, dtype=wide) if isinstance(weight, Nf4Tensor) else weight
    A, B = lora_A.to(wide), lora_B.to(wide)
    norm = torch.empty(len(dense), dtype=wide, device=dense.device) if out is None else out[0]
    step = max(1, SLICE // dense.shape[1])
    for first in range(0, len(dense), step):
        rows = slice(first, first + step)
        total = torch.addmm(dense[rows].to(wide), B[rows], A, alpha=factor)
        norm[rows] = total.square_().sum(1).sqrt_().clamp_(min=SMALLEST_NORM)
    if magnitude is None:
        return norm, None
    scale = magnitude.to(wide) / norm
    return norm, scale if out is None else out[1].copy_(scale)
