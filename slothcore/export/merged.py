"""A model with its adapter folded in, as a complete Hugging Face folder of 16-bit or 32-bit weights."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.export.self_check import blockwise_logits, distance, folder_logits, sample_ids, sample_logits
from slothcore.lora.merge import head_stays_tied, merged_state
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.load import DTYPES

MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_SHARD = 5 * 10**9
# How far 16-bit weights may move the logits; a few percent are usual, and what was written wrongly moves them by all.
LARGEST_DISTANCE = 0.25


def save_merged(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_shard_bytes: int = LARGEST_SHARD,
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
        _write(model, tokenizer, building, dtype, max_shard_bytes=max_shard_bytes)
        _put_in_place(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def require(model: Decoder, dtype: str | None) -> None:
    """Every model can be written so."""


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of all weights as dense ones."""
    assert dtype is not None
    weights = Decoder(model.config, device="meta").state_dict()
    count = sum(weight.numel() for weight in weights.values())
    if model.config.tie_word_embeddings and not head_stays_tied(model):
        count += model.config.vocab_size * model.config.hidden_size
    return count * DTYPES[dtype].itemsize


def write(model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None) -> None:
    """Fill the folder."""
    assert dtype is not None
    _write(model, tokenizer, folder, DTYPES[dtype])


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool) -> str:
    """Read the folder a block at a time.

    Its logits have to be those of the merged weights to the last bit; how far rounding them has moved these from the
    model's own, which computes with base and adapter apart, is said.
    """
    assert dtype is not None
    arithmetic = torch.promote_types(model.dtype, DTYPES[dtype])
    ids = sample_ids(model)
    written = folder_logits(folder, ids, dtype=arithmetic, device=model.device)
    meant = blockwise_logits(
        model.config, merged_state(model, DTYPES[dtype]), ids, dtype=arithmetic, device=model.device
    )
    own = sample_logits(model)
    # Where all is float32, nothing but the order of sums differs.
    limit = 1e-3 if model.dtype == DTYPES[dtype] == torch.float32 else LARGEST_DISTANCE
    found = distance(meant, own)
    if not meant.isfinite().all():
        raise ValueError(
            f"the merged model's logits are not finite in {dtype}, so it was not kept; export it with --dtype bfloat16"
        )
    if not torch.equal(written, meant) or not found <= limit:
        raise ValueError(
            f"what was written gives other logits than the model (distance {distance(written, own):.3g}), so it was "
            "not kept; please report this"
        )
    return f"read back: the same logits; rounding to {dtype} moved them by {found:.1%} of their spread"


def _write(
    model: Decoder,
    tokenizer: Tokenizer | None,
    folder: Path,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = LARGEST_SHARD,
) -> None:
    save_pretrained(
        merged_state(model, dtype),
        folder,
        hf_config=merged_config(model),
        generation_config=model.generation_config,
        max_shard_bytes=max_shard_bytes,
    )
    if tokenizer is not None:
        tokenizer.save(folder)


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
