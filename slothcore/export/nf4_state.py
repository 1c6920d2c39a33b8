"""A merged model's weights as bitsandbytes stores NF4 in safetensors: codes, scales and a state beside each weight.

What is quantised: the linear maps of the layers, as transformers does it; of a model in NF4 those that are NF4 there.
The head, embedding and norms stay dense, and so do experts, which transformers keeps as stacks that bitsandbytes does
not quantise. A map that no adapter changes keeps its bits.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import BLOCK, NESTED_BLOCK, NF4_CODE, Nf4Tensor, block_count
from slothcore.layers.linear import Linear
from slothcore.lora.merge import Base, MergedWeight, merged_state, merged_weights
from slothcore.models.decoder import Decoder
from slothcore.models.prequantized import STATE, dequantized
from slothcore.models.writing import Outline

# The longest that a number takes in JSON. Blanks fill a state up to that: its length must be known before its values.
LONGEST_NUMBER = -1.2345678901234567e-100


def quantized_state(model: Decoder, dtype: torch.dtype, base: Base = "loaded") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the folder by name, made one weight at a time.

    Args:
        dtype: of what stays dense, and to which merged weights are rounded before they are quantised: as if the 16-bit
            model had been written and quantised then.
        base: as in `merged_state`.
    """
    for name, weight in _weights(model, dtype, base):
        if isinstance(weight, Tensor):
            yield name, weight
        else:
            yield from nf4_tensors(name, weight, dtype)


def decoded_state(
    model: Decoder, dtype: torch.dtype, base: Base = "loaded", *, as_dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The same weights, those in NF4 decoded to `as_dtype`."""
    for name, weight in _weights(model, dtype, base):
        yield name, weight if isinstance(weight, Tensor) else dequantized(weight, as_dtype)


def quantized_outline(model: Decoder, dtype: torch.dtype, base: Base = "loaded") -> Outline:
    """What `quantized_state` gives, without its values."""
    kept = _kept(model, base)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for weight in merged_weights(model):
        if not _is_quantized(model, weight):
            found[weight.name] = dtype, weight.shape
            continue
        rows, columns = weight.shape
        nested = weight.name not in kept or kept[weight.name].is_nested
        found.update(nf4_outline(weight.name, (rows, columns), dtype, nested=nested))
    return found


def quantization_config(model: Decoder, dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says of the weights, for transformers."""
    dense = [w.path for w in merged_weights(model) if isinstance(w.layer, Linear) and not _is_quantized(model, w)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(dict.fromkeys([*dense, "lm_head"])),
        "llm_int8_threshold": 6.0,
    }


def nf4_tensors(name: str, weight: Nf4Tensor, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one quantised weight, in the order of `nf4_outline`.

    Args:
        dtype: which the weight had before.
    """
    yield name, weight.packed.view(-1, 1)
    yield f"{name}.absmax", weight.absmax
    yield f"{name}.quant_map", torch.tensor(NF4_CODE, dtype=torch.float32)
    offset = None
    if weight.nested_absmax is not None and weight.nested_code is not None and weight.nested_offset is not None:
        yield f"{name}.nested_absmax", weight.nested_absmax
        yield f"{name}.nested_quant_map", weight.nested_code
        offset = weight.nested_offset.item()
    longest = len(_state(weight.shape, dtype, None if offset is None else LONGEST_NUMBER))
    text = _state(weight.shape, dtype, offset).ljust(longest)
    yield f"{name}.{STATE}", torch.tensor(list(text), dtype=torch.uint8)


def nf4_outline(
    name: str, shape: tuple[int, int], dtype: torch.dtype, *, nested: bool
) -> Iterator[tuple[str, tuple[torch.dtype, tuple[int, ...]]]]:
    """What `nf4_tensors` gives, without its values."""
    blocks = block_count(shape)
    yield name, (torch.uint8, (-(-shape[0] * shape[1] // 2), 1))
    yield f"{name}.absmax", (torch.uint8 if nested else torch.float32, (blocks,))
    yield f"{name}.quant_map", (torch.float32, (len(NF4_CODE),))
    if nested:
        yield f"{name}.nested_absmax", (torch.float32, (-(-blocks // NESTED_BLOCK),))
        yield f"{name}.nested_quant_map", (torch.float32, (256,))
    state = _state(shape, dtype, LONGEST_NUMBER if nested else None)
    yield f"{name}.{STATE}", (torch.uint8, (len(state),))


def _state(shape: tuple[int, int], dtype: torch.dtype, offset: float | None) -> bytes:
    values: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if offset is not None:
        values |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(values).encode("ascii")


def _weights(model: Decoder, dtype: torch.dtype, base: Base) -> Iterator[tuple[str, Tensor | Nf4Tensor]]:
    kept = _kept(model, base)
    quantized = {weight.name for weight in merged_weights(model) if _is_quantized(model, weight)}
    for name, weight in merged_state(model, dtype, base):
        if name in kept:
            yield name, kept[name]
        elif name in quantized:
            ops = nf4 if weight.is_cuda else nf4_eager
            yield name, ops.nf4_quantize(weight)
        else:
            yield name, weight


def _is_quantized(model: Decoder, weight: MergedWeight) -> bool:
    """Whether a weight is written in NF4."""
    if not isinstance(weight.layer, Linear) or weight.layer is model.lm_head:
        return False
    return weight.layer.is_nf4 or model.bits != 4


def _kept(model: Decoder, base: Base) -> dict[str, Nf4Tensor]:
    """The NF4 weights that are written as they are."""
    if base != "loaded":
        return {}
    found: dict[str, Nf4Tensor] = {}
    for weight in merged_weights(model):
        if isinstance(weight.layer, Linear) and not weight.is_merged and _is_quantized(model, weight):
            value = weight.layer.base_weight()
            if isinstance(value, Nf4Tensor):
                found[weight.name] = value
    return found
