"""The state of a model that writes: eval mode, and what depends on its factors computed once."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch

from slothcore.autograd.known_factors import KnownFactors
from slothcore.layers.known_norms import KnownNorms

if TYPE_CHECKING:
    from slothcore.models.decoder import Decoder


class _Shared:
    """What all modes of one model share.

    Attributes:
        norms: at one place for all, so that whoever changes them changes them for each of the captured graphs.
        count: of the modes that are on.
        was_training: whether the model was in training mode before the first of them.
    """

    def __init__(self, model: "Decoder") -> None:
        self.norms = KnownNorms(model)
        self.count = 0
        self.was_training = False


class GenerationMode:
    """Puts a model into that state for a while, again and again. Several may be on at a time: the last one ends it.

    Attributes:
        is_on: whether the model is in it.
        factors: those that its passes share; `refresh` them if factors are changed meanwhile.
    """

    _of_models: ClassVar[WeakKeyDictionary["Decoder", _Shared]] = WeakKeyDictionary()

    def __init__(self, model: "Decoder") -> None:
        self._model = model
        self._shared = self._of_models.setdefault(model, _Shared(model))
        self.factors = KnownFactors()
        self.is_on = False

    @property
    def was_training(self) -> bool:
        """Whether the model goes back to training mode."""
        return self._shared.was_training

    @torch.no_grad()
    def enter(self) -> None:
        """From here on nothing may change a weight; who changes a factor changes `known_norms` along with it."""
        if not self.is_on:
            shared = self._shared
            if shared.count == 0:
                shared.was_training = self._model.training
            shared.count += 1
            self.is_on = True
            self._model.eval()
            with self.passes():
                shared.norms.compute(self._model.dtype)
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
            self.is_on = False
            self._shared.count -= 1
            if self._shared.count == 0:
                self._shared.norms.drop()
                self._model.train(self._shared.was_training)
