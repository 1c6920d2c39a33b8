"""Model folders: which weights one holds and whether they fit, and how one is written, a shard at a time."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from slothcore.models.families import Family
from slothcore.models.hf_config import read_json
from slothcore.models.reading import DTYPES, StoredTensor, read_bytes, read_header
from slothcore.models.writing import Outline, PieceWriter, TensorFile, nbytes_of, outline_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_SHARD = 5 * 10**9
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
# Numbers of each of two weights that are in memory to be compared.
COMPARED_AT_ONCE = 2**21


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
            raise ValueError(f"{folder} lacks the weight {name}{_instead(name, stored)}")
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


def _instead(name: str, stored: Mapping[str, StoredTensor]) -> str:
    """What to do about a missing weight, if a folder has one like it under another beginning."""
    ending = name.removeprefix("model.")
    like_it = [other for other in stored if f".{other}".endswith(f".{ending}")]
    if not like_it:
        return ""
    return (
        f" and has {like_it[0]}, which is no name that transformers' AutoModelForCausalLM saves, but of a part of a "
        "model or of a model inside something else; use a folder of the whole model, saved by that class"
    )


def require_same_head(stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if a head that a model does not ask for has other values than the embedding that is its head.

    Such files come from programs that trained the head of a tied model and left config.json as it was. Some readers
    take the embedding then, others the head. Quantised ones are not compared.
    """
    head, embedding = (stored.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is None or embedding is None or "lm_head.weight" in expected:
        return
    if {head.dtype, embedding.dtype} <= set(STORED_DTYPES) and not _have_same_values(head, embedding):
        raise ValueError(
            f"{head.file}: lm_head.weight has other values than model.embed_tokens.weight, though tie_word_embeddings "
            "says that they are one weight; if that head is meant, set tie_word_embeddings to false in config.json, "
            "else remove it from the file"
        )


def _have_same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Compare two weights a piece at a time."""
    if first.shape != second.shape:
        return False
    for begin in range(0, prod(first.shape), COMPARED_AT_ONCE):
        pieces = []
        for weight in (first, second):
            dtype = DTYPES[weight.dtype]
            count = min(COMPARED_AT_ONCE, prod(weight.shape) - begin)
            offset, nbytes = weight.offset + begin * dtype.itemsize, count * dtype.itemsize
            data = bytearray(read_bytes(replace(weight, offset=offset, nbytes=nbytes)))
            pieces.append(torch.frombuffer(data, dtype=dtype))
        if not torch.equal(pieces[0].double(), pieces[1].double()):
            return False
    return True


def save_pretrained(
    state: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    hf_config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = LARGEST_SHARD,
    outline: Outline | None = None,
    progress: str | None = None,
) -> None:
    """Write a Hugging Face model folder: weights, index if there are several shards, config.json.

    With `outline` weights are taken one at a time and go to their places at once, so `state` may make each as it is
    asked for. Everything is written under temporary names first: if anything fails, the folder is what it was.

    Args:
        state: names and weights; a tied head is left out by the caller, as `Decoder.state_dict` does.
        folder: made if absent; an earlier model in it is replaced.
        hf_config: contents of config.json; its dtype is set to that of the first weight, and programs that it names
            beside the model it came from (`auto_map`) are left out.
        generation_config: contents of generation_config.json, if not empty.
        max_shard_bytes: a shard holds at most this, or one weight.
        outline: what `state` will give, which need not keep its order; None: that is seen from the weights, all of
            which then have to be there at once.
        progress: name of a bar of the bytes written, shown if standard error is a terminal; None: no bar.
    Raises: ValueError if there are no weights, or others than the outline says. OSError if the disk fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary: dict[Path, str] = {}  # temporary file: final name
    try:
        if outline is None:
            state = list(state)
            outline = outline_of(state)
        if not outline:
            raise ValueError("there are no weights to save")
        shards = _shards(outline, max_shard_bytes)
        names = [SINGLE_FILE] if len(shards) == 1 else [_shard_name(k + 1, len(shards)) for k in range(len(shards))]
        paths = [folder / f".shard-{k}.{os.getpid()}.tmp" for k in range(len(shards))]
        temporary.update(zip(paths, names, strict=True))
        _write_shards(state, dict(zip(paths, shards, strict=True)), progress)

        documents: dict[str, Mapping[str, Any]] = {}
        if len(shards) > 1:
            placed = {weight: file for file, shard in zip(names, shards, strict=True) for weight in shard}
            size = {"total_size": nbytes_of(outline)}
            documents[INDEX_FILE] = {"metadata": size, "weight_map": dict(sorted(placed.items()))}
        if generation_config:
            documents["generation_config.json"] = generation_config
        documents["config.json"] = _as_written(hf_config, next(iter(outline.values()))[0])
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


def _write_shards(state: Iterable[tuple[str, Tensor]], shards: Mapping[Path, Outline], progress: str | None) -> None:
    """Put each weight into its file. Raises: ValueError if one is missing at the end, or was not expected."""
    total = sum(map(nbytes_of, shards.values()))
    with ExitStack() as stack:
        bar = tqdm(total=total, desc=progress, unit="B", unit_scale=True, disable=None if progress else True)
        stack.callback(bar.close)
        files = []
        for path, shard in shards.items():
            files.append(TensorFile(path, shard))
            stack.callback(files[-1].close)
        file_of = {name: file for file, shard in zip(files, shards.values(), strict=True) for name in shard}
        writer = stack.enter_context(PieceWriter())
        for name, tensor in state:
            if name not in file_of:
                raise ValueError(f"{name} was not expected among the weights to write")
            file_of[name].put(name, tensor, writer)
            bar.update(tensor.nbytes)
            del tensor  # or it would live on while the next one is made
        missing = sorted(name for file in files for name in file.missing)
        if missing:
            raise ValueError(f"{missing[0]} is missing among the weights to write")


def _shards(outline: Outline, max_shard_bytes: int) -> Sequence[Outline]:
    """Group weights, in their order, into shards of at most `max_shard_bytes`."""
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = []
    room = 0
    for name, what in outline.items():
        size = nbytes_of({name: what})
        if not shards or size > room:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = what
        room -= size
    return shards


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _as_written(hf_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    # Whoever asks transformers to trust remote code would look for those programs in this folder, and fail.
    values = {key: value for key, value in hf_config.items() if key != "auto_map"}
    # transformers 5 writes `dtype`, everything older `torch_dtype`, which 5 reads as well.
    names = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    return values | dict.fromkeys(names, str(dtype).removeprefix("torch."))


def _is_ignorable(name: str, expected: Mapping[str, tuple[int, ...]]) -> bool:
    """Old checkpoints store rotary frequencies, and some store a tied head beside the embedding."""
    return name.endswith("rotary_emb.inv_freq") or (
        name == "lm_head.weight" and "model.embed_tokens.weight" in expected
    )
