"""Optimizers: which one a run has, loss scaling, and their state as plain tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from slothcore.models.decoder import Decoder
from slothcore.training.adafactor import Adafactor
from slothcore.training.config import TrainConfig
from slothcore.training.optimizer_kinds import KINDS, check_optimizer
from slothcore.training.parameter_groups import parameter_groups
from slothcore.training.versions import note_update

# What bitsandbytes keeps in pages where it is large.
PAGED_ENTRIES = ("state1", "state2")


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config.optim` names, over the parameters that require a gradient.

    Raises: ValueError if nothing is trainable, a group that the configuration is about is empty, or the optimizer needs
        a GPU and has none.
    """
    groups = parameter_groups(model, config)
    check_optimizer(config.optim, groups[0]["params"][0].device)
    rate, betas = config.learning_rate, (config.adam_beta1, config.adam_beta2)
    optimizer: torch.optim.Optimizer
    if config.optim == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.adam_epsilon, fused=True)
    elif config.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=rate, fused=True)
    elif config.optim == "adafactor":
        optimizer = Adafactor(groups, lr=rate)
    else:
        optimizer = _of_bitsandbytes(groups, config, lr=rate, betas=betas)
    optimizer.register_step_post_hook(note_update)
    return optimizer


def _of_bitsandbytes(groups: list[dict[str, Any]], config: TrainConfig, **options: Any) -> torch.optim.Optimizer:
    # It takes a second to import, which a run on a CPU need not spend.
    from bitsandbytes import optim

    from slothcore.training.adamw_8bit import AdamW8bit

    if KINDS[config.optim].moments == 1:
        return (optim.Lion8bit if KINDS[config.optim].is_8bit else optim.Lion)(groups, **options)
    classes = {"adamw_8bit": AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw_8bit": optim.PagedAdamW8bit}
    return classes[config.optim](groups, eps=config.adam_epsilon, **options)


def create_scaler(model: Decoder) -> torch.amp.GradScaler:
    """float16 gradients below 6e-8 vanish; scaling the loss keeps them. A disabled scaler passes all through.

    An update whose gradient overflows at the present scale is skipped and the scale halved; after 2000 updates in a row
    it is doubled. A skipped step counts as a step: the learning rate follows the number of the step. So it does in
    transformers with its default, torch's fused AdamW, which skips on the GPU and tells nobody.
    """
    return torch.amp.GradScaler(model.device.type, enabled=model.dtype == torch.float16)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter, for every parameter that requires a gradient; a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The state as `{"<parameter>/<entry>": tensor on the host}` and the entries that are no tensors."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # A copy: bitsandbytes shares its code book between parameters, and safetensors stores no tensor twice.
                tensors[f"{name}/{key}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                values.setdefault(name, {})[key] = value
    return tensors, values


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    values: dict[str, dict[str, Any]],
) -> None:
    """Put back what `optimizer_state` gave, bit for bit.

    `Optimizer.load_state_dict` would cast each entry to its parameter's dtype, which is no round trip for 8-bit state.

    Raises: ValueError if the state is of other parameters.
    """
    states: dict[str, dict[str, Any]] = {name: dict(entries) for name, entries in values.items()}
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = value
    for name, state in states.items():
        if name not in parameters:
            raise ValueError(f"the optimizer state has {name!r}, which this model does not train")
        parameter = parameters[name]
        optimizer.state[parameter] = {
            entry: _in_place(optimizer, parameter, entry, value) if isinstance(value, Tensor) else value
            for entry, value in state.items()
        }


def _in_place(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, entry: str, value: Tensor) -> Tensor:
    """An entry where the optimizer wants it: large moments of a paged one in pages, all else beside the parameter."""
    if entry in PAGED_ENTRIES and getattr(optimizer, "is_paged", False):
        buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)  # type: ignore[attr-defined]
        return buffer.copy_(value)
    return value.to(parameter.device)
