"""Building a decoder: weights streamed from a folder, or drawn at random."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slothcore.kernels import nf4, nf4_eager
from slothcore.layers.linear import Linear
from slothcore.layers.norm import RMSNorm
from slothcore.models.checkpoint import check_against, read_tensors, stored_tensors
from slothcore.models.config import DecoderConfig, read_json
from slothcore.models.decoder import Decoder
from slothcore.models.families import decoder_config

BITS = (4, 16, 32)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_model(
    folder: Path,
    *,
    bits: int = 4,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_length: int | None = None,
) -> Decoder:
    """Read a Hugging Face folder into a decoder in eval mode.

    Each weight goes from the file straight to its place on the device, quantised on the way if bits is 4, before the
    next is read: beside the model there is never more than one weight. Everything that headers can tell is checked
    before. Dense weights are trainable; with 4 bits nothing is until LoRA is added.

    Args:
        folder: holds config.json and safetensors, single or in shards.
        bits: 4 (NF4 with double quantisation for the linears of the layers, the rest in `dtype`), 16 or 32.
        dtype: in which it computes; default: float32 on a CPU or with 32 bits, else bfloat16, or float16 on a GPU
            that has no bfloat16.
        device: default: the GPU if there is one.
        max_seq_length: longest document to expect; default: the model's max_position_embeddings.
    Raises: ValueError, in one sentence, for whatever is wrong with the folder or the options.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(bits, dtype, device)
    _make_current(device)
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
    hf_config = read_json(config_file)
    config = decoder_config(hf_config, str(config_file))
    generation_file = folder / "generation_config.json"
    generation_config = read_json(generation_file) if generation_file.is_file() else {}

    model = Decoder(config, dtype=dtype, device="meta", bits=bits, hf_config=hf_config)
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    stored = stored_tensors(folder)
    check_against(stored, expected, folder)
    for name, tensor in read_tensors(stored, expected):
        # A weight that is kept must be a copy, not a window into the mapped file.
        place_weight(model, name, tensor.to(device, dtype, copy=not is_quantized(model, name)))
        del tensor  # or the loop would hold it while the next one is read
    model.tie_weights()
    model.generation_config = generation_config
    model.max_seq_length = resolve_max_seq_length(max_seq_length, config)
    return model.eval()


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
        hf_config, source = dict(folder_or_dict), "config"
    else:
        path = Path(folder_or_dict)
        path = path / "config.json" if path.is_dir() else path
        hf_config, source = read_json(path), str(path)
    config = decoder_config(hf_config, source)
    surrounding = torch.get_default_device()
    if device is None and surrounding.type != "cpu":
        device = surrounding
    device = resolve_device(device)
    if bits is None:
        named = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        bits = 32 if named == torch.float32 or (named is None and device.type in ("cpu", "meta")) else 16
    dtype = resolve_dtype(bits, dtype, device)
    if bits == 4 and device.type == "meta":
        raise ValueError("bits=4 needs values to quantise, which the meta device has not; use 16 or 32 there")
    _make_current(device)

    model = Decoder(config, dtype=dtype, device="meta", bits=bits, hf_config=hf_config)
    for name, weight in dict(model.named_parameters()).items():
        fill = _initializer(model, name, config)
        place_weight(model, name, fill(torch.empty(weight.shape, dtype=dtype, device=device)))
    model.tie_weights()
    return model


def _make_current(device: torch.device) -> None:
    """Triton launches kernels on the process's current GPU, so that has to be the model's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_quantized(model: Decoder, name: str) -> bool:
    """Whether a weight is kept in NF4: with 4 bits those of the layers' linears.

    The embedding and the head never are, as in transformers with bitsandbytes.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return model.bits == 4 and attribute == "weight" and isinstance(module, Linear) and module is not model.lm_head


def place_weight(model: Decoder, name: str, weight: Tensor) -> None:
    """Put a weight where its checkpoint name says: quantised, or as it is, and then kept.

    Args:
        weight: on the final device, in the model's dtype.
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if is_quantized(model, name):
        assert isinstance(module, Linear)
        ops = nf4 if weight.is_cuda else nf4_eager
        module.set_nf4(ops.nf4_quantize(weight))
    else:
        setattr(module, attribute, nn.Parameter(weight, requires_grad=model.bits != 4))


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
    known = DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known is None or known not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if bits != 4 and torch.finfo(known).bits != bits:
        raise ValueError(f"dtype {str(known).removeprefix('torch.')} does not go with bits={bits}")
    return known


def resolve_max_seq_length(max_seq_length: int | None, config: DecoderConfig) -> int:
    """The longest document to expect. Raises: ValueError unless it lies in 1..max_position_embeddings."""
    if max_seq_length is None:
        return config.max_position_embeddings
    if not 1 <= max_seq_length <= config.max_position_embeddings:
        raise ValueError(
            f"max_seq_length must lie in 1..{config.max_position_embeddings} (the model's max_position_embeddings), "
            f"got {max_seq_length}"
        )
    return max_seq_length


def _initializer(model: Decoder, name: str, config: DecoderConfig) -> Callable[[Tensor], Tensor]:
    """How a weight starts: norms at one, biases at zero, the rest normal with the configured deviation."""
    path, _, attribute = name.rpartition(".")
    if isinstance(model.get_submodule(path), RMSNorm):
        return lambda weight: weight.fill_(1.0 - config.norm_weight_offset)
    if attribute == "bias":
        return lambda weight: weight.zero_()
    return lambda weight: weight.normal_(0.0, config.initializer_range)
