"""A GGUF file: keys with values, then tensors, each at a place that its head names.

The head is written by the package gguf. The tensors' parts come in any order, and only one is in memory.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slothcore.export.gguf_types import Kind, tensor_bytes

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Value = int | float | bool | str | list[int] | list[float] | list[str] | list[bool]
ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its name, kind of numbers, and shape, the length of a row last."""

    name: str
    kind: Kind
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return tensor_bytes(self.kind, self.shape)


def require_library() -> None:
    """Raises: ValueError if the package gguf is missing."""
    if find_spec("gguf") is None:
        raise ValueError("GGUF files are written by the package gguf; install it with: pip install 'slothcore[gguf]'")


def write_file(
    file: Path,
    architecture: str,
    values: dict[str, Value],
    entries: Sequence[Entry],
    parts: Iterable[tuple[str, int, np.ndarray]],
) -> None:
    """Write a GGUF file.

    Args:
        architecture: llama.cpp's name of it.
        values: the keys.
        parts: name of a tensor, which of its equal parts along the first axis, and the bytes; all of all tensors.
    """
    places = _write_head(file, architecture, values, entries)
    total = sum(entry.nbytes for entry in entries)
    with file.open("r+b") as opened, tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=None) as bar:
        opened.truncate(max((places[entry.name] + _padded(entry.nbytes) for entry in entries), default=0))
        for name, index, packed in parts:
            opened.seek(places[name] + index * packed.nbytes)
            opened.write(np.ascontiguousarray(packed).data)
            bar.update(packed.nbytes)


def read_file(file: Path, names: Iterable[str]) -> "dict[str, StoredTensor]":
    """The tensors of a file, mapped into memory.

    Raises: ValueError if they are not those of these names.
    """
    from gguf import GGUFReader

    stored = {str(tensor.name): StoredTensor(tensor.data, tensor.tensor_type) for tensor in GGUFReader(file).tensors}
    wrong = sorted(stored.keys() ^ set(names))
    if wrong:
        raise ValueError(f"{file.name} lacks {wrong[0]}, or has it without need; please report this")
    return stored


class StoredTensor:
    """A tensor in a file."""

    def __init__(self, data: np.ndarray, kind: "GGMLQuantizationType") -> None:
        self._data, self._kind = data, kind

    def numbers(self, shape: Sequence[int], index: int | None = None) -> Tensor:
        """What it decodes to, or one part of it along the first axis, float32 of this shape."""
        from gguf import dequantize

        data = self._data if index is None else self._data[index]
        # float32 itself is a window into the file, which torch must not write to.
        values = np.require(dequantize(data, self._kind), np.float32, ["C", "W"])
        return torch.from_numpy(values).reshape(tuple(shape))


def _write_head(file: Path, architecture: str, values: dict[str, Value], entries: Sequence[Entry]) -> dict[str, int]:
    """Everything but the numbers. Returns: where those of each tensor begin."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, architecture)
    try:
        for key, value in values.items():
            _add(writer, key, value)
        for entry in entries:
            kind = GGMLQuantizationType[entry.kind]
            # With bytes as their type the writer would take the shape for that of the bytes.
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    places, place = {}, _padded(file.stat().st_size)
    for entry in entries:
        places[entry.name] = place
        place += _padded(entry.nbytes)
    return places


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _add(writer: "GGUFWriter", key: str, value: Value) -> None:
    """One key, in the type of the value; whole numbers have 32 bits, with a sign where they need one."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int() if value < 0:
            writer.add_int32(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
