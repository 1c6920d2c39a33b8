"""Which kind of number each tensor of a GGUF file gets: the mixtures of llama.cpp, tensor by tensor.

A mixture spends more bits where errors cost most: on the head (and on an embedding that is the head, too), on the
values of attention and on the way out of the MLP in the first and last eighth of the layers and in every third between.
Tensor names are GGUF's. Source: `llama_tensor_get_type_impl` of llama.cpp's `llama-quant.cpp`.
"""

import re
from collections.abc import Sequence
from math import prod
from typing import Literal, get_args

from slothcore.models.config import DecoderConfig

Kind = Literal["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
Mixture = Literal["F32", "F16", "BF16", "Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"]
MIXTURES: tuple[Mixture, ...] = get_args(Mixture)

# Numbers in a block, and bytes of it.
BLOCKS: dict[Kind, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
USUAL: dict[Mixture, Kind] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    "Q8_0": "Q8_0",
    "Q4_K_M": "Q4_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
}
# For rows that are no multiple of 256: the next larger kind with blocks of 32.
IN_SMALL_BLOCKS: dict[Kind, Kind] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAYER = re.compile(r"blk\.(\d+)\.")


def kind_of(name: str, mixture: Mixture, config: DecoderConfig, *, shape: Sequence[int], tied: bool) -> Kind:
    """The kind of one tensor.

    Args:
        name: as GGUF calls it, "blk.0.ffn_down.weight".
        mixture: of the file.
        config: of the model; its layers, heads and experts count.
        shape: of the tensor, the length of a row last.
        tied: whether the file has no "output.weight", its embedding being the head, too.
    Raises: ValueError for a mixture that does not exist.
    """
    if mixture not in USUAL:
        raise ValueError(f"a GGUF file's dtype must be one of {', '.join(MIXTURES)}, got {mixture!r}")
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", "ffn_gate_inp.weight")):
        return "F32"
    kind = USUAL[mixture]
    if BLOCKS[kind][0] == 1:
        return kind
    return _fitting(_by_place(name, mixture, config, columns=shape[-1], tied=tied), shape[-1])


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of one row. Raises: ValueError if the row is no multiple of the kind's block."""
    numbers, size = BLOCKS[kind]
    if columns % numbers:
        raise ValueError(f"{kind} needs rows of a multiple of {numbers} numbers, got {columns}; write F16 instead")
    return columns // numbers * size


def tensor_bytes(kind: Kind, shape: Sequence[int]) -> int:
    """Bytes of a tensor of this shape."""
    return prod(shape[:-1]) * row_bytes(kind, shape[-1])


def _by_place(name: str, mixture: Mixture, config: DecoderConfig, *, columns: int, tied: bool) -> Kind:
    """What the mixture gives to this place in the model, whatever the length of its rows."""
    usual = USUAL[mixture]
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q8_0" if usual == "Q8_0" or columns % BLOCKS[usual][0] else "Q6_K"
    found = LAYER.match(name)
    if found is None:
        return usual
    place = name.split(".")[2]
    eight_experts = config.moe is not None and config.moe.num_experts == 8
    more_bits = mixture in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(int(found[1]), config.num_hidden_layers)
    if eight_experts and place in ("attn_k", "attn_v", "attn_qkv"):
        # Small beside eight experts, so that these bits cost little.
        return "Q8_0"
    if eight_experts and place == "attn_output" and mixture == "Q4_K_M":
        return "Q5_K"
    if place in ("attn_v", "attn_qkv"):
        return "Q6_K" if more_bits else "Q5_K" if usual == "Q4_K" and _is_70b(config) else usual
    return "Q6_K" if more_bits and place.startswith("ffn_down") else usual


def _gets_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(config: DecoderConfig) -> bool:
    """Many query heads share the few values of such a model; llama.cpp knows it by its layers and family."""
    grouped = config.num_key_value_heads != config.num_attention_heads
    families = ("llama", "mistral", "mixtral") if grouped else ()
    return config.num_hidden_layers == 80 and config.model_type in (*families, "qwen2")


def _fitting(kind: Kind, columns: int) -> Kind:
    """The kind itself, or the best one whose blocks fill such rows."""
    for candidate in (kind, IN_SMALL_BLOCKS.get(kind, kind)):
        if columns % BLOCKS[candidate][0] == 0:
            return candidate
    return "F16"
