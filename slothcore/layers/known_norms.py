"""DoRA's norms computed once for many passes, where factors stay as they are: when a model writes token by token.

Norms are those of W + s B A, so all of W is read for them. A pass over thousands of tokens does not feel it; a pass
over one does, because it reads W but once itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from slothcore.layers.linear import Linear


@contextmanager
def known_norms(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the passes inside share norms; nothing inside may change a weight or a factor.

    Args:
        dtype: in which they compute.
    """
    layers = [m for m in model.modules() if isinstance(m, Linear) and m.lora_magnitude_vector is not None]
    try:
        for layer in layers:
            layer.known_norms = layer.row_norms(dtype)
        yield
    finally:
        for layer in layers:
            layer.known_norms = None
