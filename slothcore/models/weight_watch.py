"""Whether a model may compute something else than it did: what was kept of its passes is then of no use any more."""

import operator
import weakref
from typing import Any

from torch import Tensor

from slothcore.models.graph_watch import adapted_layers
from slothcore.models.language_model import LanguageModel

_scaling_of = operator.attrgetter("lora_scaling")


class WeightWatch:
    """The weights of a model at one moment: which tensors they are, where they lie, and how often torch changed them.

    An optimizer may write where torch does not count it. A model that learned has been in training mode since, so that
    counts as a change, too. What stays unseen is a write past torch, or to an inference tensor, in one that has not.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = weakref.proxy(model)
        self._owned = [tensors for module in model.modules() for tensors in (module._parameters, module._buffers)]
        self._layers = adapted_layers(model)
        weights = self._weights()
        # Not by address alone: where one was freed another may lie. Weakly, because a changed model frees the old ones.
        self._known = [weakref.ref(weight) for weight in weights]
        self._values = self._read(weights)

    def is_unchanged(self) -> bool:
        """Whether the model computes what it did at that moment, as long as it is not in training mode."""
        weights = self._weights()
        known = [reference() for reference in self._known]
        return (
            len(weights) == len(known)
            and all(map(operator.is_, known, weights))
            and self._read(weights) == self._values
        )

    def _weights(self) -> list[Tensor]:
        return [tensor for tensors in self._owned for tensor in tensors.values() if tensor is not None]

    def _read(self, weights: list[Tensor]) -> list[Any]:
        return [
            self._model.times_in_training,
            *map(_scaling_of, self._layers),
            *((weight.data_ptr(), -1 if weight.is_inference() else weight._version) for weight in weights),
        ]
