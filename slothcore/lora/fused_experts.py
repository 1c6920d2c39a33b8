"""Adapters of fused experts: PEFT's `target_parameters`, taken apart into one adapter for each expert.

transformers 5 keeps a layer's experts as two parameters, and PEFT adapts them as a whole: gate_up_proj [E, 2 I, H], in
which gate and up share one A, and down_proj [E, H, I]. With the rank r of a parameter, n its outputs and K its inputs,
    A [E r, K]   the rows of expert e are e r .. e r + r
    B [n, r E]   the columns of expert e are e, E + e, 2 E + e, ..
    W_e += scaling * B_e A_e,   so  gate_e: A_e and the upper half of B_e;   up_e: A_e and the lower half.
The adapter of gate_up_proj lies in the file under `mlp.experts.base_layer` if down_proj has one too, which is then
under `mlp.experts`; an only one is under `mlp.experts`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from slothcore.layers.linear import Linear
from slothcore.layers.moe import Experts
from slothcore.lora.config import LoraConfig
from slothcore.lora.dense_beside_experts import as_modules
from slothcore.lora.module_names import by_pattern
from slothcore.lora.plan import lora_layers
from slothcore.models.decoder import Decoder

PARAMETERS = ("gate_up_proj", "down_proj")
ROUTER = "gate.weight"
ADAPTED = re.compile(
    r"(?P<prefix>(base_model\.model\.)?)(?P<layer>model\.layers\.\d+)\.mlp\.experts\."
    r"(?P<inner>base_layer\.)?(?P<factor>lora_[AB])(\.default)?\.weight"
)


def split_fused_adapter(
    config: LoraConfig, tensors: Mapping[str, Tensor], model: Decoder, source: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The same adapter, its experts under names of their own, and linear layers among its modules.

    Args:
        config: with `target_parameters`.
        tensors: what the adapter's file holds, under its names.
        source: the file, for messages.
    Raises: ValueError if it adapts other parameters than experts, not alike in every layer, or does not fit the model.
    """
    config = as_modules(config, model)
    if not config.target_parameters:
        return config, dict(tensors)
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, Experts)}
    layers = {re.sub(r"\.[^.]+\.experts$", "", path): path for path in stacks}
    adapted = _adapted_parameters(config, list(layers), source)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = ADAPTED.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        if match["layer"] not in layers or (match["inner"] and len(adapted) == 1):
            raise ValueError(f"{source} holds {name}, which this model has no place for")
        parameter = adapted[0] if match["inner"] else adapted[-1]
        path = layers[match["layer"]]
        rank = config.rank_of(f"{match['layer']}.mlp.experts.{parameter}")
        for index, projection, factor in _factors(stacks[path], parameter, match["factor"], tensor, rank, name, source):
            found[f"{match['prefix']}{path}.{index}.{projection}.{match['factor']}.weight"] = factor
    return _with_expert_names(config, model, next(iter(stacks.values())), list(layers), adapted, source), found


def _adapted_parameters(config: LoraConfig, layers: list[str], source: str) -> list[str]:
    """Which of `PARAMETERS` the adapter has, in the order in which PEFT wraps them."""
    adapted = []
    unused = set(config.target_parameters)
    for parameter in PARAMETERS:
        hits = set()
        for layer in layers:
            key = f".{layer}.mlp.experts.{parameter}"
            targets = {target for target in config.target_parameters if key.endswith(f".{target}")}
            unused -= targets
            hits.add(bool(targets))
        if len(hits) > 1:
            raise ValueError(
                f"{source}: target_parameters adapt {parameter} in some layers only; this is not supported"
            )
        if hits == {True}:
            adapted.append(parameter)
    if unused:
        said = f"{source}: target_parameters {', '.join(map(repr, sorted(unused)))} are no fused experts of this model"
        if any(name.endswith(ROUTER) for name in unused):
            raise ValueError(
                f"{said} but its routers, which cannot have LoRA, though PEFT's 'all-linear' takes them; train the "
                "adapter again with target_modules and target_parameters by name, without the routers"
            )
        raise ValueError(f"{said}; other parameters cannot be adapted")
    return adapted


