"""`slothcore.load`: a model and its tokenizer, from a folder or from the Hugging Face Hub."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.locating import locate
from slothcore.lora.adapter_io import load_adapter
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model, resolve_device, resolve_dtype
from slothcore.training.run_folder import options_behind


def load(
    name_or_path: str | Path,
    *,
    adapter: str | Path | None = None,
    bits: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_length: int | None = None,
    rope_scaling: str | Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> tuple[Decoder, Tokenizer | None]:
    """Load a model and its tokenizer.

    An adapter is put on its base model, which its `adapter_config.json` names: on the Hub, by a path from where the
    program runs, or by one from the adapter's folder. It can be trained further. Its own tokenizer comes before the
    base's.

    Args:
        name_or_path: a Hub name such as "meta-llama/Llama-3.1-8B", or a folder; of a model, an adapter, or a run of
            slothcore, which stands for its result.
        adapter: what is put on the model `name_or_path`, to be trained further or used: an adapter's folder or Hub
            name, or a run.
        bits: 4 (NF4, the values of bitsandbytes with double quantisation), 16 or 32: how weights are kept; default:
            4, or of a run as it was trained.
        dtype: in which the model computes; default: float32 on a CPU with 4 or 32 bits, else bfloat16, or float16
            on a GPU that has no bfloat16; of a run whose bits are not given, too, as it was trained.
        device: default: the GPU if there is one. A GPU becomes torch's current one, where Triton's kernels run.
        max_seq_length: longest document to expect; default: the model's max_position_embeddings. Of a run's adapter,
            at least what it was trained with.
        rope_scaling: how positions beyond max_position_embeddings are reached: "linear" (the default), "dynamic",
            "yarn", "llama3", or a mapping as in config.json; of a run's adapter, default: as it was trained.
        revision: branch, tag or commit of the repository that the name stands for; of a local adapter's base, in
            place of the one in `adapter_config.json`.
        token: access token; default: the environment's HF_TOKEN, or what `hf auth login` stored; False: none.
        cache_dir: where snapshots are kept; default: huggingface_hub's cache (HF_HUB_CACHE, HF_HOME).
        local_files_only: use the cache and never the network, as with HF_HUB_OFFLINE=1.
        progress: show progress bars.
    Returns: the model in eval mode, and its tokenizer; None, with a warning, if no tokenizer.json is there.
    Raises: ValueError, in one sentence, for whatever is wrong with the name, the files or the options.
    """
    # Said before anything is downloaded.
    if not str(name_or_path).strip():
        raise ValueError("the name of the model is empty; give a folder, or a Hub name such as meta-llama/Llama-3.1-8B")
    if max_seq_length is not None and (type(max_seq_length) is not int or max_seq_length < 1):
        raise ValueError(f"max_seq_length must be a whole number of at least 1, got {max_seq_length!r}")
    if bits is None:
        trained = options_behind(adapter or name_or_path)
        bits, dtype = (trained.bits, dtype or trained.dtype) if trained else (4, dtype)
    resolve_dtype(bits, dtype, resolve_device(device))
    found = locate(
        name_or_path,
        adapter=adapter,
        max_seq_length=max_seq_length,
        rope_scaling=rope_scaling,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        progress=progress,
    )
    tokenizer = found.tokenizer()
    model = load_model(
        found.folder,
        bits=bits,
        dtype=dtype,
        device=device,
        max_seq_length=found.max_seq_length,
        rope_scaling=found.rope_scaling,
        progress=progress,
    )
    model.name_or_path = found.base
    model.revision = found.revision
    if found.adapter is not None:
        load_adapter(model, found.adapter).eval()
        # The base as it was found: the adapter may be saved where a path from its folder leads elsewhere.
        model.lora_config = replace(model.lora_config, base_model_name_or_path=found.base, revision=found.revision)
    if tokenizer is None:
        warnings.warn(f"{found.folder} has no tokenizer.json, so load returns None for the tokenizer", stacklevel=2)
    return model, tokenizer
