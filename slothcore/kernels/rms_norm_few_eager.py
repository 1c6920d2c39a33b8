"""RMSNorm and the inputs of the LoRA terms behind it in plain torch: the eager twin of rms_norm_few.py."""

from torch import Tensor

from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_few_eager import lora_input
from slothcore.kernels.rms_norm_eager import rms_norm_forward


def rms_norm_input(
    x: Tensor,
    weight: Tensor,
    lora_A: Factors,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm of `x` [T, H], or of `x + residual`: y [T, H], rstd [T], h [T, H]; and u = y [A_1; A_2; ..]^T."""
    rule = {"eps": eps, "weight_offset": weight_offset, "cast_before_weight": cast_before_weight}
    y, rstd, h = rms_norm_forward(x, weight, **rule, residual=residual)
    return y, rstd, h, lora_input(y, lora_A)
