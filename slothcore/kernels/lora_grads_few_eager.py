"""Gradients of the LoRA factors in plain torch: the same function as `lora_grads_few`, where the equations stand.

Takes float64 too. Sums of 16-bit products are float32.
"""

from collections.abc import Sequence

from torch import Tensor

from slothcore.kernels.lora_grads_eager import ColumnScale, grads_apart, transposed_product


def factor_grads(
    h: Tensor | None,
    v: Tensor | None,
    dy: Tensor | None,
    u: Tensor | None,
    *,
    out_features: Sequence[int],
    ranks: Sequence[int],
    scalings: Sequence[float],
    rstd: Tensor | None = None,
    scale: ColumnScale | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """dA_i = s * (v_i^T (r * h)) and dB_i = c_i dy_i^T u_i, contiguous; None without LoRA, h or dy."""
    if h is not None and rstd is not None:
        h = (h.to(rstd.dtype) * rstd[:, None]).to(h.dtype)
    dA = None if h is None or v is None else transposed_product(v, h)
    dB = None if dy is None or u is None else transposed_product(dy, u)
    return grads_apart(dA, dB, out_features=out_features, ranks=ranks, scalings=scalings, scale=scale)
