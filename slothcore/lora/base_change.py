"""Adapters that begin with a part of the base weights, which these lose: PiSSA, OLoRA, and LoftQ over several rounds.

What was taken out of a base weight is kept as the pair of factors it was, on the host, in `Decoder.taken_out`: with it
and the original weights the same base is made again to the last bit, where the decomposition itself may round
otherwise on another machine.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.layers.experts import ExpertLinear
from slothcore.layers.linear import Linear
from slothcore.lora.init_factors import Factors, draw_factors, factors_of_weight, loftq_factors, without
from slothcore.lora.init_names import uses_weights
from slothcore.lora.plan import AdapterPlan, LoraLayer, lora_layers
from slothcore.models.decoder import Decoder
from slothcore.models.originals import original_weights, stored_originals


@torch.no_grad()
def initial_factors(
    model: Decoder, plan: AdapterPlan, *, dtype: torch.dtype, loftq_iter: int = 1
) -> tuple[dict[str, Factors], dict[str, Factors]]:
    """What an adapter begins with, by `plan.config.init_lora_weights`; the model is not changed.

    Args:
        plan: where the adapter goes.
        dtype: of the factors.
        loftq_iter: rounds of LoftQ.
    Returns: path of each target -> lora_A and lora_B; and the same of what its base weight is to lose, on the host.
    Raises: ValueError, in one sentence, if the initialisation does not fit the model or its original weights, which it
        needs of an NF4 one, are not to be had.
    """
    init = plan.config.init_lora_weights
    factors = {
        path: (
            torch.empty(target.shape_A, dtype=dtype, device=model.device),
            torch.empty(target.shape_B, dtype=dtype, device=model.device),
        )
        for path, target in plan.targets.items()
    }
    if not uses_weights(init):
        for lora_A, lora_B in factors.values():
            draw_factors(lora_A, lora_B, init)
        return factors, {}
    assert isinstance(init, str)
    if model.device.type == "meta":
        return factors, {}
    _require_fit(model, plan, init)
    layers = lora_layers(model)
    changes_base = init != "loftq" or loftq_iter > 1
    taken = {path: _zeros_on_host(pair) for path, pair in factors.items()} if changes_base else {}
    for path, index, weight in _base_weights(model, plan):
        layer, target = layers[path], plan.targets[path]
        lora_A, lora_B = _of_expert(factors[path], index)
        rank = lora_A.shape[0]
        lost: Factors | None
        if init != "loftq":
            first = lost = factors_of_weight(weight.float(), rank, target.scaling, init, dtype=dtype)
        elif layer.is_nf4:
            first, lost = loftq_factors(
                weight.float(), _quantised(layer, index), rank, target.scaling, iterations=loftq_iter, dtype=dtype
            )
        else:
            # Such as the head, which no quantisation has changed.
            draw_factors(lora_A, lora_B, True)
            continue
        for place, value in zip((lora_A, lora_B), first, strict=True):
            place.copy_(value)
        if lost is not None:
            for place, value in zip(_of_expert(taken[path], index), lost, strict=True):
                place.copy_(value)
    return factors, taken


@torch.no_grad()
def take_out(model: Decoder, plan: AdapterPlan, taken: Mapping[str, Factors]) -> None:
    """Make each base weight W - scaling * B A, in its dtype or quantised anew, and note it in `model.taken_out`.

    Args:
        taken: path of each target -> A and B, as its lora_A and lora_B are shaped.
    Raises: ValueError if the weights are in NF4 and their original values are not to be had.
    """
    if not taken:
        return
    layers = lora_layers(model)
    for path, index, weight in _base_weights(model, plan):
        pair = _of_expert(taken[path], index)
        # LoftQ takes nothing out of a dense weight, which may be shared.
        if pair[1].any():
            _place(model, layers[path], index, without(weight, pair, plan.targets[path].scaling))
    model.taken_out = dict(taken)


def can_take_out(model: Decoder, plan: AdapterPlan) -> bool:
    """Whether the original values of all targets are to be had."""
    try:
        stored_originals(model, _quantised_names(model, plan))
    except ValueError:
        return False
    return True


def _require_fit(model: Decoder, plan: AdapterPlan, init: str) -> None:
    """Raise ValueError unless every target has a decomposition of its rank, and LoftQ something to make up for."""
    names = _quantised_names(model, plan)
    if init == "loftq" and not names:
        raise ValueError(
            f"init_lora_weights loftq makes up for what NF4 loses, and the base weights have {model.bits} bits; "
            "load the model with bits=4, or choose pissa"
        )
    for path, target in plan.targets.items():
        rank, largest = target.shape_A[-2], min(target.shape_A[-1], target.shape_B[-2])
        if rank > largest:
            raise ValueError(
                f"init_lora_weights {init} finds at most rank {largest} in {path}, got r = {rank}; lower r"
            )
    if model.vocabulary_changed and "lm_head" in plan.targets:
        raise ValueError(
            f"init_lora_weights {init} would take from a head with new tokens, which is saved whole beside the "
            "adapter; leave lm_head out of target_modules"
        )
    if names:
        stored_originals(model, names)


def _quantised_names(model: Decoder, plan: AdapterPlan) -> dict[str, tuple[str, int | None]]:
    """Weights of targets in NF4 by their names on disk -> path of the layer and which expert's."""
    layers = lora_layers(model)
    return {
        f"{name}.weight": (path, index if target.is_stack else None)
        for path, target in plan.targets.items()
        if layers[path].is_nf4
        for index, name in enumerate(target.names)
    }


def _base_weights(model: Decoder, plan: AdapterPlan) -> Iterator[tuple[str, int | None, Tensor]]:
    """Path, expert and weight [out, in] of each target, as it was before any quantisation; one is held at a time."""
    layers = lora_layers(model)
    for path in plan.targets:
        layer = layers[path]
        if isinstance(layer, ExpertLinear) and not layer.is_nf4:
            yield from ((path, index, weight.detach()) for index, weight in enumerate(layer.weight))
        elif not layer.is_nf4:
            yield path, None, layer.weight.detach()
    names = _quantised_names(model, plan)
    if names:
        for name, weight in original_weights(model, names):
            yield *names[name], weight


def _place(model: Decoder, layer: LoraLayer, index: int | None, weight: Tensor) -> None:
    """Put a changed weight, float32, where the former one is."""
    if layer.is_nf4:
        ops = nf4 if weight.is_cuda else nf4_eager
        double_quant = _quantised(layer, index).nested_absmax is not None
        quantised = ops.nf4_quantize(weight, double_quant=double_quant)
        if isinstance(layer, Linear):
            layer.set_nf4(quantised)
        else:
            assert index is not None
            layer.place_expert(index, quantised)
    elif layer is model.lm_head and model.has_tied_head:
        # The embedding keeps the weight that both had.
        model.lm_head.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    else:
        (layer.weight if index is None else layer.weight[index]).copy_(weight)


def _quantised(layer: LoraLayer, index: int | None) -> Nf4Tensor:
    """The NF4 weight of a linear layer, or of one expert."""
    if isinstance(layer, ExpertLinear):
        assert index is not None
        stack = layer.base_weight()
        assert not isinstance(stack, Tensor)
        return stack.expert(index)
    weight = layer.base_weight()
    assert isinstance(weight, Nf4Tensor)
    return weight


def _of_expert(pair: Factors, index: int | None) -> Factors:
    return pair if index is None else (pair[0][index], pair[1][index])


def _zeros_on_host(pair: Factors) -> Factors:
    lora_A, lora_B = (torch.zeros(factor.shape, dtype=factor.dtype, device="cpu") for factor in pair)
    return lora_A, lora_B
