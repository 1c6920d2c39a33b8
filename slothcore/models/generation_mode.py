"""The state of a model that writes: eval mode, and what depends on its factors computed once."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from slothcore.autograd.known_factors import KnownFactors
from slothcore.layers.known_norms import KnownNorms

if TYPE_CHECKING:
    from slothcore.models.decoder import Decoder


class GenerationMode:
    """Puts a model into that state for a while, again and again.

    Attributes:
        is_on: whether the model is in it.
        factors: those that its passes share; `refresh` them if factors are changed meanwhile.
    """

    def __init__(self, model: "Decoder") -> None:
        self._model = model
        self.factors = KnownFactors()
        self._norms = KnownNorms(model)
        self._was_training = False
        self.is_on = False

    @torch.no_grad()
    def enter(self) -> None:
        """From here on nothing may change a weight; who changes a factor changes `known_norms` along with it."""
        if not self.is_on:
            self._was_training = self._model.training
            self._model.eval()
            self.is_on = True
            self._norms.compute(self._model.dtype)
            self.factors.refresh()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Where passes are launched: on the model's device, with what they share."""
        device = self._model.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self.factors:
            yield

    def leave(self) -> None:
        """As before."""
        if self.is_on:
            self._norms.drop()
            self._model.train(self._was_training)
            self.is_on = False
