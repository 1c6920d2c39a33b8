"""What captured graphs took for granted of a model, and whether it still holds."""

import operator
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slothcore.layers.adapted_weight import AdaptedWeight
from slothcore.models.decoder_body import DecoderBody
from slothcore.models.language_model import LanguageModel

_nf4_of = operator.attrgetter("_nf4")
_options_of = operator.attrgetter("lora_scaling", "lora_dropout")
_requires_grad = operator.attrgetter("requires_grad")


class GraphWatch:
    """Where parameters and NF4 weights lie, which parameters train, and the options of layers, at one moment."""

    def __init__(self, watched: DecoderBody | LanguageModel) -> None:
        self._body = watched.model if isinstance(watched, LanguageModel) else watched
        self._layers = adapted_layers(watched)
        self._owned = [module._parameters for module in watched.modules() if module._parameters]
        for layer in self._layers:
            layer.base_weight()  # brings the NF4 parts up to date with the buffers
        # Any change of an NF4 weight or of its decoded copy makes another object. It may be large: hold it weakly.
        self._nf4 = [_reference(layer._nf4) for layer in self._layers]
        self._values = self._read()

    def is_unchanged(self) -> bool:
        """Whether a graph that was captured at that moment may be replayed; some 100 us for an 8B model."""
        known = [reference() for reference in self._nf4]
        return all(map(operator.is_, known, map(_nf4_of, self._layers))) and self._read() == self._values

    def _read(self) -> list[Any]:
        parameters = [p for owned in self._owned for p in owned.values() if p is not None]
        return [
            self._body.gradient_checkpointing,
            self._body.neftune_noise_alpha,
            *map(Tensor.data_ptr, parameters),
            *map(_requires_grad, parameters),
            *map(_options_of, self._layers),
        ]


def adapted_layers(module: nn.Module) -> list[AdaptedWeight[Any]]:
    """Every layer that can have LoRA."""
    return [layer for layer in module.modules() if isinstance(layer, AdaptedWeight)]


def _reference(weight: object | None) -> Callable[[], object | None]:
    return _nothing if weight is None else weakref.ref(weight)


def _nothing() -> None:
    """In place of a reference to an object."""
