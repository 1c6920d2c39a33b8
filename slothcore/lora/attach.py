"""Putting a LoRA adapter on a model: what is frozen, what trains, and with what it starts."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slothcore.layers.linear import Linear
from slothcore.lora.base_change import initial_factors, take_out
from slothcore.lora.config import Bias, LoraConfig
from slothcore.lora.init_names import check_init
from slothcore.lora.module_names import ALL_LINEAR
from slothcore.lora.plan import AdapterPlan, lora_layers, stored_paths
from slothcore.models.decoder import Decoder
from slothcore.models.vocabulary import TABLES

LoraDtype = torch.dtype | str


def add_lora(
    model: Decoder,
    *,
    r: int = 16,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | str = ALL_LINEAR,
    exclude_modules: Sequence[str] | str | None = None,
    bias: Bias = "none",
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: bool | str = True,
    loftq_iter: int = 1,
    modules_to_save: Sequence[str] = (),
    layers_to_transform: Sequence[int] | None = None,
    layers_pattern: Sequence[str] | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    lora_dtype: LoraDtype = "float32",
) -> Decoder:
    """Freeze the model and add a trainable LoRA adapter. Options are PEFT's, see `LoraConfig`.

    With "pissa", "pissa_niter_N" and "olora" the base weights change; those in NF4 are quantised anew, from what the
    model's folder holds. `save_adapter` writes what fits the unchanged base, and `load_adapter` makes the changed one
    again. With "loftq" the adapter belongs to the base in NF4, on which it is loaded with bits=4.

    With `use_dora` the rows of each target begin with the lengths that they have, in float32 whatever `lora_dtype` is:
    an update of a usual size is less than half the last bit of a 16-bit length.

    A head in `modules_to_save` that shares its weight with the embedding gets its own copy first, and so does a shared
    embedding: one trains, the other stays as it was (as in PEFT).

    Args:
        model: without an adapter; changed in place.
        loftq_iter: rounds of quantising and decomposing with init_lora_weights "loftq".
        lora_dtype: of the factors, and of an embedding or head that trains: "float32", "auto" for the model's compute
            dtype, or a torch dtype.
    Returns: the model.
    Raises: ValueError for a value out of its range, a name that no layer has, a model that has an adapter already, or
        an initialisation that needs original weights which are not to be had.
    """
    check_init(init_lora_weights)
    if loftq_iter < 1:
        raise ValueError(f"loftq_iter must be at least 1, got {loftq_iter}")
    if layers_pattern and layers_to_transform is None:
        raise ValueError(
            f"layers_pattern {layers_pattern!r} names the list in which layers_to_transform counts, and that is not "
            "given; give both or neither"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=_names(target_modules),
        exclude_modules=None if exclude_modules is None else _names(exclude_modules),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=init_lora_weights,
        modules_to_save=_listed(modules_to_save),
        layers_to_transform=None if layers_to_transform is None else tuple(layers_to_transform),
        layers_pattern=None if layers_pattern is None else _listed(layers_pattern),
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        base_model_name_or_path=base_model_name(model),
        revision=model.revision,
    )
    require_no_adapter(model)
    plan = AdapterPlan.of(model, config)
    paths = [name for path, layer in lora_layers(model).items() for name in stored_paths(path, layer)]
    config.require_all_match(paths)
    config.require_all_used([name for target in plan.targets.values() for name in target.names])
    dtype = resolve_lora_dtype(lora_dtype, model)
    factors, taken = initial_factors(model, plan, dtype=dtype, loftq_iter=loftq_iter)
    take_out(model, plan, taken)
    attach(model, plan, factors)
    return model


def attach(
    model: Decoder,
    plan: AdapterPlan,
    factors: dict[str, tuple[Tensor, Tensor]],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> None:
    """Freeze everything and put the planned adapter on the model; nothing can fail half-way.

    An embedding or a head that trains is kept in the dtype of the factors: updates of a usual size are less than half
    the last bit of a 16-bit weight, and would be rounded away. Computing rounds it to the model's dtype each time, as a
    merge does.

    Args:
        factors: path of each target -> lora_A and lora_B.
        magnitudes: path of each target -> those of DoRA, [out] float32; None: the lengths that its rows have.
    """
    _untie(model, plan.saved)
    model.requires_grad_(False)
    config, layers = plan.config, lora_layers(model)
    for path, (lora_A, lora_B) in factors.items():
        layer = layers[path]
        layer.attach_lora(lora_A, lora_B, scaling=plan.targets[path].scaling, dropout=config.lora_dropout)
        if config.use_dora and isinstance(layer, Linear):
            layer.attach_magnitude(layer.row_norms(model.dtype) if magnitudes is None else magnitudes[path])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    dtype = next(iter(factors.values()))[0].dtype
    for name in (*plan.biases, *plan.saved):
        if name in TABLES:
            parameters[name].data = parameters[name].data.to(dtype)
        parameters[name].requires_grad_(True)
    model.lora_config = config


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


def resolve_lora_dtype(lora_dtype: LoraDtype, model: Decoder) -> torch.dtype:
    """Raises: ValueError if it is neither float32 nor the compute dtype, the two in which factors may be kept."""
    allowed = {"float32": torch.float32, "auto": model.dtype, str(model.dtype).removeprefix("torch."): model.dtype}
    dtype = allowed.get(lora_dtype.removeprefix("torch.")) if isinstance(lora_dtype, str) else lora_dtype
    if dtype not in allowed.values():
        raise ValueError(f"lora_dtype must be one of {', '.join(allowed)}, got {lora_dtype!r}")
    assert dtype is not None
    return dtype


def _names(modules: Sequence[str] | str) -> tuple[str, ...] | str:
    """Names of modules, or an expression for whole paths.

    A plain name is a list of one: as an expression it could never match a path.
    """
    if isinstance(modules, str):
        return (modules,) if modules != ALL_LINEAR and modules.isidentifier() else modules
    return tuple(modules)


def _listed(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _untie(model: Decoder, saved: Sequence[str]) -> None:
    """Give the head its own copy of a weight that it shares with the embedding, if one of the two is to train."""
    if model.has_tied_head and not set(TABLES).isdisjoint(saved):
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
