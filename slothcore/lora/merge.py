"""An adapter folded into the weights: W + scaling * B A, its rows brought to their lengths where DoRA learned them.

W is what the model was loaded with, of NF4 weights what they decode to; or what its folder holds, before anything was
quantised. Sums are taken in float32 and rounded once. One weight is made at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from slothcore.layers.experts import ExpertLinear, expert_path
from slothcore.layers.linear import Linear
from slothcore.lora.attach import lora_config_of
from slothcore.lora.init_factors import without
from slothcore.lora.plan import AdapterPlan, LoraLayer
from slothcore.models.decoder import Decoder
from slothcore.models.originals import stored_originals
from slothcore.models.reading import StoredTensor, read_tensors
from slothcore.models.vocabulary import EMBEDDING, HEAD, TABLES
from slothcore.models.writing import Outline

Base = Literal["loaded", "original"]
# Elements whose sums are in memory in float32 at once.
SUMMED_AT_ONCE = 2**24


@dataclass(frozen=True)
class MergedWeight:
    """One weight of a merged model, which is made when it is asked for.

    Attributes:
        name: Hugging Face's.
        shape: its shape.
        path: of the layer that it is the weight of, if that can have LoRA; else None.
        layer: that layer.
        index: which expert's it is.
        parameter: a parameter that is written as it is; None for the weight of such a layer.
    """

    name: str
    shape: tuple[int, ...]
    path: str | None = None
    layer: LoraLayer | None = None
    index: int = 0
    parameter: Tensor | None = None

    @property
    def is_merged(self) -> bool:
        """Whether an adapter changes it."""
        return self.layer is not None and self.layer.lora_A is not None

    def merged(self, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
        """The weight in `dtype`.

        Args:
            base: a dense weight to take in place of the loaded one.
        """
        if isinstance(self.layer, ExpertLinear):
            return merged_expert(self.layer, self.index, dtype, base)
        if self.layer is not None:
            return merged_weight(self.layer, dtype, base)
        assert self.parameter is not None
        return (self.parameter if base is None else base).detach().to(dtype)

    def unmerged(self, dtype: torch.dtype) -> Tensor:
        """The loaded weight in `dtype`, without the adapter."""
        if isinstance(self.layer, ExpertLinear):
            return self.layer.dequantized_expert(self.index, dtype)
        if self.layer is not None:
            return self.layer.dequantized(dtype).detach()
        return self.merged(dtype)


def merged_weight(linear: Linear, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """The base weight plus its LoRA term, [out, in], rounded once.

    DoRA's scales are taken from factors that are not rounded.
    """
    if linear.lora_A is None or linear.lora_B is None:
        return linear.dequantized(dtype) if base is None else base.to(dtype)
    base = _as_held(linear) if base is None else base
    magnitude = linear.lora_magnitude_vector
    return _sum(base, linear.lora_A, linear.lora_B, linear.lora_scaling, dtype, magnitude)


def merged_expert(layer: ExpertLinear, index: int, dtype: torch.dtype, base: Tensor | None = None) -> Tensor:
    """The same for one expert of a stack."""
    if layer.lora_A is None or layer.lora_B is None:
        return layer.dequantized_expert(index, dtype) if base is None else base.to(dtype)
    if base is None:
        base = layer.dequantized_expert(index, torch.float32 if layer.is_nf4 else layer.weight.dtype)
    return _sum(base, layer.lora_A[index], layer.lora_B[index], layer.lora_scaling, dtype)


def _as_held(linear: Linear) -> Tensor:
    """A dense weight itself; an NF4 one in float32."""
    return linear.dequantized(torch.float32 if linear.is_nf4 else linear.weight.dtype)


@torch.no_grad()
def _sum(
    base: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype, magnitude: Tensor | None = None
) -> Tensor:
    """W + scaling * B A in `dtype`, some rows at a time: nothing else of the weight's size is made."""
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    step = max(1, SUMMED_AT_ONCE // base.shape[1])
    for begin in range(0, base.shape[0], step):
        rows = slice(begin, begin + step)
        total = base[rows].float() + scaling * (lora_B[rows].float() @ lora_A.float())
        if magnitude is not None:
            total *= (magnitude[rows].float() / total.norm(dim=1))[:, None]
        merged[rows] = total
    return merged


def merged_weights(model: Decoder) -> list[MergedWeight]:
    """Every weight of the model with its adapter folded in, in the order embedding, layers, norm, head.

    A head that is the embedding's weight is left out, as Hugging Face does, unless it has a LoRA term of its own.
    """
    found: list[MergedWeight] = []
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found.append(MergedWeight(f"{path}.weight", module.weight_shape, path, module))
            if module.bias is not None:
                found.append(MergedWeight(f"{path}.bias", tuple(module.bias.shape), parameter=module.bias))
        elif isinstance(module, ExpertLinear):
            for index in range(module.num_experts):
                name = f"{expert_path(path, index)}.weight"
                found.append(MergedWeight(name, module.weight_shape[1:], path, module, index))
        else:
            for name, parameter in module.named_parameters(recurse=False):
                found.append(MergedWeight(f"{path}.{name}", tuple(parameter.shape), parameter=parameter))
    left_out = HEAD if head_stays_tied(model) else None
    return [weight for weight in found if weight.name != left_out]


def merged_outline(model: Decoder, dtype: torch.dtype) -> Outline:
    """What `merged_state` gives, without its values."""
    return {weight.name: (dtype, weight.shape) for weight in merged_weights(model)}


def merged_state(model: Decoder, dtype: torch.dtype, base: Base = "loaded") -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model with its adapter folded in, under Hugging Face's names, made one at a time.

    They come block by block, in the order embedding, layers, norm, head.

    Args:
        base: "loaded": what the model computes with, so NF4 weights as they decode; "original": what its folder holds.
    Raises: ValueError as `require_base`.
    """
    require_base(model, base)
    if base == "loaded":
        yield from ((weight.name, weight.merged(dtype)) for weight in merged_weights(model))
    else:
        yield from ((weight.name, weight.merged(dtype, value)) for weight, value in _original_values(model))


def original_state(model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights that the adapter is put on with base="original", and those that train as a whole; nothing is merged.

    Raises: ValueError as `require_base`.
    """
    require_base(model, "original")
    for weight, value in _original_values(model):
        yield weight.name, weight.unmerged(dtype) if value is None else value.to(dtype)


def require_base(model: Decoder, base: str) -> None:
    """Raises: ValueError, in one sentence, if there is no such base, or this model's is not to be had."""
    if base not in get_args(Base):
        raise ValueError(f"base must be one of {', '.join(get_args(Base))}, got {base!r}")
    if base == "loaded":
        return
    config = lora_config_of(model)
    if config is None:
        raise ValueError("base original is for a model with an adapter, and this one has none; leave base out")
    if config.init_lora_weights == "loftq":
        raise ValueError(
            "base original does not fit an adapter that was begun by loftq, which makes up for what NF4 lost of the "
            "original weights; leave base out"
        )
    _stored(model)


def head_stays_tied(model: Decoder) -> bool:
    """Whether the merged head still is the embedding's weight."""
    return model.has_tied_head and model.lm_head.lora_A is None


def _original_values(model: Decoder) -> Iterator[tuple[MergedWeight, Tensor | None]]:
    """Each weight with its value before anything was quantised; None where it trains as a whole, or has new tokens."""
    stored, layers = _stored(model), groupby(merged_weights(model), key=lambda weight: block_of(weight.name))
    for _, block in layers:
        weights = {weight.name: weight for weight in block}
        yield from ((weight, None) for name, weight in weights.items() if name not in stored)
        names = [name for name in weights if name in stored]
        for name, value in read_tensors({name: stored[name] for name in names}, names, device=model.device):
            yield weights[name], _without_taken(model, weights[name], value)
            del value  # or it would live on while the next one is read


def _without_taken(model: Decoder, weight: MergedWeight, value: Tensor) -> Tensor:
    """A weight of the folder on the model's device, less what the adapter began with."""
    taken = model.taken_out.get(weight.path or "")
    if taken is None or weight.layer is None:
        return value.to(model.device)
    pair = (taken[0][weight.index], taken[1][weight.index]) if isinstance(weight.layer, ExpertLinear) else taken
    return without(value.to(model.device), pair, weight.layer.lora_scaling)


def _stored(model: Decoder) -> dict[str, StoredTensor]:
    """Where the folder holds each weight that does not train as a whole.

    Raises: ValueError if it does not, or holds it quantised.
    """
    config = lora_config_of(model)
    assert config is not None
    plan = AdapterPlan.of(model, config)
    # Both, also where a head with LoRA has the embedding's rows.
    changed = TABLES if model.vocabulary_changed else ()
    trained = {*plan.biases, *plan.saved, *changed}
    wanted = {weight.name: weight for weight in merged_weights(model) if weight.name not in trained}
    # A head that has left the embedding began as its weight.
    sources = {name: EMBEDDING if name == HEAD and model.config.tie_word_embeddings else name for name in wanted}
    found = stored_originals(
        model, dict.fromkeys(sources.values()), remedy="load the model's unquantised 16-bit original, or leave base out"
    )
    for name, source in sources.items():
        if found[source].shape != wanted[name].shape:
            raise ValueError(f"{found[source].file}: {source} has changed since the model was loaded; load it again")
    return {name: found[source] for name, source in sources.items()}


def block_of(name: str) -> str:
    """Which block of a model a weight belongs to: its embedding, a layer, the last norm or the head."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else name.rpartition(".")[0]
