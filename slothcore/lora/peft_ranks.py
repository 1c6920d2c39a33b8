"""Ranks and alphas of an adapter of experts under the names for which PEFT asks.

For transformers 5 PEFT makes one LoRA term of an expert's gate and up, with both ranks together:

    [gate; up] + s [B_gate, 0; 0, B_up] [A_gate; A_up]

It asks for the rank and alpha of that under the name of the fused parameter, `model.layers.0.mlp.experts.gate_up_proj`,
and where no pattern matches that, it takes twice those of the whole adapter; patterns that mean the projections are
passed over, and so is use_rslora: it keeps alpha / r, not alpha / sqrt(r). For older transformers each expert's
projections are modules. So the configuration says alpha / r, and has the patterns that are wanting under either name.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from slothcore.layers.moe import Experts
from slothcore.lora.config import LoraConfig
from slothcore.lora.module_names import by_pattern
from slothcore.lora.plan import AdapterPlan, Target
from slothcore.models.decoder import Decoder

Kind = tuple[int, float]
"""Rank and alpha."""
GATE_UP, DOWN = "gate_up_proj", "down_proj"
ADDED = rf".*\.{GATE_UP}"
"""The pattern that PEFT adds behind the others."""


def with_ranks_for_peft(told: LoraConfig, config: LoraConfig, plan: AdapterPlan, model: Decoder) -> LoraConfig:
    """`told` with ranks and alphas that PEFT, whatever it fuses, reads as those of `config`.

    Args:
        told: the adapter as PEFT is told of it, with dense layers beside experts among its parameters.
        config: the adapter as it is.
        plan: its places in this model.
    """
    stacks = {path: target for path, target in plan.targets.items() if target.is_stack}
    if not stacks and not told.target_parameters:
        return told
    as_quotient = config.use_rslora and bool(stacks)
    kinds = {path: _kind(config, target, as_quotient) for path, target in plan.targets.items()}
    wanted = {name: kinds[path] for path, target in plan.targets.items() for name in target.names}
    for parameter in told.target_parameters:
        path = parameter.removesuffix(".weight")
        wanted[parameter] = wanted.pop(path)
    fused = _fused(plan, kinds, model)
    wanted.update(fused)
    default = kinds[next(iter(stacks))] if stacks else (told.r, told.lora_alpha)
    added: dict[str, Kind] = {}
    if any(name.endswith(GATE_UP) for name in fused):
        added = {ADDED: (2 * default[0], 2 * default[1])}
    given: list[Mapping[str, Any]] = [config.rank_pattern, {} if as_quotient else config.alpha_pattern]
    ranks, alphas = (
        _patterns(
            patterns,
            default[place],
            {name: kind[place] for name, kind in wanted.items()},
            {pattern: kind[place] for pattern, kind in added.items()},
        )
        for place, patterns in enumerate(given)
    )
    return replace(
        told,
        r=default[0],
        lora_alpha=default[1],
        use_rslora=config.use_rslora and not as_quotient,
        # PEFT draws factors before it reads them, and fails to draw some kinds for fused parameters.
        init_lora_weights=told.init_lora_weights is not False,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def _kind(config: LoraConfig, target: Target, as_quotient: bool) -> Kind:
    """With an alpha that over the rank is the scaling, where that is asked for."""
    rank, alpha = config.rank_of(target.names[0]), config.alpha_of(target.names[0])
    return rank, alpha * rank**0.5 if as_quotient else alpha


def _fused(plan: AdapterPlan, kinds: Mapping[str, Kind], model: Decoder) -> dict[str, Kind]:
    """Name of each fused parameter with a LoRA term -> its rank and alpha."""
    found: dict[str, Kind] = {}
    alone: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        gate, up, down = (f"{path}.{name}" for name in module.names)
        theirs = re.sub(r"\.[^.]+\.experts$", ".mlp.experts", path)
        if gate in kinds and up in kinds:
            (rank, alpha), (rank_up, alpha_up) = kinds[gate], kinds[up]
            scaling, scaling_up = plan.targets[gate].scaling, plan.targets[up].scaling
            if not math.isclose(scaling, scaling_up):
                warnings.warn(
                    f"PEFT has one scaling for gate and up of experts, and in {path} they have {scaling:g} and "
                    f"{scaling_up:g}; slothcore reads this adapter, and for other programs export the format merged",
                    stacklevel=4,
                )
            together = rank + rank_up
            found[f"{theirs}.{GATE_UP}"] = together, alpha + alpha_up if rank == rank_up else alpha / rank * together
        if down in kinds:
            found[f"{theirs}.{DOWN}"] = kinds[down]
        has_all = {gate, up, down} <= kinds.keys()
        if not has_all and not {gate, up}.isdisjoint(kinds):
            alone.update(module.names)
    if alone:
        warnings.warn(
            "PEFT, whose experts are fused, takes LoRA of gate and up only together and beside that of down, and "
            f"cannot use all of this adapter; slothcore reads it, and for PEFT name all of {', '.join(sorted(alone))} "
            "in target_modules, or export the format merged",
            stacklevel=4,
        )
    return found


def _patterns(
    patterns: Mapping[str, Any], default: Any, wanted: Mapping[str, Any], added: Mapping[str, Any]
) -> dict[str, Any]:
    """The patterns, if they give every name the value that is wanted; else others that do.

    Of those each stands for names that no other one means: where PEFT saves patterns again, it sorts them.
    """
    if all(by_pattern({**patterns, **added}, name, default) == value for name, value in wanted.items()):
        return dict(patterns)
    of_all: dict[str, set[Any]] = {}
    for name, value in wanted.items():
        of_all.setdefault(_in_every_layer(name), set()).add(value)
    found = {}
    for name, value in wanted.items():
        if by_pattern(added, name, default) != value:
            general = _in_every_layer(name)
            found[general if len(of_all[general]) == 1 else _of_every_expert(name)] = value
    return found


def _in_every_layer(name: str) -> str:
    """A pattern for a name with any numbers of layer and expert."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))


def _of_every_expert(name: str) -> str:
    """A pattern for a name with any number of the expert."""
    return re.sub(r"(?<=experts\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
