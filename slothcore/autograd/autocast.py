"""torch.autocast beside Functions that compute in the dtype of their inputs."""

import torch
from torch import Tensor


def check_autocast(x: Tensor) -> None:
    """Raise ValueError if autocast would compute some products of `x` in another dtype than the Functions do.

    Matrix products inside a Function obey autocast, fused kernels and products into given memory do not. With the
    dtype of `x` itself autocast changes nothing.
    """
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        raise ValueError(
            f"torch.autocast asks for {torch.get_autocast_dtype(x.device.type)} but the model computes in {x.dtype}; "
            "leave autocast out, or load the model with that dtype"
        )
