"""`slothcore.load`: a model and its tokenizer, from a folder or from the Hugging Face Hub."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slothcore.data.tokenizer import Tokenizer
from slothcore.lora.adapter_io import adapter_weights, load_adapter
from slothcore.lora.config import LoraConfig
from slothcore.models.decoder import Decoder
from slothcore.models.hub import ADAPTER_CONFIG_FILE, CONFIG_FILE, model_folder
from slothcore.models.load import load_model, read_config, resolve_device, resolve_dtype
from slothcore.training.config import TrainConfig
from slothcore.training.run_folder import Source, find_source


def load(
    name_or_path: str | Path,
    *,
    bits: int = 4,
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
        bits: 4 (NF4, the values of bitsandbytes with double quantisation), 16 or 32: how weights are kept.
        dtype: in which the model computes; default: float32 on a CPU with 4 or 32 bits, else bfloat16, or float16
            on a GPU that has no bfloat16.
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
    resolve_dtype(bits, dtype, resolve_device(device))
    source = find_source(name_or_path)

    def check(folder: Path) -> None:
        """What the small files of a repository tell is said before the large ones are downloaded."""
        if (folder / ADAPTER_CONFIG_FILE).is_file():
            LoraConfig.from_folder(folder)
        else:
            read_config(folder, max_seq_length=max_seq_length, rope_scaling=rope_scaling)

    hub: dict[str, Any] = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "progress": progress,
        "check": check,
    }
    folder = model_folder(source.path, revision=revision, **hub)
    adapter = folder if (folder / ADAPTER_CONFIG_FILE).is_file() else None
    base, base_revision = source.path, revision
    if adapter is not None:
        base, base_revision = _base_of(adapter)
        runs = list(_runs_behind(source))
        # On the Hub `revision` has chosen the adapter's commit; a folder has none.
        if Path(source.path).expanduser().is_dir():
            of_the_run = next((run.revision for run in runs if run.model == base), None)
            base_revision = revision or base_revision or of_the_run
        # The factors fit the angles that they were trained with; a base that turns otherwise would be another model.
        lengths = [max_seq_length, *(run.max_seq_length for run in runs)]
        max_seq_length = max((length for length in lengths if length is not None), default=None)
        rope_scaling = rope_scaling or next((run.rope_scaling for run in runs if run.rope_scaling), None)
        folder = _base_folder(base, adapter_name=str(name_or_path), revision=base_revision, **hub)

    tokenizer = _tokenizer([folder] if adapter is None else [adapter, folder])
    model = load_model(
        folder,
        bits=bits,
        dtype=dtype,
        device=device,
        max_seq_length=max_seq_length,
        rope_scaling=rope_scaling,
        progress=progress,
    )
    model.name_or_path = base
    # A folder has no revisions.
    model.revision = None if Path(base).expanduser().is_dir() else base_revision
    if adapter is not None:
        load_adapter(model, adapter).eval()
        # The base as it was found: the adapter may be saved where a path from its folder leads elsewhere.
        model.lora_config = replace(model.lora_config, base_model_name_or_path=base, revision=model.revision)
    if tokenizer is None:
        warnings.warn(f"{folder} has no tokenizer.json, so load returns None for the tokenizer", stacklevel=2)
    return model, tokenizer


def _runs_behind(source: Source) -> Iterator[TrainConfig]:
    """The options of the run that an adapter came from, and of those whose adapters it went on with, newest first."""
    run = source.config
    while run is not None:
        yield run
        run = find_source(run.model).config if run.model else None


def _base_of(adapter: Path) -> tuple[str, str | None]:
    """The name or folder of an adapter's base model, and its revision, as `adapter_config.json` gives them.

    Raises: ValueError if it names none, or the adapter cannot be used in any case: said here, before a base is
        fetched for it.
    """
    config = LoraConfig.from_folder(adapter)
    adapter_weights(adapter)
    base = config.base_model_name_or_path
    if not (isinstance(base, str) and base):
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG_FILE} does not say its base model; fill in base_model_name_or_path, or load "
            "the base and call load_adapter"
        )
    beside = adapter / base
    if beside.is_dir() and not Path(base).expanduser().is_dir():
        base = str(beside)
    return base, config.revision


def _base_folder(base: str, *, adapter_name: str, **hub: Any) -> Path:
    """The folder of an adapter's base model. Raises: ValueError, naming both, if it is not to be had."""
    try:
        folder = model_folder(base, **hub)
    except ValueError as error:
        raise ValueError(f"the base model of the adapter {adapter_name} cannot be had: {error}") from None
    # A folder may well hold a model and an adapter for it.
    if (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"the adapter {adapter_name} was trained on {base}, which is an adapter itself; merge that into its base "
            "model with `slothcore merge`, and name the result in adapter_config.json"
        )
    return folder


def _tokenizer(folders: list[Path]) -> Tokenizer | None:
    """That of the first folder that has one."""
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_folder(folder)
    return None
