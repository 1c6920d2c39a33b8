"""An adapter folded into the weights: W + scaling * B A, its rows brought to their lengths where DoRA learned them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from slothcore.layers.experts import ExpertLinear, expert_path
from slothcore.layers.linear import Linear
from slothcore.models.decoder import Decoder


def merged_weight(linear: Linear, dtype: torch.dtype) -> Tensor:
    """The base weight plus its LoRA term, [out, in].

    NF4 is decoded to float32 and the sum is taken there, so the result is rounded once; DoRA's scales are taken there,
    too, from factors that are not rounded.
    """
    if linear.lora_A is None:
        return linear.dequantized(dtype)
    total = linear.delta_weight().add_(linear.dequantized(torch.float32))
    if linear.lora_magnitude_vector is not None:
        scales = linear.lora_magnitude_vector.detach().float() / linear.row_norms()
        total *= scales[:, None]
    return total.to(dtype)


def merged_expert(layer: ExpertLinear, index: int, dtype: torch.dtype) -> Tensor:
    """The same for one expert of a stack."""
    if layer.lora_A is None:
        return layer.dequantized_expert(index, dtype)
    return layer.delta_expert(index).add_(layer.dequantized_expert(index, torch.float32)).to(dtype)


def merged_state(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model with its adapter folded in, under Hugging Face's names, made one at a time.

    A head that is the embedding's weight is left out, as Hugging Face does, unless it has a LoRA term of its own.
    """
    leave_out = {"lm_head.weight"} if head_stays_tied(model) else set()
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            if f"{path}.weight" not in leave_out:
                yield f"{path}.weight", merged_weight(module, dtype)
            if module.bias is not None:
                yield f"{path}.bias", module.bias.detach().to(dtype)
            continue
        if isinstance(module, ExpertLinear):
            for index in range(module.num_experts):
                yield f"{expert_path(path, index)}.weight", merged_expert(module, index, dtype)
            continue
        for name, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{name}", parameter.detach().to(dtype)


def head_stays_tied(model: Decoder) -> bool:
    """Whether the merged head still is the embedding's weight."""
    return model.has_tied_head and model.lm_head.lora_A is None
