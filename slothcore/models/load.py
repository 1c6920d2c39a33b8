"""Building a decoder: weights streamed from a folder, or drawn at random."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slothcore.kernels import nf4, nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor
from slothcore.layers.experts import ExpertLinear, stack_path
from slothcore.layers.linear import Linear
from slothcore.layers.norm import RMSNorm
from slothcore.models.checkpoint import check_against, names_in_model, require_same_head, stored_tensors
from slothcore.models.config import DecoderConfig
from slothcore.models.decoder import Decoder
from slothcore.models.families import Family, decoder_config, family_of, text_config
from slothcore.models.fused_experts import split_fused_experts
from slothcore.models.hf_config import read_json
from slothcore.models.prequantized import (
    QuantizedWeight,
    as_if_dense,
    dequantized,
    quantized_weights,
    require_readable,
)
from slothcore.models.reading import read_tensors
from slothcore.models.rope_scaling import scaled_config

BITS = (4, 16, 32)
QUANTIZED = (Linear, ExpertLinear)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    folder: Path,
    *,
    bits: int = 4,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_length: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Decoder:
    """Read a Hugging Face folder into a decoder in eval mode.

    Each weight goes from the file straight to its place on the device, quantised on the way if bits is 4, while the
    next ones are read: see `reading.py`. Everything that headers can tell is checked before. Dense weights are
    trainable; with 4 bits nothing is until LoRA is added.

    Weights that bitsandbytes has quantised to NF4 already keep their bits with bits=4, and what its publisher left
    dense stays dense; with 16 or 32 they are expanded.

    Args:
        folder: holds config.json and safetensors, single or in shards.
        bits: 4 (NF4 with double quantisation for the linears of the layers, the rest in `dtype`), 16 or 32.
        dtype: in which it computes; default: float32 on a CPU or with 32 bits, else bfloat16, or float16 on a GPU
            that has no bfloat16.
        device: default: the GPU if there is one.
        max_seq_length: longest document to expect; default: what the model is made for. Longer ones need RoPE scaling,
            which is then linear and said in a warning.
        rope_scaling: how to scale RoPE, other than linearly by the ratio of the lengths: see `scaled_config`.
        progress: show a bar of the bytes read, if standard error is a terminal.
    Raises: ValueError, in one sentence, for whatever is wrong with the folder or the options.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(bits, dtype, device)
    _make_current(device)
    family, hf_config, config, message = read_config(folder, max_seq_length=max_seq_length, rope_scaling=rope_scaling)
    if message is not None:
        warnings.warn(message, stacklevel=3)
    generation_file = folder / "generation_config.json"
    generation_config = read_json(generation_file) if generation_file.is_file() else {}

    model = Decoder(config, dtype=dtype, device="meta", bits=bits, hf_config=hf_config)
    _read_weights(model, folder, family, device=device, progress=progress)
    model.tie_weights()
    model.folder, model.generation_config = folder, generation_config
    model.max_seq_length = config.longest_document if max_seq_length is None else max_seq_length
    return model.eval()


