"""Adafactor with a learning rate from outside, as transformers runs it (scale_parameter and relative_step off).

Of a matrix it keeps the means over rows and over columns of the squared gradient. At step t, with the gradient G,
G2 = G^2 + 1e-30, and b = 1 - t^(-0.8):

    R = b R + (1 - b) mean(G2, last dimension)         C = b C + (1 - b) mean(G2, the one before it)
    U = G (R / mean(R))^(-1/2) C^(-1/2)                of a vector: V = b V + (1 - b) G2,  U = G V^(-1/2)
    U = U / max(1, rms(U))                             W = (1 - decay * lr) W - lr U

(`torch.optim.Adafactor` multiplies the learning rate by the size of the weight and bounds it by 1 / sqrt(t), so that a
factor B, which begins at zero, would hardly move.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TINY = 1e-30
DECAY_RATE = -0.8


class Adafactor(torch.optim.Optimizer):
    """State of a parameter: `step`, and float32 `exp_avg_sq_row` and `exp_avg_sq_col`, or `exp_avg_sq` of a vector.

    Source: Shazeer & Stern 2018, arXiv:1804.04235.
    """

    def __init__(self, params: Any, *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns: what `closure` returned, or None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    _update(parameter, self.state[parameter], lr=group["lr"], weight_decay=group["weight_decay"])
        return loss


def _update(parameter: Tensor, state: dict[str, Any], *, lr: float, weight_decay: float) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    is_matrix = gradient.dim() >= 2
    if not state:
        shape = gradient.shape
        state["step"] = 0
        if is_matrix:
            state["exp_avg_sq_row"] = gradient.new_zeros(shape[:-1])
            state["exp_avg_sq_col"] = gradient.new_zeros(shape[:-2] + shape[-1:])
        else:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
    state["step"] += 1
    kept = 1.0 - state["step"] ** DECAY_RATE
    squared = (gradient**2).add_(TINY)
    if is_matrix:
        rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        rows.mul_(kept).add_(squared.mean(dim=-1), alpha=1.0 - kept)
        columns.mul_(kept).add_(squared.mean(dim=-2), alpha=1.0 - kept)
        del squared
        row_factor = (rows / rows.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        update = torch.mul(row_factor, columns.unsqueeze(-2).rsqrt()).mul_(gradient)
    else:
        squares = state["exp_avg_sq"]
        squares.mul_(kept).add_(squared, alpha=1.0 - kept)
        update = squares.rsqrt().mul_(gradient)
    size = update.norm(2) / update.numel() ** 0.5
    update.div_(size.clamp_(min=1.0)).mul_(lr)
    values = parameter.float()  # the parameter itself, if it has this dtype
    if weight_decay:
        values.add_(values, alpha=-weight_decay * lr)
    values.sub_(update)
    if values is not parameter:
        parameter.copy_(values)
