"""The state of a model that writes: eval mode, and what depends on its factors computed once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch

from slothcore.autograd.known_factors import KnownFactors
from slothcore.layers.known_norms import KnownNorms
from slothcore.models.graph_runs import Recorder
from slothcore.models.language_model import LanguageModel


class _Shared:
    """What all modes of one model share.

    Attributes:
        norms: at one place for all, so that whoever changes them changes them for each of the captured graphs.
        count: of the modes that are on.
        was_training: whether the model was in training mode before the first of them.
    """

    def __init__(self) -> None:
        self.norms = KnownNorms()
        self.count = 0
        self.was_training = False


class GenerationMode:
    """Puts a model into that state for a while, again and again. Several may be on at a time: the last one ends it.

    Attributes:
        is_on: whether the model is in it.
        factors: those that its passes share.
        recorder: records the joining of factors, a launch for each group of each layer; None: Python does it each time.
    """

    _of_models: ClassVar[WeakKeyDictionary[LanguageModel, _Shared]] = WeakKeyDictionary()

    def __init__(self, model: LanguageModel, *, recorder: Recorder | None = None) -> None:
        self._model = model
        self._shared = self._of_models.setdefault(model, _Shared())
        self.factors = KnownFactors()
        self.is_on = False
        self.recorder = recorder
        self._changes_seen = 0
        self._replay: Callable[[], None] | None = None

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
            modules = list(self._model.modules())  # hundreds: to walk through them takes as long as a layer
            if any(module.training for module in modules):
                self._model.eval()
            with self.passes():
                # First the factors, which may have changed since: DoRA's norms are made of what is kept of them.
                self.refresh_factors()
                shared.norms.compute(modules, self._model.dtype)

    @torch.no_grad()
    def refresh_factors(self) -> None:
        """Join them anew, because they may be others by now; from the second time for the same pairs on, replayed."""
        factors = self.factors
        factors.drop_moved()
        if factors.changes != self._changes_seen:
            self._changes_seen, self._replay = factors.changes, None
            factors.join_again()
            return
        if self._replay is None and self.recorder is not None and factors.are_copied:
            try:
                self._replay = self.recorder(factors.join_again)
            except Exception:
                # Python does it as well, and the passes, which take far more, will say what is wrong.
                self.recorder = None
        if self._replay is None:
            factors.join_again()
        else:
            self._replay()

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Where passes are launched: on the model's device, with what they share.

        Not in the inference mode of a caller: what is made there may never be written to outside of it.
        """
        device = self._model.device
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, torch.inference_mode(False), torch.no_grad(), self.factors:
            yield

    def leave(self) -> None:
        """As before."""
        if self.is_on:
            self.is_on = False
            self._shared.count -= 1
            if self._shared.count == 0:
                self._shared.norms.drop()
                if self._model.training != self._shared.was_training:
                    self._model.train(self._shared.was_training)