def read_config(
    folder: Path, *, max_seq_length: int | None = None, rope_scaling: str | Mapping[str, Any] | None = None
) -> tuple[Family, dict[str, Any], DecoderConfig, str | None]:
    """What `config.json` says of a model, with RoPE scaled as asked; needs no weights.

    Returns: its family, the `config.json` that it goes by, the same as a DecoderConfig, and what the user should be
        told of a scaling, or None.
    Raises: ValueError, in one sentence, if there is no such file or slothcore cannot build that model.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist")
    config_file = folder / "config.json"
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
            raise ValueError(
                f"{folder} holds a LoRA adapter and no model; load its base model ({base}), then call load_adapter"
            )
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    written = read_json(config_file)
    family, hf_config = family_of(written, str(config_file)), text_config(written, str(config_file))
    require_readable(hf_config, str(config_file))
    # The model is no longer what it says: weights may be dense here, and are in every export.
    hf_config.pop("quantization_config", None)
    hf_config, message = scaled_config(hf_config, max_seq_length, rope_scaling, source=str(config_file))
    return family, hf_config, decoder_config(hf_config, str(config_file)), message


def _read_weights(model: Decoder, folder: Path, family: Family, *, device: torch.device, progress: bool) -> None:
    """Fill a model on the meta device from its folder; nothing is allocated before all headers are checked."""
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    stored, ignored = names_in_model(stored_tensors(folder), family)
    stored = split_fused_experts(stored, model.config.moe)
    quantized = quantized_weights(stored)
    check_against(as_if_dense(stored, quantized), expected, folder)
    require_same_head(stored, expected)
    if ignored:
        warnings.warn(f"{folder}: {ignored} weights that belong to no text model were not loaded", stacklevel=4)

    # Each tensor on disk: the weight that it belongs to, and as what.
    owners = {name: (name, "weight") for name in expected if name not in quantized}
    for name in expected.keys() & quantized.keys():
        owners.update((part, (name, role)) for role, part in quantized[name].parts.items())
    incomplete: dict[str, dict[str, Tensor]] = {}
    for part, tensor in read_tensors(stored, owners, device=device, progress=progress):
        name, role = owners[part]
        if name not in quantized:
            # What others left dense stays so.
            place_weight(model, name, tensor.to(device, model.dtype), quantize=not quantized)
        else:
            parts = incomplete.setdefault(name, {})
            parts[role] = tensor.to(device)
            if len(parts) == len(quantized[name].parts):
                place_quantized(model, name, incomplete.pop(name), quantized[name])
        del tensor  # or the loop would hold it while the next one is read


def from_config(
    folder_or_dict: str | Path | Mapping[str, Any],
    *,
    bits: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """A decoder with random weights, trainable, in training mode; `torch.manual_seed` makes it reproducible.

    Args:
        folder_or_dict: a folder with config.json, such a file, or its contents.
        bits: default: 16 or 32, as dtype is; 4 quantises each weight as it is drawn.
        dtype: default: float32 on a CPU, else as in `load`.
        device: default: that of an enclosing `with torch.device(...)`, else the GPU if there is one. On "meta"
            nothing is allocated.
    Raises: ValueError, naming the key, if the configuration is not one that slothcore implements.
    """
    if isinstance(folder_or_dict, Mapping):
        written, source = dict(folder_or_dict), "config"
    else:
        path = Path(folder_or_dict)
        path = path / "config.json" if path.is_dir() else path
        written, source = read_json(path), str(path)
    hf_config = text_config(written, source)
    config = decoder_config(hf_config, source)
    surrounding = torch.get_default_device()
    if device is None and surrounding.type != "cpu":
        device = surrounding
    device = resolve_device(device)
    if bits is None:
        named = _named_dtype(dtype)
        bits = 32 if named == torch.float32 or (named is None and device.type in ("cpu", "meta")) else 16
    dtype = resolve_dtype(bits, dtype, device)
    if bits == 4 and device.type == "meta":
        raise ValueError("bits=4 needs values to quantise, which the meta device has not; use 16 or 32 there")
    _make_current(device)

    model = Decoder(config, dtype=dtype, device="meta", bits=bits, hf_config=hf_config)
    # By the names on disk, where each expert has its own.
    for name, weight in model.state_dict().items():
        fill = _initializer(model, name, config)
        place_weight(model, name, fill(torch.empty(weight.shape, dtype=dtype, device=device)))
    model.tie_weights()
    return model


def _make_current(device: torch.device) -> None:
    """Triton launches kernels on the process's current GPU, so that has to be the model's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_quantized(model: Decoder, name: str) -> bool:
    """Whether a weight is kept in NF4: with 4 bits those of the layers' linears and experts.

    The embedding and the head never are, as in transformers with bitsandbytes, nor is a router.
    """
    module, attribute, _ = _find(model, name)
    return model.bits == 4 and attribute == "weight" and isinstance(module, QUANTIZED) and module is not model.lm_head


