"""A model with its adapter folded in, as a complete Hugging Face folder of 16-bit or 32-bit weights, or in NF4."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slothcore.data.chat_rows import turn_end
from slothcore.data.tokenizer import Tokenizer
from slothcore.data.tokenizer_files import ADDITIONAL_TEMPLATES, TOKENIZER_FILES
from slothcore.export import nf4_state
from slothcore.export.new_folder import flush, folder_beside, place_of, require_room
from slothcore.export.self_check import (
    blockwise_logits,
    distance,
    folder_logits,
    original_logits,
    require_finite,
    sample_ids,
    sample_logits,
)
from slothcore.lora.folded import KEY as FOLDED_KEY
from slothcore.lora.folded import folded_in
from slothcore.lora.merge import Base, head_stays_tied, merged_outline, merged_state, require_base
from slothcore.models.checkpoint import LARGEST_SHARD, save_pretrained
from slothcore.models.decoder import Decoder
from slothcore.models.hub import CONFIG_FILE
from slothcore.models.load import DTYPES
from slothcore.models.writing import Outline, nbytes_of

MERGED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# How far 16-bit weights may move the logits; a few percent are usual, and what was written wrongly moves them by all.
LARGEST_DISTANCE = 0.25
# Four bits more, in a small model: what is measured of it is said.
LARGEST_DISTANCE_4BIT = 0.75
# What a model has in its folder beside config.json and its tokenizer.
MODEL_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
)


@dataclass(frozen=True)
class MergedAs:
    """What a merged model is written as.

    Attributes:
        dtype: of every weight that is not quantised.
        bits: 4, or None for dense weights.
        base: what an adapter is folded into, as in `merged_state`.
    """

    dtype: torch.dtype
    bits: int | None = None
    base: Base = "loaded"

    def outline(self, model: Decoder) -> Outline:
        """What the tensors in the folder will be."""
        if self.bits is None:
            return merged_outline(model, self.dtype)
        return nf4_state.quantized_outline(model, self.dtype, self.base)

    def state(self, model: Decoder) -> Iterator[tuple[str, Tensor]]:
        """These tensors, made one weight at a time."""
        if self.bits is None:
            return merged_state(model, self.dtype, self.base)
        return nf4_state.quantized_state(model, self.dtype, self.base)

    def weights(self, model: Decoder, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The weights that a reader finds in them, those in NF4 decoded to `dtype`."""
        if self.bits is None:
            return merged_state(model, self.dtype, self.base)
        return nf4_state.decoded_state(model, self.dtype, self.base, as_dtype=dtype)


