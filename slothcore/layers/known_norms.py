"""DoRA's norms computed once for many passes, where factors stay as they are: when a model writes token by token.

Norms are those of W + s B A, so all of W is read for them. A pass over thousands of tokens does not feel it; a pass
over one does, because it reads W but once itself.
"""

import weakref

import torch
from torch import Tensor, nn

from slothcore.layers.linear import Linear


class KnownNorms:
    """Lets passes share norms for a while, again and again.

    They lie where they lay before, if they still fit there, so that a captured graph goes on reading them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.proxy(model)  # it may be kept beside the model, which must not live on for it
        self._norms: dict[Linear, Tensor] = {}

    def compute(self, dtype: torch.dtype) -> None:
        """Compute those of all layers for passes in `dtype`; until `drop` nothing may change a weight or a factor."""
        for layer in self._model.modules():
            if isinstance(layer, Linear) and layer.lora_magnitude_vector is not None:
                norms, place = layer.row_norms(dtype), self._norms.get(layer)
                if place is not None and place.shape == norms.shape and place.device == norms.device:
                    norms = place.copy_(norms)
                self._norms[layer] = layer.known_norms = norms

    def drop(self) -> None:
        """From here on each pass computes its own."""
        for layer in self._norms:
            layer.known_norms = None
