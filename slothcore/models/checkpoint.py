"""Weights on disk: safetensors in a Hugging Face folder, read one tensor at a time and written one shard at a time."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slothcore.models.config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
STORED_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """Where a weight lies and what it is, read from headers alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, readable by whoever may read the user's other new files.

    safetensors itself leaves files that only their owner may read, and a shared model folder would stay closed.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every weight of a model folder by name.

    Raises: ValueError if the folder has no safetensors, or a shard is missing, damaged or lacks a weight.
    """
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
        files = {name: folder / file for name, file in weight_map.items()}
    elif (folder / SINGLE_FILE).is_file():
        files = dict.fromkeys(_names_in(folder / SINGLE_FILE), folder / SINGLE_FILE)
    else:
        pickled = any(folder.glob("pytorch_model*.bin"))
        hint = (
            "; its weights are pickled, which slothcore does not open: convert them to safetensors" if pickled else ""
        )
        raise ValueError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")

    found: dict[str, StoredTensor] = {}
    for file, names in _by_file(files).items():
        with _opened(file) as shard:
            present = set(shard.keys())
            for name in names:
                if name not in present:
                    raise ValueError(f"{INDEX_FILE} says that {file.name} holds {name}, but it does not")
                part = shard.get_slice(name)
                found[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
    return found


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


def read_tensors(stored: Mapping[str, StoredTensor], names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield weights on the CPU, shard by shard, each mapped from the file and not kept.

    A caller that drops a tensor before it asks for the next holds one at a time.
    Raises: ValueError, naming the file, if it is damaged.
    """
    for file, names_in_file in _by_file({name: stored[name].file for name in names}).items():
        with _opened(file) as shard:
            for name in names_in_file:
                yield name, shard.get_tensor(name)


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


def _by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    """Names grouped by file, files in the order of their names."""
    groups: dict[Path, list[str]] = {}
    for name, file in files.items():
        groups.setdefault(file, []).append(name)
    return dict(sorted(groups.items()))


def _names_in(file: Path) -> list[str]:
    with _opened(file) as shard:
        return list(shard.keys())


class _opened:
    """`safe_open` with messages that name the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> Any:
        try:
            self.handle = safe_open(self.file, framework="pt", device="cpu")
            return self.handle.__enter__()
        except FileNotFoundError:
            raise ValueError(f"{self.file} is missing, though {INDEX_FILE} names it") from None
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self.handle.__exit__(kind, error, trace)
        if isinstance(error, SafetensorError):
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.file} is truncated or damaged ({error}); download or copy it again")