def save_merged(
    model: Decoder,
    tokenizer: Tokenizer | None,
    path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bits: int | None = None,
    base: Base = "loaded",
    max_shard_bytes: int = LARGEST_SHARD,
    check: bool = True,
) -> str:
    """Write the folder `path`: weights, index, config, generation config and tokenizer, ready for any client.

    Each weight is made, rounded and written before the next, so host memory holds one. The folder is built under a
    temporary name beside `path`, and nothing appears under its final name before all of it is complete.

    With bits=4 the layers' linear maps are written as bitsandbytes stores NF4 with double quantisation, and
    transformers loads the folder as it is. Those without an adapter keep the bits that they have in the model; the
    others are merged first and quantised then, which loses what any quantising loses.

    Args:
        model: with or without an adapter; NF4 weights are decoded. It is not changed.
        tokenizer: its original files are copied; None: no tokenizer files.
        path: made if absent; a model that lies there is replaced, unless it is the one that was loaded.
        dtype: of every weight; with bits=4 of those that are not quantised, and in which others compute.
        bits: 4, or None for dense weights.
        base: what the adapter is folded into: "loaded", the weights that it was trained beside, NF4 ones as they
            decode; or "original", those of the model's folder before anything was quantised.
        max_shard_bytes: a shard holds at most this, or one weight.
        check: read back what was written, and compare logits.
    Returns: what the check found, in a few words.
    Raises: ValueError if the dtype is none of bfloat16, float16 and float32, `path` is a file, holds an adapter or
        the model that was loaded, the originals are not to be had, there is too little room, the model's logits are
        not finite, or what was written does not give them. OSError if the disk fails.
    """
    if dtype not in MERGED_DTYPES:
        raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
    if bits not in (None, 4):
        raise ValueError(f"bits must be 4, or None for dense weights, whose dtype says how many they have; got {bits}")
    require_base(model, base)
    folder = place_of(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write the model into")
    if os.path.ismount(folder):
        raise ValueError(f"{folder} is where a disk is mounted; give a folder in it to write the model into")
    if (folder / "adapter_config.json").exists():
        # Given both, transformers would load the adapter's base model and pass over the merged weights.
        raise ValueError(f"{folder} holds a LoRA adapter; give another folder to write the merged model into")
    if model.folder is not None and folder.exists() and model.folder.exists() and folder.samefile(model.folder):
        # The adapter would belong to a base that is gone, and be merged into it twice by whoever puts it on.
        raise ValueError(f"{folder} holds the model that was loaded; give another folder to write the merged one into")
    written_as = MergedAs(dtype, bits, base)
    require_room(folder, nbytes_of(written_as.outline(model)))
    require_finite(model)
    with folder_beside(folder) as building:
        write_model(model, tokenizer, building, written_as, max_shard_bytes=max_shard_bytes)
        found = compare(model, building, written_as) if check else "not read back"
        flush(building)
        _put_in_place(building, folder)
    return found


def require(model: Decoder, dtype: str | None, *, base: Base = "loaded") -> None:
    """Raises: ValueError if that base is not to be had."""
    require_base(model, base)


def size(model: Decoder, dtype: str | None) -> int:
    """Bytes of all weights as dense ones."""
    assert dtype is not None
    return nbytes_of(MergedAs(DTYPES[dtype]).outline(model))


def write(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: str | None, *, base: Base = "loaded"
) -> None:
    """Fill the folder."""
    assert dtype is not None
    write_model(model, tokenizer, folder, MergedAs(DTYPES[dtype], base=base))


def check(model: Decoder, folder: Path, dtype: str | None, *, give_up: bool, base: Base = "loaded") -> str:
    """Read the folder a block at a time; see `compare`."""
    assert dtype is not None
    return compare(model, folder, MergedAs(DTYPES[dtype], base=base))


def write_model(
    model: Decoder,
    tokenizer: Tokenizer | None,
    folder: Path,
    written_as: MergedAs,
    *,
    max_shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Fill a folder."""
    if tokenizer is not None:
        tokenizer.save(folder)  # which needs its own files, so that a loss of those is noticed at once
    config = merged_config(model)
    if written_as.bits is not None:
        config["quantization_config"] = nf4_state.quantization_config(model, written_as.dtype)
    save_pretrained(
        written_as.state(model),
        folder,
        hf_config=config,
        generation_config=_with_turn_end(model, tokenizer),
        max_shard_bytes=max_shard_bytes,
        outline=written_as.outline(model),
        progress="merging",
    )


def compare(model: Decoder, folder: Path, written_as: MergedAs) -> str:
    """Read the folder back.

    Its logits have to be those of the merged weights to the last bit; how far rounding them has moved these from the
    model's own, which computes with base and adapter apart, is said. With base "original" the model's own are those of
    its adapter on that.

    Returns: what was found, in a few words.
    Raises: ValueError if they are others.
    """
    dtype = written_as.dtype
    arithmetic = torch.promote_types(model.dtype, dtype)
    ids = sample_ids(model)
    written = folder_logits(folder, ids, dtype=arithmetic, device=model.device)
    weights = written_as.weights(model, arithmetic)
    meant = blockwise_logits(model.config, weights, ids, dtype=arithmetic, device=model.device)
    own = sample_logits(model) if written_as.base == "loaded" else original_logits(model, dtype=arithmetic)
    found, name = distance(meant, own), str(dtype).removeprefix("torch.")
    if written_as.bits is not None:
        what, limit = "quantising what was merged", LARGEST_DISTANCE_4BIT
    else:
        # Where all is float32, nothing but the order of sums differs.
        is_exact = model.dtype == dtype == torch.float32
        what, limit = f"rounding to {name}", 1e-3 if is_exact else LARGEST_DISTANCE
    if not meant.isfinite().all():
        raise ValueError(
            f"the merged model's logits are not finite in {name}, so it was not kept; export it with --dtype bfloat16"
        )
    if not torch.equal(written, meant) or not found <= limit:
        raise ValueError(
            f"what was written gives other logits than the model (distance {distance(written, own):.3g}), so it was "
            "not kept; please report this"
        )
    return f"read back: the same logits; {what} moved them by {found:.1%} of their spread"


def merged_config(model: Decoder) -> dict[str, Any]:
    """The original `config.json` without what described the quantised base, and true about the head."""
    config = {k: v for k, v in model.hf_config.items() if k not in ("quantization_config", "_name_or_path")}
    if model.config.tie_word_embeddings:
        config["tie_word_embeddings"] = head_stays_tied(model)
    if adapters := folded_in(model):
        config[FOLDED_KEY] = adapters
    return config


def _with_turn_end(model: Decoder, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`generation_config.json`, with the token that ends an answer by the chat template among those that end a text.

    A base model that has learned conversations has files that do not name it, and others would write on behind it.
    """
    ends, end = model.eos_token_ids, None if tokenizer is None else turn_end(tokenizer)
    if not isinstance(end, int) or end in ends or end >= model.config.vocab_size:
        return model.generation_config
    # Where there was no such file, readers took these from config.json.
    others = {"bos_token_id": model.config.bos_token_id, "pad_token_id": model.config.pad_token_id}
    before = model.generation_config or {name: token for name, token in others.items() if token is not None}
    return {**before, "eos_token_id": [*ends, end]}


def _put_in_place(building: Path, folder: Path) -> None:
    """Give the finished folder its name; where a folder has it, its files take the place of an older model's there."""
    if not folder.exists():
        building.replace(folder)
        return
    names = {file.relative_to(building) for file in building.rglob("*") if file.is_file()}
    # Without it the folder is no model, whatever happens before the last file has moved.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    brings_tokenizer = (building / TOKENIZER_FILES[0]).is_file()
    # A chat template of the older model's would be taken for this one's.
    older = (*MODEL_FILES, *TOKENIZER_FILES, f"{ADDITIONAL_TEMPLATES}/*.jinja") if brings_tokenizer else MODEL_FILES
    for pattern in older:
        for file in folder.glob(pattern):
            if file.relative_to(folder) not in names:
                file.unlink()
    for name in sorted(names, key=lambda name: name == Path(CONFIG_FILE)):
        (folder / name).parent.mkdir(exist_ok=True)
        (building / name).replace(folder / name)
