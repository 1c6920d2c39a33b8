"""DoRA's norms computed once for many passes, where factors stay as they are: when a model writes token by token.

Norms are those of W + s B A, so all of W is read for them. A pass over thousands of tokens does not feel it; a pass
over one does, because it reads W but once itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from slothcore.layers.linear import Linear


class KnownNorms:
    """Lets passes share norms for a while, again and again.

    They lie where they lay before on that device, if they still fit there, so that a captured graph goes on reading
    them.
    """

    def __init__(self) -> None:
        self._norms: dict[tuple[Linear, torch.device], Tensor] = {}

    def compute(self, modules: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Compute those of the layers among `modules`, for passes in `dtype`.

        Until `drop` nothing may change a weight or a factor.
        """
        for layer in modules:
            if isinstance(layer, Linear) and layer.lora_magnitude_vector is not None:
                norms = layer.row_norms(dtype)
                key = layer, norms.device
                place = self._norms.get(key)
                if place is not None and place.shape == norms.shape:
                    norms = place.copy_(norms)
                self._norms[key] = layer.known_norms = norms

    def drop(self) -> None:
        """From here on each pass computes its own."""
        for layer, _ in self._norms:
            layer.known_norms = None
