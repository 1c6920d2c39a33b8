"""Several adapters over one base, of which the model computes with one at a time, or with none.

Every layer that has a LoRA term in one of them gets one for good, of the largest rank among them; choosing an adapter
copies its values there. With s the scaling of an adapter of rank r and R that largest rank

    A = [A; 0]  [R, in]     B = [s B, 0]  [out, R]     so     x A^T B^T  is  s x A^T B^T,

what is added being products with zero. Addresses and shapes stay as they are, so that captured graphs go on computing,
with whatever adapter was chosen last.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from slothcore.autograd.dora_projection import row_norms
from slothcore.autograd.expert_projection import scaled_factor
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.attach import require_no_adapter
from slothcore.lora.init_factors import Factors
from slothcore.lora.init_names import REPEATABLE
from slothcore.lora.plan import LoraLayer, lora_layers
from slothcore.lora.stored_adapter import MAGNITUDE, StoredAdapter
from slothcore.models.decoder import Decoder
from slothcore.models.vocabulary import EMBEDDING, HEAD, TABLES, round_tables


class SeveralAdapters:
    """Gives a model the places for several adapters, and puts the values of one of them there.

    The model only generates from then on: nothing trains, and what `save_adapter` and `save_merged` would write is not
    an adapter of its own. Factors are kept beside it in its compute dtype, to which a pass rounds them in any case:
    what it computes with an adapter is what it would with that one alone, up to the order of sums.

    Attributes:
        names: of the adapters.
        current: which of them is in place; None: none, so the model is the base.
    """

    def __init__(self, model: Decoder, folders: Mapping[str, Path]) -> None:
        """
        Args:
            model: the base, without an adapter; changed in place, and in eval mode from now on.
            folders: name of each adapter -> where it lies.
        Raises: ValueError, in one sentence, as `StoredAdapter.read`; or for an adapter that changes the base weights or
            brings tokens of its own: such a one needs a model to itself. The model is then as it was.
        """
        require_no_adapter(model)
        stored = {name: _read(model, folder) for name, folder in folders.items()}
        self._model = model
        self.names = tuple(folders)
        self.current: str | None = None
        model.requires_grad_(False).eval()
        round_tables(model)
        factors = {name: adapter.factors() for name, adapter in stored.items()}
        layers = {
            path: layer for path, layer in lora_layers(model).items() if any(path in each for each in factors.values())
        }
        # What a parameter holds with each adapter and, under None, without one.
        self._values: dict[str | None, list[Tensor]] = {name: [] for name in (None, *folders)}
        self._places: list[Tensor] = []
        self._norms: dict[str | None, dict[str, Tensor]] = {name: {} for name in self._values}
        self._scaled: dict[str, Linear] = {}
        for path, layer in layers.items():
            self._add_factors(path, layer, {name: each[path] for name, each in factors.items() if path in each}, stored)
        self._add_whole_parameters({name: _whole_parameters(model, adapter) for name, adapter in stored.items()})
        # One tensor of another dtype would send a whole list the slow way, a launch for each.
        dtypes = [place.dtype for place in self._places]
        self._alike = [[i for i, own in enumerate(dtypes) if own == dtype] for dtype in dict.fromkeys(dtypes)]

    def __contains__(self, name: object) -> bool:
        return name is None or name in self.names

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Let the model compute with this adapter, or with none; a few launches, in stream order.

        Raises: ValueError if there is no such adapter.
        """
        if name not in self:
            raise ValueError(f"there is no adapter {name!r}; known are {', '.join(self.names)}")
        if name == self.current:
            return
        for places in self._alike:
            values = self._values[name]
            torch._foreach_copy_([self._places[i] for i in places], [values[i] for i in places])
        # Whoever vouched for the norms of the factors that were there means those of these now.
        vouched = {path: layer.known_norms for path, layer in self._scaled.items() if layer.known_norms is not None}
        if vouched:
            torch._foreach_copy_(list(vouched.values()), [self._norms[name][path] for path in vouched])
        self.current = name

    @torch.no_grad()
    def _add_factors(
        self, path: str, layer: LoraLayer, factors: Mapping[str, Factors], stored: Mapping[str, StoredAdapter]
    ) -> None:
        """Make the place for a layer's factors, and note what each adapter puts there."""
        dtype, device = self._model.dtype, self._model.device
        rank = max(lora_A.shape[-2] for lora_A, _ in factors.values())
        scaled: dict[str | None, Factors] = {}
        for name, (lora_A, lora_B) in factors.items():
            lora_A, lora_B = lora_A.to(device, torch.float32), lora_B.to(device, torch.float32)
            more = rank - lora_A.shape[-2]
            lora_B = scaled_factor(lora_B, stored[name].plan.targets[path].scaling, dtype)
            scaled[name] = (
                nn.functional.pad(lora_A.to(dtype), (0, 0, 0, more)),
                nn.functional.pad(lora_B, (0, more)),
            )
        some_A, some_B = next(iter(scaled.values()))
        nothing = torch.zeros_like(some_A), torch.zeros_like(some_B)
        layer.attach_lora(
            *(nn.Parameter(torch.zeros_like(factor), requires_grad=False) for factor in nothing), scaling=1.0
        )
        assert layer.lora_A is not None
        assert layer.lora_B is not None
        self._places += [layer.lora_A, layer.lora_B]
        for adapter, values in self._values.items():
            values += scaled.get(adapter, nothing)
        if isinstance(layer, Linear):
            self._add_magnitudes(path, layer, {each: scaled.get(each, nothing) for each in self._values}, stored)
        else:
            assert isinstance(layer, ExpertLinear)

    def _add_magnitudes(
        self, path: str, layer: Linear, factors: Mapping[str | None, Factors], stored: Mapping[str, StoredAdapter]
    ) -> None:
        """The same for the lengths that DoRA gives the rows of a weight, if one of the adapters has it there."""
        learned = {
            name: adapter.tensors[f"{path}.{MAGNITUDE}"]
            for name, adapter in stored.items()
            if f"{path}.{MAGNITUDE}" in adapter.tensors
        }
        if not learned:
            return
        magnitude = torch.ones(layer.out_features, dtype=torch.float32, device=self._model.device)
        layer.attach_magnitude(nn.Parameter(magnitude, requires_grad=False))
        assert layer.lora_magnitude_vector is not None
        self._scaled[path] = layer
        self._places.append(layer.lora_magnitude_vector)
        for name, (lora_A, lora_B) in factors.items():
            # An adapter may replace this weight as a whole, whose lengths are then those of its own.
            whole = {} if name is None else _whole_parameters(self._model, stored[name])
            own = whole.get(f"{path}.weight")
            weight = layer.base_weight() if own is None else own.to(layer.weight)
            norms = row_norms(weight, lora_A, lora_B, scaling=1.0, dtype=self._model.dtype)
            self._norms[name][path] = norms
            # Without DoRA the rows keep the lengths that they have: a quotient of exactly one.
            self._values[name].append(learned[name].to(magnitude) if name in learned else norms)
        with torch.no_grad():
            layer.lora_magnitude_vector.copy_(self._norms[None][path])

    def _add_whole_parameters(self, whole: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The same for biases, trained modules and tables of tokens, which an adapter replaces as a whole."""
        model = self._model
        changed = [
            name for name in dict.fromkeys(n for each in whole.values() for n in each) if self._changes(name, whole)
        ]
        if model.has_tied_head and not set(TABLES).isdisjoint(changed):
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in changed:
            base = parameters[name].detach().clone()
            self._places.append(parameters[name])
            for adapter, values in self._values.items():
                value = whole[adapter].get(name) if adapter is not None else None
                values.append(base if value is None else value.to(base))

    def _changes(self, name: str, whole: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Whether an adapter has another value for this parameter than the base; PEFT stores some untouched ones."""
        base = dict(self._model.named_parameters(remove_duplicate=False))[name]
        return any(name in each and not torch.equal(each[name].to(base), base) for each in whole.values())


def _read(model: Decoder, folder: Path) -> StoredAdapter:
    """Raises: ValueError as `StoredAdapter.read`, or for one that needs another base."""
    stored = StoredAdapter.read(model, folder, keep_base=True)
    if stored.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the adapter in {folder} brings tokens of its own, {stored.vocab_size} in all where the base has "
            f"{model.config.vocab_size}, and adapters that share a base share its tokens; give it a model to itself"
        )
    if stored.plan.config.init_lora_weights in REPEATABLE:
        raise ValueError(
            f"the adapter in {folder} belongs to base weights that {stored.plan.config.init_lora_weights} has changed, "
            "and adapters that share a base leave it as it is; give it a model to itself, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return stored


def _whole_parameters(model: Decoder, adapter: StoredAdapter) -> dict[str, Tensor]:
    """What the adapter replaces as a whole; an embedding that is the head as well, under both names."""
    values = adapter.whole_parameters()
    if model.has_tied_head and EMBEDDING in values and set(TABLES).isdisjoint(adapter.plan.saved):
        values[HEAD] = values[EMBEDDING]
    return values
