"""The reader of safetensors files: every byte in its place, never far ahead, one clear sentence for a damaged file."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slothcore.kernels import nf4
from slothcore.models import reading
from slothcore.models.reading import DTYPES, StoredTensor, read_bytes, read_header, read_tensors


def tensors_of_every_kind() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {"no dimension": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    tensors["vector"] = torch.randn(13, generator=generator)
    for i, dtype in enumerate(DTYPES.values()):
        values = torch.randint(0, 2 if dtype == torch.bool else 100, (3, 5 + i), generator=generator)
        tensors[f"matrix {i}"] = values.to(torch.float32).to(dtype)
    return tensors


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, StoredTensor]:
    """Two files, the later one by name written first."""
    tensors = tensors_of_every_kind()
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "b.safetensors", metadata={"format": "pt"})
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "a.safetensors")
    return read_header(tmp_path / "b.safetensors") | read_header(tmp_path / "a.safetensors")


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 2**20])
@pytest.mark.parametrize("under_way", [1, 2, 16])
def test_every_byte_in_its_place(
    shards: dict[str, StoredTensor], piece_bytes: int, under_way: int, nan_filled_empty, monkeypatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(reading, "PIECES_UNDER_WAY", under_way)
    assert_same(dict(read_tensors(shards, shards)), tensors_of_every_kind())


def test_a_file_is_read_as_safetensors_reads_it(shards: dict[str, StoredTensor]) -> None:
    file = shards["vector"].file
    assert_same(dict(read_tensors(shards, read_header(file))), load_file(file))


def test_the_disk_is_read_from_front_to_back(shards: dict[str, StoredTensor]) -> None:
    names = [name for name, _ in read_tensors(shards, reversed(list(shards)))]
    places = [(shards[name].file.name, shards[name].offset) for name in names]
    assert places == sorted(places)
    assert len(names) == len(shards)


def test_only_what_was_asked_for_is_read(shards: dict[str, StoredTensor]) -> None:
    assert [name for name, _ in read_tensors(shards, ["vector", "vector"])] == ["vector"]
    assert list(read_tensors(shards, [])) == []


def test_a_few_pieces_are_read_ahead_and_no_more(
    shards: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes read from disk less bytes handed out: the reader may be three pieces ahead, beside the tensor at hand."""
    read, lock, original = [0], threading.Lock(), reading._fill

    def counting(handle: int, piece: Any, *rest: Any) -> None:
        original(handle, piece, *rest)
        with lock:
            read[0] += piece.end - piece.begin

    monkeypatch.setattr(reading, "_fill", counting)
    monkeypatch.setattr(reading, "PIECE_BYTES", 8)
    monkeypatch.setattr(reading, "PIECES_UNDER_WAY", 3)
    handed_out = 0
    for _, tensor in read_tensors(shards, shards):
        handed_out += tensor.nbytes
        assert read[0] - handed_out <= 3 * 8
    assert read[0] == handed_out == sum(tensor.nbytes for tensor in shards.values())


