"""Linear layers that are called like projections of experts: written and read as PEFT's `target_parameters`.

For transformers 5, which fuses a layer's experts, PEFT turns every entry of `target_modules` that ends with the name of
a projection of experts, such as gate_proj, into a parameter of the fused experts. Nothing then stands for the dense
layers between sparse ones, whose projections have the same names, and their factors are passed over in silence. As
parameters, `model.layers.1.mlp.gate_proj.weight`, they keep their places, and the names of their factors are the same.
PEFT gives parameters neither dropout nor DoRA, and looks for their rank and alpha under the names of the parameters;
those are in `peft_ranks.py`.
"""

from dataclasses import replace

from slothcore.layers.linear import Linear
from slothcore.layers.moe import Experts
from slothcore.lora.config import LoraConfig
from slothcore.lora.module_names import by_new_names
from slothcore.lora.plan import AdapterPlan, lora_layers
from slothcore.models.decoder import Decoder

WEIGHT = ".weight"


def as_parameters(config: LoraConfig, plan: AdapterPlan, model: Decoder) -> LoraConfig:
    """What PEFT has to read, so that each layer with LoRA is one for it, too; `config` itself where that is so.

    Args:
        plan: the places of the adapter in this model.
    """
    if any(target.is_stack for target in plan.targets.values()):
        config = replace(config, lora_dropout=0.0)
    fused = {name for module in model.modules() if isinstance(module, Experts) for name in module.names}
    dense = [path for path, target in plan.targets.items() if not target.is_stack and _leaf(path) in fused]
    if not dense:
        return config
    # By whole paths, for PEFT asks neither `exclude_modules` nor `layers_to_transform` about parameters.
    parameters = tuple(path + WEIGHT for path in dense)
    others = {path: target for path, target in plan.targets.items() if path not in set(dense)}
    if isinstance(config.target_modules, str):
        modules = [name for target in others.values() for name in target.names]
    else:
        # Experts with their block, so that where they are modules still, their names stand for no dense layer.
        experts = ("experts." + n.rpartition(".experts.")[2] for t in others.values() if t.is_stack for n in t.names)
        modules = [*(name for name in config.target_modules if _leaf(name) not in fused), *experts]
    return replace(
        config,
        lora_dropout=0.0,
        target_modules=tuple(dict.fromkeys(modules)),
        target_parameters=parameters,
    )


def as_modules(config: LoraConfig, model: Decoder) -> LoraConfig:
    """The same adapter with its parameters that are weights of linear layers among `target_modules`.

    An expression in `target_modules` is left, and so are its parameters.
    """
    if isinstance(config.target_modules, str):
        return config
    linears = [path for path, layer in lora_layers(model).items() if isinstance(layer, Linear)]
    left, moved = [], dict[str, str]()
    for parameter in config.target_parameters:
        found = {path + WEIGHT: path for path in linears if f".{path}{WEIGHT}".endswith(f".{parameter}")}
        moved.update(found)
        if not found:
            left.append(parameter)
    return replace(
        config,
        target_modules=tuple(dict.fromkeys((*config.target_modules, *moved.values()))),
        target_parameters=tuple(left),
        rank_pattern=by_new_names(config.rank_pattern, config.r, moved),
        alpha_pattern=by_new_names(config.alpha_pattern, config.lora_alpha, moved),
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
