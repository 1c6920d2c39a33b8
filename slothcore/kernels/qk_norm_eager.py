"""RMSNorm over each query and key head, then RoPE, in plain torch: the same functions as `qk_norm`.

Put together from the eager norm and the eager rotation, so that every 16-bit rounding of a model that runs them one
after the other is here too. Takes float64.
"""

import torch
from torch import Tensor

from slothcore.kernels import rms_norm_eager, rope_eager


def qk_norm_forward(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalise and rotate the query and key heads of qkv [T, heads, D], copy the rest.

    Returns: a new contiguous [T, heads, D]; rstd [T, num_heads + num_kv_heads].
    """
    out = qkv.clone(memory_format=torch.contiguous_format)
    rstds = []
    for heads, weight in zip(_query_and_key_heads(out, num_heads, num_kv_heads), (q_weight, k_weight), strict=True):
        normed, rstd, _ = rms_norm_eager.rms_norm_forward(
            heads.flatten(0, 1), weight, eps=eps, weight_offset=weight_offset, cast_before_weight=cast_before_weight
        )
        heads.copy_(normed.view(heads.shape))
        rstds.append(rstd.view(heads.shape[:2]))
    rope_eager.rope_rotate_(out, cos, sin, num_heads=num_heads + num_kv_heads)
    return out, torch.cat(rstds, dim=1)


def qk_norm_backward_(
    grad: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    weight_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Overwrite the query and key heads of grad [T, heads, D] by the gradient of `qkv`.

    Returns: `grad`; the gradients of both weights [2, D], or None.
    """
    rope_eager.rope_rotate_(grad, cos, sin, num_heads=num_heads + num_kv_heads, inverse=True)
    dws = []
    for dy, x, weight, part in zip(
        _query_and_key_heads(grad, num_heads, num_kv_heads),
        _query_and_key_heads(qkv, num_heads, num_kv_heads),
        (q_weight, k_weight),
        rstd.split((num_heads, num_kv_heads), dim=1),
        strict=True,
    ):
        dx, dw = rms_norm_eager.rms_norm_backward(
            dy.flatten(0, 1),
            x.flatten(0, 1),
            weight,
            part.flatten(),
            weight_offset=weight_offset,
            cast_before_weight=cast_before_weight,
            weight_grad=weight_grad,
        )
        dy.copy_(dx.view(dy.shape))
        dws.append(dw)
    return grad, torch.stack(dws) if weight_grad else None


def _query_and_key_heads(x: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Views of x [T, heads, D]: its query heads, its key heads."""
    return x[:, :num_heads], x[:, num_heads : num_heads + num_kv_heads]