def _factors(
    experts: Experts, parameter: str, factor: str, tensor: Tensor, rank: int, name: str, source: str
) -> Iterator[tuple[int, str, Tensor]]:
    """Expert, projection and factor of everything that one tensor holds."""
    gate, up, down = experts.names
    layer = experts.projections()[0 if parameter == "gate_up_proj" else 2]
    count = layer.num_experts
    outputs = dict.fromkeys((gate, up) if parameter == "gate_up_proj" else (down,), layer.out_features)
    total = sum(outputs.values())
    expected = (rank * count, layer.in_features) if factor == "lora_A" else (total, rank * count)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{source}: {name} has the shape {tuple(tensor.shape)}, but this model needs {expected}")
    if factor == "lora_A":
        for index, rows in enumerate(tensor.view(count, rank, layer.in_features)):
            yield from ((index, projection, rows) for projection in outputs)
    else:
        for index, columns in enumerate(tensor.view(total, rank, count).permute(2, 0, 1)):
            yield from zip([index] * len(outputs), outputs, columns.split(list(outputs.values())), strict=True)


def _with_expert_names(
    config: LoraConfig, model: Decoder, experts: Experts, layers: list[str], adapted: list[str], source: str
) -> LoraConfig:
    """The configuration that says the same of the single experts."""
    if isinstance(config.target_modules, str):
        raise ValueError(
            f"{source}: target_parameters beside the expression {config.target_modules!r} in target_modules are not "
            "supported; write its names as a list"
        )
    gate, up, down = experts.names
    names: list[str] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    default = config.r, config.lora_alpha
    for parameter in adapted:
        keys = [f"{layer}.mlp.experts.{parameter}" for layer in layers]
        kinds = {(config.rank_of(key), config.alpha_of(key)) for key in keys}
        if len(kinds) > 1:
            raise ValueError(
                f"{source}: rank_pattern or alpha_pattern tell layers of experts apart; this is not supported"
            )
        (kind,) = kinds
        if parameter == "gate_up_proj":
            # PEFT reads experts' gate and up at the rank that holds where no pattern does, so this is theirs.
            pattern, default = rf"experts\.\d+\.({gate}|{up})", kind
            names += [gate, up]
        else:
            # Under both names, for PEFT looks for its own.
            pattern = rf"experts\.(\d+\.)?({down}|down_proj)"
            names.append(down)
        # First in its dictionary, so that it counts before an expression that was meant for linear layers.
        ranks[pattern], alphas[pattern] = kind
    linears = [path for path, layer in lora_layers(model).items() if isinstance(layer, Linear)]
    modules = config.target_modules
    if modules and (config.exclude_modules or config.layers_to_transform):
        # PEFT asks neither about parameters, so neither may be asked about the experts.
        modules = tuple(config.matching(linears))
    ranks.update(_used_by(linears, config.rank_pattern))
    alphas.update(_used_by(linears, config.alpha_pattern))
    if default != (config.r, config.lora_alpha) and modules:
        pattern = "|".join(map(re.escape, modules))
        ranks.setdefault(pattern, config.r)
        alphas.setdefault(pattern, config.lora_alpha)
    if len(layers) < model.config.num_hidden_layers:
        # A bare name would stand for the dense layers' projections, too.
        count = experts.projections()[0].num_experts
        names = [f"experts.{index}.{name}" for index in range(count) for name in names]
    return replace(
        config,
        r=default[0],
        lora_alpha=default[1],
        target_modules=(*modules, *names),
        target_parameters=(),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _used_by(linears: Sequence[str], patterns: Mapping[str, Any]) -> dict[str, Any]:
    """Those patterns that mean one of the linear layers, and not fused experts alone."""
    return {
        pattern: value
        for pattern, value in patterns.items()
        if any(by_pattern({pattern: True}, path, False) for path in linears)
    }
