"""Putting a LoRA adapter on a model: what is frozen, what trains, and with what it starts."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slothcore.layers.experts import ExpertLinear, expert_path
from slothcore.layers.linear import Linear
from slothcore.lora.config import ALL_LINEAR, Bias, LoraConfig
from slothcore.models.decoder import Decoder

LoraDtype = torch.dtype | str
LoraLayer = Linear | ExpertLinear


def add_lora(
    model: Decoder,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = ALL_LINEAR,
    bias: Bias = "none",
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    modules_to_save: Sequence[str] = (),
    lora_dtype: LoraDtype = "float32",
) -> Decoder:
    """Freeze the model and add a trainable LoRA adapter. Options are PEFT's, see `LoraConfig`.

    A head in `modules_to_save` that shares its weight with the embedding gets its own copy first, and so does a shared
    embedding: one trains, the other stays as it was (as in PEFT).

    Args:
        model: without an adapter; changed in place.
        lora_dtype: of the factors: "float32", "auto" for the model's compute dtype, or a torch dtype.
    Returns: the model.
    Raises: ValueError for a value out of its range, a name that no layer has, or a model that has an adapter already.
    """
    if isinstance(target_modules, str):
        names: tuple[str, ...] | str = target_modules
        # A plain name is a list of one, not an expression for a whole path, which it could never match.
        if target_modules != ALL_LINEAR and target_modules.isidentifier():
            names = (target_modules,)
    else:
        names = tuple(target_modules)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=names,
        bias=bias,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        modules_to_save=(modules_to_save,) if isinstance(modules_to_save, str) else tuple(modules_to_save),
        base_model_name_or_path=base_model_name(model),
        revision=model.revision,
    )
    require_no_adapter(model)
    plan = AdapterPlan.of(model, config)
    paths = [name for path, layer in lora_layers(model).items() for name in stored_paths(path, layer)]
    config.require_all_match(paths)
    dtype = resolve_lora_dtype(lora_dtype, model)
    factors = {}
    for path, target in plan.targets.items():
        lora_A = torch.empty(target.shape_A, dtype=dtype, device=model.device)
        lora_B = torch.empty(target.shape_B, dtype=dtype, device=model.device)
        initialise_factors(lora_A, lora_B, init_lora_weights)
        factors[path] = lora_A, lora_B
    attach(model, plan, factors)
    return model


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


def attach(model: Decoder, plan: AdapterPlan, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Freeze everything and put the planned adapter on the model; nothing can fail half-way.

    Args:
        factors: path of each target -> lora_A and lora_B.
    """
    _untie(model, plan.saved)
    model.requires_grad_(False)
    config, layers = plan.config, lora_layers(model)
    for path, (lora_A, lora_B) in factors.items():
        layers[path].attach_lora(lora_A, lora_B, scaling=plan.targets[path].scaling, dropout=config.lora_dropout)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in (*plan.biases, *plan.saved):
        parameters[name].requires_grad_(True)
    model.lora_config = config


def initialise_factors(lora_A: Tensor, lora_B: Tensor, init_lora_weights: bool | str) -> None:
    """Fill A [.., r, in] and B [.., out, r] in place, from the same distributions as PEFT.

    True is U(-1/sqrt(in), 1/sqrt(in)) for A, and zero for B.
    """
    if init_lora_weights == "gaussian":
        nn.init.normal_(lora_A, std=1 / lora_A.shape[-2])
    elif isinstance(init_lora_weights, bool):
        # Flat, because a stack's bound depends on the inputs of one expert.
        nn.init.kaiming_uniform_(lora_A.flatten(0, -2), a=math.sqrt(5))
    else:
        raise ValueError(f"init_lora_weights must be true, false or 'gaussian', got {init_lora_weights!r}")
    if init_lora_weights is False:
        nn.init.kaiming_uniform_(lora_B.flatten(0, -2), a=math.sqrt(5))
    else:
        nn.init.zeros_(lora_B)


def lora_config_of(model: Decoder) -> LoraConfig | None:
    """The configuration of the adapter on the model, or None."""
    return model.lora_config


def base_model_name(model: Decoder) -> str | None:
    """What the model was loaded as, which an adapter names as its base; None if it was not loaded.

    The `_name_or_path` of a published config.json is no substitute: it is whatever folder its author trained in.
    """
    return model.name_or_path


def require_no_adapter(model: Decoder) -> None:
    """Raises: ValueError if there is an adapter on the model."""
    if lora_config_of(model) is not None:
        raise ValueError("the model has a LoRA adapter already; merge it with save_merged, or load the base anew")


def lora_layers(model: Decoder) -> dict[str, LoraLayer]:
    """Every layer that can have a LoRA term by its path: linear layers, and stacks of experts."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear | ExpertLinear)}


def stored_paths(path: str, layer: LoraLayer) -> tuple[str, ...]:
    """The names on disk of the layer at this path, one for each expert of a stack."""
    if isinstance(layer, Linear):
        return (path,)
    return tuple(expert_path(path, index) for index in range(layer.num_experts))


def _target(layer: LoraLayer, names: tuple[str, ...], taken: Collection[str], config: LoraConfig) -> Target:
    """Raises: ValueError if the configuration tells experts of one stack apart."""
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


def resolve_lora_dtype(lora_dtype: LoraDtype, model: Decoder) -> torch.dtype:
    """Raises: ValueError if it is neither float32 nor the compute dtype, the two in which factors may be kept."""
    allowed = {"float32": torch.float32, "auto": model.dtype, str(model.dtype).removeprefix("torch."): model.dtype}
    dtype = allowed.get(lora_dtype.removeprefix("torch.")) if isinstance(lora_dtype, str) else lora_dtype
    if dtype not in allowed.values():
        raise ValueError(f"lora_dtype must be one of {', '.join(allowed)}, got {lora_dtype!r}")
    assert dtype is not None
    return dtype


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


def _untie(model: Decoder, saved: Sequence[str]) -> None:
    """Give the head its own copy of a weight that it shares with the embedding, if one of the two is to train."""
    shared = {"lm_head.weight", "model.embed_tokens.weight"}
    if model.has_tied_head and shared & set(saved):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
