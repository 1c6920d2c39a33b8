"""Checkpoints whose weights bitsandbytes has quantised to NF4 already, as transformers saves and the Hub holds them.

Beside the packed codes `X.weight` lie `X.weight.absmax`, `X.weight.quant_map` and, JSON in UTF-8,
`X.weight.quant_state.bitsandbytes__nf4`; with double quantisation also `X.weight.nested_absmax` and
`X.weight.nested_quant_map`. Which weights are quantised is told by these names, not by config.json: many publishers
leave modules out by rules of their own.

The codes are bytes of any dtype, `bnb_4bit_quant_storage`, because FSDP shards tensors of one dtype only. The state's
`dtype` is that of the weight before: `dequantize_4bit` rounds to it, whereas bitsandbytes' products, and ours, round
code * absmax to the dtype of their input alone.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import BLOCK, NESTED_BLOCK, NF4_CODE, Nf4Tensor, block_count
from slothcore.models.reading import DTYPES, StoredTensor, read_bytes

STATE = "quant_state.bitsandbytes__nf4"
FP4_STATE = "quant_state.bitsandbytes__fp4"
READ_ON_THE_HOST = ("quant_map", STATE)
"""Parts that are checked and needed no more."""
VALUE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
REMEDY = "load the model's unquantised 16-bit original instead, which bits=4 quantises on the way"


@dataclass(frozen=True)
class QuantizedWeight:
    """One quantised weight of a folder.

    Attributes:
        shape: (out_features, in_features).
        dtype: of the weight before it was quantised.
        nested_offset: what is added to every absmax; None without double quantisation.
        parts: the tensors that `assemble` needs, by name in the folder: packed, absmax, nested_absmax, nested_code.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    nested_offset: float | None
    parts: Mapping[str, str]

    def assemble(self, tensors: Mapping[str, Tensor]) -> Nf4Tensor:
        """The weight from its parts, as they were read: nothing is computed."""
        packed, absmax = tensors["packed"].view(-1).view(torch.uint8), tensors["absmax"]
        if self.nested_offset is None:
            return Nf4Tensor(packed, absmax, None, None, None, self.shape)
        # Filled on the device: a copy from the host would wait for all that a GPU has to do.
        offset = torch.full((), self.nested_offset, dtype=torch.float32, device=packed.device)
        return Nf4Tensor(packed, absmax, tensors["nested_absmax"], offset, tensors["nested_code"], self.shape)


