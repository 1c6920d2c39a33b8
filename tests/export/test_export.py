"""Exports: complete and checked, or not there, whatever happens to the disk or a single weight."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import slothcore
from slothcore.data.tokenizer import Tokenizer
from slothcore.export import merged
from slothcore.export.export import export_model
from slothcore.export.formats import FORMATS
from slothcore.export.self_check import sample_logits
from slothcore.models.load import load_model
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer
from tests.export.adapted_models import adapted
from tests.models.zoo import FAMILIES_TINY, Variant, saved, tiny_model

ZOO = [variants[0] for variants in FAMILIES_TINY.values()]


@pytest.mark.filterwarnings("ignore:.*belong to no text model", "ignore:.*adapter", "ignore:.*no tokenizer.json")
@pytest.mark.parametrize("variant", ZOO, ids=str)
@pytest.mark.parametrize("bits", [32, 4])
def test_every_family_is_written_and_read_back(variant: Variant, bits: int, tmp_path: Path) -> None:
    """The self-check goes by the files alone, and by every family's names, norms, ties and experts."""
    source = saved(tiny_model(variant), tmp_path / "base")
    model, _ = adapted(Path(source), bits=bits)
    for dtype in FORMATS["merged"].dtypes:
        said = export_model(model, None, tmp_path / dtype, dtype=dtype)
        assert said.startswith("read back: the same logits; rounding to")
    again = load_model(tmp_path / "float32", bits=32, device="cpu")
    torch.testing.assert_close(sample_logits(again), sample_logits(model), rtol=1e-3, atol=1e-3)
    said = export_model(model, None, tmp_path / "nf4", format="merged-4bit")
    assert said.startswith("read back: the same logits; quantising what was merged")
    assert export_model(model, None, tmp_path / "adapter", format="adapter").startswith(
        "read back on its base: the same logits"
    )


def test_merged_is_what_save_merged_writes(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer", config={"chat_template": CHATML}))
    model, _ = adapted(base)
    export_model(model, tokenizer, tmp_path / "exported")
    slothcore.save_merged(model, tokenizer, tmp_path / "saved")
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {file.name for file in (tmp_path / "exported").iterdir()} == names
    for name in names:
        assert (tmp_path / "exported" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("format", ["merged", "merged-4bit", "adapter"])
@pytest.mark.parametrize("damage", ["one number", "a name"])
@pytest.mark.filterwarnings("ignore:the adapter names its base")
def test_what_was_written_wrongly_is_not_kept(format, damage, base, tmp_path, monkeypatch) -> None:
    model, _ = adapted(base)
    writer = FORMATS[format].writer()
    write = writer.write

    def spoiling(model: Any, tokenizer: Any, folder: Path, dtype: str | None, **options: Any) -> None:
        write(model, tokenizer, folder, dtype, **options)
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith(("layers.1.mlp.up_proj.weight", "lora_B.weight")))
        if damage == "a name":
            tensors[f"{name}x"] = tensors.pop(name)
        else:
            # The least that a weight can be off by, in the merged model.
            row = tensors[name][3]
            row[-1] = row[-1] ^ 1 if format == "merged-4bit" else row[-1] * 1.02 if format == "merged" else 30.0
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(writer, "write", spoiling)
    with pytest.raises(
        ValueError, match=r"gives other logits than the model|lacks|must have \d+ bytes of codes, got 0"
    ):
        export_model(model, None, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_float16_cannot_hold(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, bits=32)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="are not finite in float16, so it was not kept; export it with --dtype bfl"):
        export_model(model, None, tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    export_model(model, None, tmp_path / "out", dtype="bfloat16")


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_that_diverged_is_not_exported(format: str, base: Path, tmp_path: Path) -> None:
    """No other dtype helps, and nobody has to report it."""
    if "gguf" in FORMATS[format].module or format == "ollama":
        pytest.importorskip("gguf")
    model, tokenizer = adapted(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"own logits are not finite, .*; take an earlier checkpoint"):
        export_model(model, tokenizer, tmp_path / "out", format=format)
    with pytest.raises(ValueError, match=r"own logits are not finite, .*; take an earlier checkpoint"):
        slothcore.save_merged(model, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_given_up_only_where_that_is_allowed(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    with pytest.warns(UserWarning, match="names its base"):
        export_model(model, None, tmp_path / "a", format="adapter")
    assert model.device.type == "cpu"
    with pytest.warns(UserWarning, match="names its base"):
        export_model(model, None, tmp_path / "b", format="adapter", give_up_model=True)
    assert model.device.type == "meta"


@pytest.mark.parametrize("format", FORMATS)
def test_too_little_room_is_said_before_anything_is_written(format, base, tmp_path, monkeypatch) -> None:
    model, _ = adapted(base)
    need = FORMATS[format].writer().size(model, FORMATS[format].default_dtype)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need + 2**20))
    with pytest.raises(ValueError, match=r"will take 0\.00 GiB, and 0\.00 GiB are free there; free some space, or"):
        export_model(model, None, tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the adapter names its base")
def test_the_size_is_that_of_the_files(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base, target_modules=["lm_head", "q_proj"])
    cases = [("merged", "bfloat16"), ("merged", "float32"), ("merged-4bit", "float16")]
    for format, dtype in (*cases, ("adapter", None), ("adapter", "float16")):
        folder = tmp_path / f"{format}-{dtype}"
        export_model(model, None, folder, format=format, dtype=dtype, check=False)
        (file,) = folder.glob("*.safetensors")
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert FORMATS[format].writer().size(model, dtype or FORMATS[format].default_dtype) == stored


def test_formats_are_checked_by_name(base: Path, tmp_path: Path) -> None:
    model, _ = adapted(base)
    with pytest.raises(ValueError, match=r"format must be one of merged, merged-4bit, adapter.*, got 'gif'"):
        export_model(model, None, tmp_path / "out", format="gif")
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32 for the format merged, got"):
        export_model(model, None, tmp_path / "out", dtype="int8")
    with pytest.raises(ValueError, match="base original is of no use to the format adapter, which does not fold"):
        export_model(model, None, tmp_path / "out", format="adapter", base="original")
    for name, function in (("gguf", slothcore.export_gguf), ("ollama", slothcore.export_ollama)):
        options = f"quantization must be one of q8_0, .*f32 for the format {name}, got 'q3_k'"
        with pytest.raises(ValueError, match=options):
            function(model, None, tmp_path / "out", quantization="q3_k")
    said = [export_model(model, None, tmp_path / name, dtype=name) for name in ("float16", "FLOAT16")]
    assert said[0] == said[1]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("float16", "FLOAT16")]
    assert files[0] == files[1]
    assert slothcore.export_model is export_model
    assert merged.require(model, "bfloat16") is None