def test_stopping_early_leaves_no_thread_and_no_open_file(
    shards: dict[str, StoredTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, closed = [], []
    original_open, original_close = reading.os.open, reading.os.close
    monkeypatch.setattr(reading.os, "open", lambda *a: opened.append(original_open(*a)) or opened[-1])
    monkeypatch.setattr(reading.os, "close", lambda handle: closed.append(handle) or original_close(handle))
    tensors = read_tensors(shards, shards)
    next(tensors)
    tensors.close()
    assert opened
    assert sorted(opened) == sorted(closed)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_a_stretch_of_a_tensor_is_read_like_one_of_its_own(tmp_path: Path) -> None:
    stack = torch.randn(3, 4, 5)
    save_file({"stack": stack}, tmp_path / "x.safetensors")
    whole = read_header(tmp_path / "x.safetensors")["stack"]
    part = StoredTensor(whole.file, (4, 5), "F32", whole.offset + 80, 80)
    assert torch.equal(dict(read_tensors({"part": part}, ["part"]))["part"], stack[1])
    assert read_bytes(part) == stack[1].numpy().tobytes()


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("progress", [True, False])
def test_the_bar_is_for_terminals(
    shards: dict[str, StoredTensor],
    progress: bool,
    is_terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    assert len(list(read_tensors(shards, shards, progress=progress))) == len(shards)
    shown = capsys.readouterr().err
    assert ("100%" in shown and "B/s" in shown) == (progress and is_terminal)
    assert (shown == "") == (not (progress and is_terminal))


def test_a_file_that_shrinks_after_its_header_was_read(shards: dict[str, StoredTensor]) -> None:
    file = shards["vector"].file
    file.write_bytes(file.read_bytes()[: shards["vector"].offset + 3])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated or damaged \(it ends at byte \d+\)"):
        list(read_tensors(shards, ["vector"]))
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is truncated or damaged"):
        list(read_tensors(shards, ["vector"]))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.safetensors is missing"):
        read_header(tmp_path / "nothing.safetensors")


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])


WRONG_HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no offsets": (lambda h: h["x"].pop("data_offsets"), "does not describe x"),
    "one offset": (lambda h: h["x"].update(data_offsets=[0]), "does not describe x"),
    "negative": (lambda h: h["x"].update(data_offsets=[-4, 20]), "describes x wrongly"),
    "no number": (lambda h: h["x"].update(shape=[2, "3"]), "describes x wrongly"),
    "a truth value": (lambda h: h["x"].update(shape=[True, 6]), "describes x wrongly"),
    "too large": (lambda h: h["x"].update(shape=[2, 4]), "x has 24 bytes, which do not fit F32"),
    "gap": (lambda h: h["y"].update(data_offsets=[25, 29]), "y begins at byte"),
    "overlap": (lambda h: h["y"].update(data_offsets=[20, 24]), "y begins at byte"),
    "beyond the end": (lambda h: h["y"].update(data_offsets=[24, 32], shape=[2]), "its header describes"),
    "bytes left over": (lambda h: h.pop("y"), "its header describes"),
}


@pytest.mark.parametrize("kind", WRONG_HEADERS)
def test_headers_that_do_not_describe_the_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(2, 3), "y": torch.randn(1)}, file)
    change, reason = WRONG_HEADERS[kind]
    rewrite_header(file, change)
    with pytest.raises(ValueError, match=rf"x\.safetensors is truncated or damaged \(.*{reason}.*download or copy it"):
        read_header(file)


def test_a_header_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]")
    with pytest.raises(ValueError, match="its header is no JSON object"):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.gpu
@pytest.mark.parametrize("piece_bytes", [7, 4096, 2**23])
def test_gpu_every_byte_in_its_place(
    shards: dict[str, StoredTensor], piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", piece_bytes)
    tensors = {name: tensor.cpu() for name, tensor in read_tensors(shards, shards, device="cuda")}
    assert_same(tensors, tensors_of_every_kind())


@pytest.mark.gpu
def test_gpu_is_never_waited_for(tmp_path: Path) -> None:
    """Reading and quantising 300 MB in pieces, each buffer used several times, without a synchronising call."""
    weights = {f"w{i}": torch.randn(4096, 1024 + 64 * i, dtype=torch.bfloat16) for i in range(30)}
    save_file(weights, tmp_path / "x.safetensors")
    nf4.nf4_quantize(weights["w0"].cuda())  # compiles
    stored = read_header(tmp_path / "x.safetensors")
    quantised = {}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name, tensor in read_tensors(stored, stored, device="cuda"):
            quantised[name] = nf4.nf4_quantize(tensor)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, weight in weights.items():
        expected = nf4.nf4_quantize(weight.cuda())
        assert torch.equal(quantised[name].packed, expected.packed), name
        assert torch.equal(quantised[name].absmax, expected.absmax), name
