"""The adapter alone: PEFT's two files, the tokenizer and a model card, and nothing of the run that made it."""

import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.model_card import model_card, public_base, warn_of_scaled_rope
from slothcore.export.self_check import distance, sample_logits
from slothcore.lora.adapter_io import WEIGHTS_FILE, adapter_state, load_adapter, save_adapter
from slothcore.lora.attach import lora_config_of
from slothcore.models.checkpoint import save_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.load import DTYPES, load_model

# The same numbers on the same base; what is beyond rounding was written wrongly.
LARGEST_DISTANCE = {None: 1e-3, "float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}


def require(model: Decoder, dtype: str | None) -> None:
    """Raises: ValueError if the model has no adapter."""
    if lora_config_of(model) is None:
        raise ValueError("the model has no LoRA adapter; export it with the format merged, as a whole model")


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of the adapter's tensors."""
    tensors = adapter_state(model).values()
    return sum(tensor.numel() * (DTYPES[dtype].itemsize if dtype else tensor.element_size()) for tensor in tensors)


def write(model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None) -> None:
    """Fill the folder. Warns if the base is named by a folder of this machine, or needs its RoPE scaled."""
    save_adapter(model, folder)
    if dtype is not None:
        _cast(folder / WEIGHTS_FILE, DTYPES[dtype])
    if tokenizer is not None:
        tokenizer.save(folder)
    config = lora_config_of(model)
    assert config is not None
    if public_base(model) is None:
        warnings.warn(
            f"the adapter names its base as {config.base_model_name_or_path!r}, which no other machine finds; before "
            "you upload it, write the name on the Hub into base_model_name_or_path of adapter_config.json",
            stacklevel=2,
        )
    warn_of_scaled_rope(model)
    (folder / "README.md").write_text(model_card(model, "adapter"), encoding="utf-8")


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool) -> str:
    """Put what was written on the base, read once more, as anybody would."""
    expected = sample_logits(model).cpu()
    if model.folder is None:
        return "not read back: the base was not read from a folder"
    source, bits, compute, device = model.folder, model.bits, model.dtype, model.device
    if give_up:
        model.to("meta")
    base = load_model(source, bits=bits, dtype=compute, device=device, progress=False)
    # The angles that it was trained with, which PEFT's format has no field for.
    base.model.rotary_emb, base.model.rotary_emb_local = model.model.rotary_emb, model.model.rotary_emb_local
    load_adapter(base, folder)
    found = distance(sample_logits(base).cpu(), expected)
    if not found <= LARGEST_DISTANCE[dtype]:
        # Rounding what was taken out of a base in NF4 makes another base, for one.
        remedy = f"leave the dtype {dtype} out" if dtype in ("float16", "bfloat16") else "please report this"
        raise ValueError(
            f"the adapter that was written gives other logits than the model (distance {found:.3g}), so it was not "
            f"kept; {remedy}"
        )
    return "read back on its base: the same logits" + ("" if found == 0 else f" (distance {found:.1g})")


def _cast(file: Path, dtype: torch.dtype) -> None:
    """Write the tensors of a file anew in another dtype; what the file says beside them stays."""
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {name: opened.get_tensor(name).to(dtype) for name in opened.keys()}  # noqa: SIM118
    partial = file.with_suffix(".cast")
    save_tensors(tensors, partial, metadata=metadata)
    partial.replace(file)
