"""Files written piece by piece: equal to safetensors' own, with every failure passed on."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slothcore.models import writing
from slothcore.models.checkpoint import save_pretrained
from slothcore.models.reading import DTYPES, read_header
from slothcore.models.writing import PieceWriter, TensorFile, nbytes_of, outline_of


def tensors() -> dict[str, Tensor]:
    """Of every dtype and several shapes, under names in no order."""
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{letter}.{str(dtype)[6:]}": torch.randint(0, 2, (3, index + 1), generator=generator).to(dtype)
        for letter in "ba"
        for index, dtype in enumerate(DTYPES.values())
    }
    found |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), 'na"me \\ \u00e9': torch.ones(5)}
    found["strided"] = torch.arange(12.0).view(3, 4).T
    return found


def write(path: Path, given: dict[str, Tensor], order: list[str], **options: Any) -> None:
    file = TensorFile(path, outline_of(given.items()), **options)
    try:
        with PieceWriter() as writer:
            for name in order:
                file.put(name, given[name], writer)
    finally:
        file.close()


@pytest.mark.parametrize("metadata", [None, {"key": "a text"}])
@pytest.mark.parametrize("piece_bytes", [7, 2**23])
def test_the_bytes_are_those_of_safetensors(piece_bytes, metadata, tmp_path, monkeypatch) -> None:
    """In whatever order the tensors come, and however many pieces they are."""
    monkeypatch.setattr(writing, "PIECE_BYTES", piece_bytes)
    given = tensors()
    contiguous = {name: tensor.contiguous() for name, tensor in given.items()}
    save_file(contiguous, tmp_path / "theirs", metadata=metadata or {"format": "pt"})
    for order in (list(given), list(reversed(given))):
        write(tmp_path / "ours", given, order, metadata=metadata)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(stored.nbytes for stored in read_header(tmp_path / "ours").values()) == nbytes_of(
        outline_of(given.items())
    )


def test_others_may_read_the_file(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        write(tmp_path / "file", {"a": torch.ones(2)}, ["a"])
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_full_disk_is_said_to_the_caller(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if nothing follows the piece that failed, and though another thread wrote it."""
    given = {f"{i}": torch.full((4,), float(i)) for i in range(after + 1)}
    pwrite = os.pwrite

    def refuse(handle: int, data: memoryview, position: int) -> int:
        if len(data) == 16:  # a tensor, and not the header
            raise OSError(28, "No space left on device")
        return pwrite(handle, data, position)

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", given, list(given))


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, position: pwrite(handle, data[:3], position))
    write(tmp_path / "file", {"a": torch.arange(10.0)}, ["a"])
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.arange(10.0))


def test_what_differs_from_the_outline_is_refused(tmp_path: Path) -> None:
    outline = {"a": (torch.float32, (2,))}
    for name, tensor in (("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half())):
        file = TensorFile(tmp_path / "file", outline)
        with pytest.raises(ValueError, match=f"^{name} was to be written as"), PieceWriter() as writer:
            file.put(name, tensor, writer)
        file.close()
    for state, message in (
        ([], "a is missing among the weights to write"),
        ([("a", torch.ones(2)), ("b", torch.ones(2))], "b was not expected among the weights to write"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "a was to be written as .* once"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(state, tmp_path / "folder", hf_config={}, outline=outline)
        assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.gpu
def test_from_a_gpu(tmp_path: Path) -> None:
    """More pieces than the ring has buffers, none of which may be overwritten before it is on the disk."""
    generator = torch.Generator("cuda").manual_seed(0)
    given = {f"{i}": torch.randn(3_000_000, device="cuda", generator=generator) for i in range(40)}
    expected = {name: tensor.cpu() for name, tensor in given.items()}
    file = TensorFile(tmp_path / "file", outline_of(given.items()))
    with PieceWriter() as writer:
        for name in list(given):
            tensor = given.pop(name)
            file.put(name, tensor, writer)
            # Its memory is used again at once, behind the copies that are under way.
            del tensor
            torch.zeros(3_000_000, device="cuda")
    file.close()
    written = load_file(tmp_path / "file")
    assert all(torch.equal(written[name], expected[name]) for name in expected)
