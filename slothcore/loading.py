"""`slothcore.load`: a model and its tokenizer, from a folder or from the Hugging Face Hub."""

import warnings
from pathlib import Path

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.models.decoder import Decoder
from slothcore.models.hub import model_folder
from slothcore.models.load import load_model, resolve_device, resolve_dtype


def load(
    name_or_path: str | Path,
    *,
    bits: int = 4,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    max_seq_length: int | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[Decoder, Tokenizer | None]:
    """Load a model and its tokenizer.

    Args:
        name_or_path: a Hugging Face folder, or a Hub name such as "meta-llama/Llama-3.1-8B".
        bits: 4 (NF4, the values of bitsandbytes with double quantisation), 16 or 32: how weights are kept.
        dtype: in which the model computes; default: float32 on a CPU with 4 or 32 bits, else bfloat16, or float16
            on a GPU that has no bfloat16.
        device: default: the GPU if there is one. A GPU becomes torch's current one, where Triton's kernels run.
        max_seq_length: longest document to expect; default: the model's max_position_embeddings.
        revision, token, cache_dir, local_files_only: as huggingface_hub has them.
    Returns: the model in eval mode, and its tokenizer; None, with a warning, if the folder has no tokenizer.json.
    Raises: ValueError, in one sentence, for whatever is wrong with the name, the files or the options.
    """
    # Said before anything is downloaded.
    resolve_dtype(bits, dtype, resolve_device(device))
    folder = model_folder(
        name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.from_folder(folder) if has_tokenizer else None
    model = load_model(folder, bits=bits, dtype=dtype, device=device, max_seq_length=max_seq_length)
    model.name_or_path = str(name_or_path)
    if tokenizer is None:
        warnings.warn(f"{folder} has no tokenizer.json, so load returns None for the tokenizer", stacklevel=2)
    return model, tokenizer
