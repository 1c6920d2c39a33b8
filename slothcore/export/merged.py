"""A model with its adapter folded in, as a complete Hugging Face folder of 16-bit or 32-bit weights."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.merge import head_stays_tied, merged_state
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder

MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def save_merged(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write the folder `path`: weights, index, config, generation config and tokenizer, ready for any client.

    Each weight is made, rounded and written before the next, so host memory holds one shard. The folder is built under
    a temporary name beside `path`, and nothing appears under its final name before all of it is complete.

    Args:
        model: with or without an adapter; NF4 weights are decoded. It is not changed.
        tokenizer: its original files are copied; None: no tokenizer files.
        path: made if absent; a model that lies there is replaced.
        dtype: of every weight.
        max_shard_bytes: a shard holds at most this, or one weight.
    Raises: ValueError if the dtype is none of bfloat16, float16 and float32, or `path` is a file or holds an adapter.
    """
    if dtype not in MERGED_DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write the model into")
    if (folder / "adapter_config.json").exists():
        # Given both, transformers would load the adapter's base model and pass over the merged weights.
        raise ValueError(f"{folder} holds a LoRA adapter; give another folder to write the merged model into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        save_pretrained(
            merged_state(model, dtype),
            building,
            hf_config=merged_config(model),
            generation_config=model.generation_config,
            max_shard_bytes=max_shard_bytes,
        )
        if tokenizer is not None:
            tokenizer.save(building)
        _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def merged_config(model: Decoder) -> dict[str, Any]:
    """The original `config.json` without what described the quantised base, and true about the head."""
    config = {k: v for k, v in model.hf_config.items() if k not in ("quantization_config", "_name_or_path")}
    if model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = head_stays_tied(model)
    return config


def _put_in_place(building: Path, folder: Path) -> None:
    """Give the finished folder its name; in an existing folder, its files, then remove an older model's."""
    if not folder.exists():
        building.replace(folder)
        return
    names = {file.name for file in building.iterdir()}
    # config.json last, after the weights that it describes.
    for name in sorted(names, key=lambda name: name == "config.json"):
        (building / name).replace(folder / name)
    model_files = (
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
    )
    for pattern in model_files:
        for file in folder.glob(pattern):
            if file.name not in names:
                file.unlink()
