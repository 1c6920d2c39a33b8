"""The places of a model that an adapter takes."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from slothcore.layers.experts import ExpertLinear, expert_path
from slothcore.layers.linear import Linear
from slothcore.lora.config import LoraConfig
from slothcore.models.decoder import Decoder

LoraLayer = Linear | ExpertLinear


@dataclass(frozen=True)
class Target:
    """A layer with a LoRA term.

    Attributes:
        names: what it is called on disk: its path, or one for each expert of a stack.
        shape_A, shape_B: of its factors, [r, in] and [out, r]; with the experts in front for a stack.
        scaling: what multiplies B A.
    """

    names: tuple[str, ...]
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    scaling: float

    @property
    def is_stack(self) -> bool:
        """Whether these are experts."""
        return len(self.shape_A) == 3


@dataclass(frozen=True)
class AdapterPlan:
    """Which places of a model an adapter takes.

    Attributes:
        config: with "all-linear" written out.
        targets: path of each layer with a LoRA term -> the rest of what is to know of it.
        biases: paths of the biases that train.
        saved: paths of the parameters that train as part of a module in `modules_to_save`.
    """

    config: LoraConfig
    targets: dict[str, Target]
    biases: tuple[str, ...]
    saved: tuple[str, ...]

    @classmethod
    def of(cls, model: Decoder, config: LoraConfig) -> "AdapterPlan":
        """The places that `config` means in this model, whether the adapter is there already or not.

        Raises: ValueError if a name of the configuration fits nothing in the model.
        """
        layers = lora_layers(model)
        names = {path: stored_paths(path, layer) for path, layer in layers.items()}
        chosen = config.targets([name for path in layers for name in names[path]])
        taken = set(chosen)
        targets = {
            path: _target(layer, names[path], taken, config)
            for path, layer in layers.items()
            if not taken.isdisjoint(names[path])
        }
        if config.bias == "all":
            biases = tuple(name for name, _ in model.named_parameters() if name.endswith(".bias"))
        elif config.bias == "lora_only":
            biases = tuple(f"{path}.bias" for path in targets if getattr(layers[path], "bias", None) is not None)
        else:
            biases = ()
        return cls(config.with_names(chosen), targets, biases, tuple(_saved_parameters(model, config)))


def lora_layers(model: Decoder) -> dict[str, LoraLayer]:
    """Every layer that can have a LoRA term by its path: linear layers, and stacks of experts."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear | ExpertLinear)}


def stored_paths(path: str, layer: LoraLayer) -> tuple[str, ...]:
    """The names on disk of the layer at this path, one for each expert of a stack."""
    if isinstance(layer, Linear):
        return (path,)
    return tuple(expert_path(path, index) for index in range(layer.num_experts))


def _target(layer: LoraLayer, names: tuple[str, ...], taken: Collection[str], config: LoraConfig) -> Target:
    """Raises: ValueError if the configuration tells experts of one stack apart, or wants DoRA of them."""
    if config.use_dora and isinstance(layer, ExpertLinear):
        raise ValueError(
            f"use_dora is not made for experts, and {names[0]} is one; name other layers in target_modules, or leave "
            "use_dora out"
        )
    left = [name for name in names if name not in taken]
    if left:
        raise ValueError(
            f"target_modules take some experts of a layer and leave {left[0]}; the experts of a layer have LoRA "
            "together, so name all of them or none"
        )
    kinds = {(config.rank_of(name), config.scaling_of(name)) for name in names}
    if len(kinds) > 1:
        raise ValueError(
            f"rank_pattern and alpha_pattern tell {names[0]} and other experts of its layer apart; the experts of a "
            "layer share rank and alpha"
        )
    rank, scaling = kinds.pop()
    if isinstance(layer, ExpertLinear):
        return Target(names, *layer.factor_shapes(rank), scaling)
    return Target(names, (rank, layer.in_features), (layer.out_features, rank), scaling)


def _saved_parameters(model: Decoder, config: LoraConfig) -> Iterator[str]:
    """Paths of all parameters in the modules that `modules_to_save` names, in the model's order."""
    parameters = list(dict(model.named_parameters(remove_duplicate=False)))
    found: set[str] = set()
    for name in config.modules_to_save:
        modules = {path: module for path, module in model.named_modules() if path and path.endswith(name)}
        if not modules:
            known = ", ".join(dict.fromkeys(p.split(".")[-2] for p in parameters))
            raise ValueError(f"modules_to_save {name!r} matches no module; known are {known}")
        for path, module in modules.items():
            if any(isinstance(inner, ExpertLinear) for inner in module.modules()):
                raise ValueError(
                    f"modules_to_save {name!r}: {path} has experts, which no adapter format keeps as a whole; train "
                    "them through LoRA, or the whole model without an adapter"
                )
            if any(isinstance(inner, Linear) and inner.is_nf4 for inner in module.modules()):
                raise ValueError(
                    f"modules_to_save {name!r}: {path} is kept in NF4 and cannot train as a whole; load with bits=16"
                )
            found.update(p for p in parameters if p.startswith(f"{path}."))
    yield from (p for p in parameters if p in found)
