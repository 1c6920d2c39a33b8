"""Model folders: which weights one holds and whether they fit, and how one is written, a shard at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slothcore.models.families import Family
from slothcore.models.hf_config import read_json
from slothcore.models.reading import StoredTensor, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = ("F64", "F32", "F16", "BF16")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file, readable by whoever may read the user's other new files.

    Args:
        metadata: texts by name, for the header; None: what every reader of torch's tensors expects.

    safetensors itself leaves files that only their owner may read, and a shared model folder would stay closed.
    """
    path.touch()
    mode = path.stat().st_mode
    # One entry: safetensors writes several in an order that changes from run to run.
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else {"format": "pt"})
    path.chmod(mode)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every weight of a model folder by name; of a single file and an index the file counts, as in transformers.

    Raises: ValueError if the folder has no safetensors, or a shard is missing, damaged or lacks a weight.
    """
    if (folder / SINGLE_FILE).is_file():
        return read_header(folder / SINGLE_FILE)
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX_FILE} has no weight_map")
        for name, file in weight_map.items():
            # An index may come from anyone, and must not make us read files of other folders.
            if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
                raise ValueError(
                    f"{folder / INDEX_FILE}: {name} must lie in a .safetensors file of this folder, got {file!r}"
                )
        return _stored_in_shards(folder, weight_map)
    pickled = any(folder.glob("pytorch_model*.bin"))
    hint = "; its weights are pickled, which slothcore does not open: convert them to safetensors" if pickled else ""
    raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")


def _stored_in_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The weights that an index names, from the headers of its shards."""
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    found: dict[str, StoredTensor] = {}
    for file in sorted(names):
        if not (folder / file).is_file():
            raise ValueError(f"{folder / file} is missing, though {INDEX_FILE} names it; download or copy it")
        present = read_header(folder / file)
        for name in names[file]:
            if name not in present:
                raise ValueError(f"{INDEX_FILE} says that {file} holds {name}, but it does not")
            found[name] = present[name]
    return found


def names_in_model(stored: Mapping[str, StoredTensor], family: Family) -> tuple[dict[str, StoredTensor], int]:
    """A folder's weights under the names that the model gives them, and how many were left out.

    Raises: ValueError if two weights come to the same name.
    """
    named: dict[str, StoredTensor] = {}
    ignored = 0
    for name, weight in stored.items():
        if name.startswith(family.ignored_weights):
            ignored += 1
            continue
        prefixes = (pair for pair in family.weight_prefixes if name.startswith(pair[0]))
        on_disk, in_model = next(prefixes, ("", ""))
        new_name = in_model + name.removeprefix(on_disk)
        if new_name in named:
            raise ValueError(f"{weight.file}: {name} is a second weight for {new_name}")
        named[new_name] = weight
    return named, ignored


def check_against(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Compare names, shapes and dtypes of a folder with what a model needs, before anything is allocated.

    Raises: ValueError naming the first weight that is missing, unexpected, of another shape, or not floating point.
    """
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks the weight {name}")
        weight = stored[name]
        if weight.shape != shape:
            raise ValueError(
                f"{weight.file}: {name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}"
            )
        if weight.dtype not in STORED_DTYPES:
            raise ValueError(
                f"{weight.file}: {name} is stored as {weight.dtype}; slothcore reads {', '.join(STORED_DTYPES)}"
            )
    for name in stored:
        if name not in expected and not _is_ignorable(name, expected):
            raise ValueError(f"{stored[name].file} has a weight that this model has no place for: {name}")


def save_pretrained(
    state: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face model folder: weights, index if there are several shards, config.json.

    Weights are taken one at a time, so `state` may make each as it is asked for; at most one shard is held. Everything
    is written under temporary names first: if anything fails, the folder is what it was.

    Args:
        state: names and weights; a tied head is left out by the caller, as `Decoder.state_dict` does.
        folder: made if absent; an earlier model in it is replaced.
        hf_config: contents of config.json; its dtype is set to that of the first weight.
        generation_config: contents of generation_config.json, if not empty.
        max_shard_bytes: a shard holds at most this, or one weight.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary: dict[Path, str] = {}  # temporary file: final name
    weight_map: dict[str, int] = {}
    total_bytes = 0
    try:
        shards: list[Path] = []
        dtype: torch.dtype | None = None
        for names, tensors in _shards(state, max_shard_bytes):
            dtype = dtype or tensors[names[0]].dtype
            shards.append(folder / f".shard-{len(shards)}.{os.getpid()}.tmp")
            temporary[shards[-1]] = ""
            save_tensors(tensors, shards[-1])
            weight_map.update(dict.fromkeys(names, len(shards)))
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
            del tensors  # or this shard would be held while the next one is filled
        if not shards:
            raise ValueError("there are no weights to save")

        count = len(shards)
        final_names = [SINGLE_FILE] if count == 1 else [_shard_name(k, count) for k in range(1, count + 1)]
        temporary.update(zip(shards, final_names, strict=True))
        documents: dict[str, Mapping[str, Any]] = {}
        if count > 1:
            placed = {name: final_names[k - 1] for name, k in sorted(weight_map.items())}
            documents[INDEX_FILE] = {"metadata": {"total_size": total_bytes}, "weight_map": placed}
        if generation_config:
            documents["generation_config.json"] = generation_config
        documents["config.json"] = _with_dtype(hf_config, dtype)
        for name, values in documents.items():
            path = folder / f".{name}.{os.getpid()}.tmp"
            temporary[path] = name
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

        stale = [*folder.glob("model-*-of-*.safetensors"), folder / SINGLE_FILE, folder / INDEX_FILE]
        for path, name in temporary.items():
            os.replace(path, folder / name)
        for path in stale:
            if path.name not in temporary.values():
                path.unlink(missing_ok=True)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _shards(state: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
    """Group weights, in their order, into shards of at most `max_shard_bytes`."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in state:
        tensor = tensor.detach().to("cpu").contiguous()
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield list(shard), shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield list(shard), shard


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _with_dtype(hf_config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    values = dict(hf_config)
    # transformers 5 writes `dtype`, everything older `torch_dtype`, which 5 reads as well.
    values["dtype" if "dtype" in values else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return values


def _is_ignorable(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Old checkpoints store rotary frequencies, and some store a tied head beside the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (
        name == "lm_head.weight" and "model.embed_tokens.weight" in expected
    )