def place_weight(model: Decoder, name: str, weight: Tensor, *, quantize: bool = True) -> None:
    """Put a weight where its checkpoint name says: quantised, or as it is, and then kept.

    Args:
        weight: on the final device, in the model's dtype.
        quantize: False keeps also those dense that 4 bits would quantise.
    """
    if quantize and is_quantized(model, name):
        ops = nf4 if weight.is_cuda else nf4_eager
        _put(model, name, ops.nf4_quantize(weight))
    else:
        _put(model, name, weight)


def place_quantized(model: Decoder, name: str, parts: Mapping[str, Tensor], weight: QuantizedWeight) -> None:
    """Put a weight that came quantised where its checkpoint name says: as it is, or dense where the model is dense.

    Args:
        parts: what `weight.parts` names, on the final device.
    """
    exact = weight.assemble(parts)
    if is_quantized(model, name):
        _put(model, name, exact)
        return
    # A head or router of a 4-bit model is what bitsandbytes multiplies by, rounded once; a model of 16 or 32 bits is
    # what transformers' `dequantize` makes, rounded to the original dtype first.
    first = model.dtype if model.bits == 4 else weight.dtype
    _put(model, name, dequantized(exact, first).to(model.dtype))


def _put(model: Decoder, name: str, weight: Tensor | Nf4Tensor) -> None:
    module, attribute, expert = _find(model, name)
    requires_grad = model.bits != 4
    if isinstance(module, ExpertLinear):
        assert expert is not None
        module.place_expert(expert, weight, requires_grad=requires_grad)
    elif isinstance(weight, Nf4Tensor):
        assert isinstance(module, Linear)
        module.set_nf4(weight)
    else:
        setattr(module, attribute, nn.Parameter(weight, requires_grad=requires_grad))


def _find(model: Decoder, name: str) -> tuple[nn.Module, str, int | None]:
    """The module and the attribute that hold a weight, and which expert's it is."""
    path, _, attribute = name.rpartition(".")
    stack, expert = stack_path(path) or (path, None)
    return model.get_submodule(stack), attribute, expert


def resolve_device(device: torch.device | str | None) -> torch.device:
    """The device to use; None: the GPU if there is one. Raises: ValueError if there is no such device."""
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device {str(device)!r} does not exist; use 'cpu' or 'cuda'") from None
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device 'cuda' was asked for, but torch finds no usable GPU; use 'cpu'")
        if resolved.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if resolved.index >= torch.cuda.device_count():
            raise ValueError(f"device {str(resolved)!r} does not exist; there are {torch.cuda.device_count()} GPUs")
    return resolved


def resolve_dtype(bits: int, dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The compute dtype that goes with `bits`. Raises: ValueError for bits or a dtype outside the choices."""
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if dtype is None:
        if bits == 32 or (bits == 4 and device.type == "cpu"):
            return torch.float32
        has_bfloat16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    known = _named_dtype(dtype)
    if known is None or known not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if bits != 4 and torch.finfo(known).bits != bits:
        raise ValueError(f"dtype {str(known).removeprefix('torch.')} does not go with bits={bits}")
    return known


def _named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype that a name such as "bfloat16" or "torch.bfloat16" stands for; None if there is none."""
    return DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype


def _initializer(model: Decoder, name: str, config: DecoderConfig) -> Callable[[Tensor], Tensor]:
    """How a weight starts: norms at one, biases at zero, the rest normal with the configured deviation."""
    module, attribute, _ = _find(model, name)
    if isinstance(module, RMSNorm):
        return lambda weight: weight.fill_(1.0 - config.norm_weight_offset)
    if attribute == "bias":
        return lambda weight: weight.zero_()
    return lambda weight: weight.normal_(0.0, config.initializer_range)