def dequantized(weight: Nf4Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `weight` in `dtype`, rounded once."""
    ops = nf4 if weight.packed.is_cuda else nf4_eager
    return ops.nf4_dequantize(weight, dtype=dtype)


def require_readable(hf_config: Mapping[str, Any], source: str) -> None:
    """Raise ValueError if `quantization_config` in a config.json names a format that slothcore does not read."""
    config = hf_config.get("quantization_config")
    if config is None:
        return
    if not isinstance(config, Mapping):
        raise ValueError(f"{source}: quantization_config must be an object, got {config!r}")
    kind = str(config.get("quant_method") or "bitsandbytes")
    if kind == "bitsandbytes":
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            kind = "bitsandbytes int8"
        elif config.get("load_in_4bit") or config.get("_load_in_4bit"):
            # Without the key the type is bitsandbytes' own default.
            kind = f"bitsandbytes {config.get('bnb_4bit_quant_type', 'fp4')}"
    if kind not in ("bitsandbytes", "bitsandbytes nf4"):
        raise ValueError(
            f"{source}: the weights are quantised already ({kind}), and slothcore reads bitsandbytes nf4 only; {REMEDY}"
        )


def quantized_weights(stored: Mapping[str, StoredTensor]) -> dict[str, QuantizedWeight]:
    """The quantised weights among a folder's tensors, by name, each checked against what its state says.

    Raises: ValueError, naming the file and the weight, for a part that is missing or does not fit, or a kind of
        quantisation other than NF4 with blocks of 64.
    """
    found: dict[str, QuantizedWeight] = {}
    for name, tensor in stored.items():
        if name.endswith(f".{FP4_STATE}"):
            raise ValueError(f"{tensor.file}: {name.removesuffix(f'.{FP4_STATE}')} is quantised to 'fp4'; {REMEDY}")
        if name.endswith(f".{STATE}"):
            weight = name.removesuffix(f".{STATE}")
            found[weight] = _quantized_weight(stored, weight)
    return found


def as_if_dense(
    stored: Mapping[str, StoredTensor], quantized: Mapping[str, QuantizedWeight]
) -> dict[str, StoredTensor]:
    """The folder's tensors as they would be without quantisation: one for each weight, in its shape and dtype."""
    parts = {part for weight in quantized.values() for part in weight.parts.values()}
    parts.update(f"{name}.{part}" for name in quantized for part in READ_ON_THE_HOST)
    dense = {name: tensor for name, tensor in stored.items() if name not in parts}
    for name, weight in quantized.items():
        dtype = VALUE_DTYPES[str(weight.dtype).removeprefix("torch.")]
        dense[name] = replace(stored[name], shape=weight.shape, dtype=dtype)
    return dense


def _quantized_weight(stored: Mapping[str, StoredTensor], name: str) -> QuantizedWeight:
    where = f"{stored[f'{name}.{STATE}'].file}: {name}"
    shape, dtype, offset = _read_state(stored[f"{name}.{STATE}"], where)
    blocks = block_count(shape)
    parts = {"packed": name, "absmax": f"{name}.absmax"}
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.absmax": ("F32", (blocks,)),
    }
    if offset is not None:
        parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_code": f"{name}.nested_quant_map"}
        expected |= {
            f"{name}.absmax": ("U8", (blocks,)),
            f"{name}.nested_absmax": ("F32", (-(-blocks // NESTED_BLOCK),)),
            f"{name}.nested_quant_map": ("F32", (256,)),
        }
    for part, what in expected.items():
        if part not in stored:
            raise ValueError(f"{where} is quantised, but {part} is missing; download it again")
        found = (stored[part].dtype, stored[part].shape)
        if found != what:
            raise ValueError(f"{where}: {part} must be {_described(what)}, got {_described(found)}; download it again")
    packed_bytes = -(-shape[0] * shape[1] // 2)
    actual = stored[name].nbytes if name in stored and stored[name].dtype in DTYPES else 0
    if actual != packed_bytes:
        raise ValueError(f"{where} must have {packed_bytes} bytes of codes, got {actual}; download it again")
    if struct.unpack("<16f", read_bytes(stored[f"{name}.quant_map"])) != NF4_CODE:
        raise ValueError(f"{where} has a quant_map other than the NF4 code; {REMEDY}")
    return QuantizedWeight(shape, dtype, offset, parts)


def _read_state(stored: StoredTensor, where: str) -> tuple[tuple[int, int], torch.dtype, float | None]:
    """Shape, dtype and nested_offset of a quantised weight from its JSON."""
    try:
        state = json.loads(read_bytes(stored).decode("utf-8"))
        rows, columns = state["shape"]
        dtype = state["dtype"]
        offset = float(state["nested_offset"]) if "nested_offset" in state else None
        wanted = {"quant_type": "nf4", "blocksize": BLOCK}
        if offset is not None:
            wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        kind = {key: state[key] for key in wanted}
        if offset is not None and not isfinite(offset):
            raise ValueError(f"nested_offset is {offset}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} has a quantisation state that cannot be read ({error!r}); download it again"
        ) from None
    for key, value in kind.items():
        if value != wanted[key]:
            raise ValueError(
                f"{where} is quantised with {key} {value!r}, and slothcore reads {wanted[key]!r}; {REMEDY}"
            )
    if not all(type(n) is int and n > 0 for n in (rows, columns)) or str(dtype) not in VALUE_DTYPES:
        raise ValueError(f"{where} was quantised from {dtype!r} of shape {[rows, columns]}; {REMEDY}")
    return (rows, columns), getattr(torch, dtype), offset


def _described(what: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = what
    return f"{dtype} of shape {list(shape)}"
