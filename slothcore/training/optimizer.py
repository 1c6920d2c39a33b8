"""Optimizers: parameter groups, AdamW in torch and in 8 bits, loss scaling, and their state as plain tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from slothcore.models.decoder import Decoder
from slothcore.training.config import TrainConfig

# What one launch of 8-bit AdamW takes at most of parameters that have to be copied end to end: it bounds the extra
# memory. Here, because the plan of a run's memory needs it, and importing bitsandbytes takes a second.
LARGEST_BATCH = 2**24


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient, as `config.optim` says.

    Raises: ValueError if nothing is trainable, or 8-bit AdamW is asked for without a GPU.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in trainable_parameters(model).values():
        # Biases and norm weights are the vectors; decay pulls a norm towards 0, which is no neutral value for it.
        (decayed if parameter.ndim >= 2 else exempt).append(parameter)
    if not decayed and not exempt:
        raise ValueError("the model has no trainable parameter; call add_lora, or set full_finetuning")
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if config.optim == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    device = next(iter(trainable_parameters(model).values())).device
    check_8bit(device)
    # bitsandbytes takes a second to import, which a run on a CPU need not spend.
    from slothcore.training.adamw_8bit import AdamW8bit

    return AdamW8bit(groups, **options)


def create_scaler(model: Decoder) -> torch.amp.GradScaler:
    """float16 gradients below 6e-8 vanish; scaling the loss keeps them. A disabled scaler passes all through."""
    scaled = model.dtype == torch.float16 and model.device.type == "cuda"
    return torch.amp.GradScaler(model.device.type, enabled=scaled)


def check_8bit(device: torch.device) -> None:
    """Raises ValueError unless 8-bit AdamW can run on `device`."""
    if device.type != "cuda":
        raise ValueError(f"optim adamw_8bit needs a GPU, and the model is on {device.type}; set optim to adamw")


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
        device = parameters[name].device
        optimizer.state[parameters[name]] = {
            entry: value.to(device) if isinstance(value, Tensor) else value for entry, value in state.items()
        }
