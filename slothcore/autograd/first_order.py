"""Backward passes that cannot be differentiated themselves."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import function


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of that name, entered only where a second derivative could be asked for.

    That is under `create_graph=True`, when backward runs with grad mode on. Elsewhere torch's version would switch off
    what is off already: a fifth of the host time of a small Function.
    """
    guarded = function.once_differentiable(backward)

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return wrapper
