"""Cross-entropy over rows of logits in plain torch; the derivation is in `cross_entropy.py`."""

import torch
from torch import Tensor


def cross_entropy_forward_(
    logits: Tensor, targets: Tensor, *, grad_scale: Tensor | float | None, softcap: float | None = None
) -> Tensor:
    """The loss of each row; `logits` is overwritten by its gradient when `grad_scale` is not None.

    Args:
        logits: [N, V], any floating dtype; 16-bit logits are computed in float32. Rows may be strided.
        targets: [N] int64, each in [0, V).
        grad_scale: factor of the gradient, a number or a 0-dim tensor; None leaves `logits` as they are.
        softcap: cap c of s = c tanh(l / c), or None.

    Returns: [N] float32 (float64 for float64 logits).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    capped = wide if softcap is None else softcap * torch.tanh(wide / softcap)
    log_normalizer = torch.logsumexp(capped, dim=-1)
    picked = targets.unsqueeze(1)
    loss = log_normalizer - capped.gather(1, picked).squeeze(1)
    if grad_scale is not None:
        gradient = torch.exp(capped - log_normalizer.unsqueeze(1))
        gradient.scatter_add_(1, picked, torch.full_like(gradient[:, :1], -1.0))
        if softcap is not None:
            gradient *= 1 - (capped / softcap).square()
        logits.copy_(gradient.mul_(grad_scale))
    return loss
