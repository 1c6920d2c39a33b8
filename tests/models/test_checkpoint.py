"""Model folders, written and read: shards, atomic replacement, and one clear sentence for each kind of damage."""

import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slothcore.models.load as loading
from slothcore.models import checkpoint
from slothcore.models.checkpoint import save_pretrained, stored_tensors
from slothcore.models.decoder import Decoder
from slothcore.models.families import FAMILIES
from slothcore.models.load import load_model
from tests.models.tiny import VARIANTS, saved, tiny_llama, token_ids


def load(folder: Path, **options: Any) -> Decoder:
    return load_model(folder, **{"bits": 32, "device": "cpu", **options})


def assert_same_weights(actual: Decoder, expected: Decoder) -> None:
    left, right = actual.state_dict(), expected.state_dict()
    assert left.keys() == right.keys()
    for name, weight in right.items():
        assert torch.equal(left[name], weight), name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "model")


def edit(folder: Path, change: Any) -> None:
    """Rewrite the single weights file through `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Reading


def test_shards_of_transformers(tmp_path: Path) -> None:
    reference = tiny_llama()
    whole = load(saved(reference, tmp_path / "whole"))
    sharded = saved(reference, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    assert_same_weights(load(sharded), whole)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_stored_weight_is_dropped_before_the_next(folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read as float32 must be gone, once it is bfloat16 or NF4, before the next weight is handed out."""
    original, alive, most_alive = loading.read_tensors, set(), []

    def watching(*args: Any, **options: Any) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in original(*args, **options):
            alive.add(name)
            weakref.finalize(tensor, alive.discard, name)
            most_alive.append(len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(loading, "read_tensors", watching)
    load(folder, bits=bits, dtype=torch.bfloat16)
    assert most_alive == [1] * 21


def test_weights_are_no_window_into_the_file(folder: Path) -> None:
    model = load(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(100)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    for weight in model.parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_rotary_buffers_and_a_stored_tied_head_are_passed_over(tmp_path: Path) -> None:
    folder = saved(tiny_llama(tie_word_embeddings=True), tmp_path)
    expected = load(folder)

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(folder, add)
    assert_same_weights(load(folder), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [0, 96])
def test_a_stored_head_that_is_not_the_tied_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, row: int
) -> None:
    """transformers 5 would take the head, 4 the embedding."""
    monkeypatch.setattr(checkpoint, "COMPARED_AT_ONCE", 500)
    folder = saved(tiny_llama(tie_word_embeddings=True), tmp_path)

    def add(tensors: dict[str, Tensor], change: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].to(dtype, copy=True)
        tensors["lm_head.weight"][row, -1] += change

    edit(folder, partial(add, change=0.0))
    load(folder)
    edit(folder, partial(add, change=0.1))
    with pytest.raises(ValueError, match=r"lm_head.weight has other values .* set tie_word_embeddings to false in"):
        load(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": False}))
    model = load(folder)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_sources_of_every_float_dtype_even_mixed(folder: Path, bits: int) -> None:
    """Each weight goes from its own dtype to the model's in one rounding."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    expected: dict[str, Tensor] = {}

    def mix(tensors: dict[str, Tensor]) -> None:
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to(dtypes[i % 4])
            expected[name] = tensors[name]

    edit(folder, mix)
    model = load(folder, bits=bits, dtype=None)
    for name, weight in expected.items():
        if loading.is_quantized(model, name):
            path = name.removesuffix(".weight")
            wanted = loading.nf4_eager.nf4_quantize(weight.to(model.dtype))
            assert torch.equal(model.get_submodule(path).base_weight().packed, wanted.packed), name
        else:
            assert torch.equal(model.state_dict()[name], weight.to(model.dtype)), name


def prefixed(folder: Path, prefix: Callable[[str], str], extra: dict[str, Tensor] | None = None) -> None:
    """Rename every stored weight, and add others."""

    def rename(tensors: dict[str, Tensor]) -> None:
        renamed = {prefix(name): tensor for name, tensor in tensors.items()} | (extra or {})
        tensors.clear()
        tensors.update(renamed)

    edit(folder, rename)


MULTIMODAL = replace(
    FAMILIES["llama"],
    weight_prefixes=(("text.model.", "model."), ("text.", "")),
    ignored_weights=("vision.", "projector."),
)


def test_prefixes_of_a_multimodal_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", MULTIMODAL)
    plain = load(folder)
    extra = {"vision.layer.weight": torch.ones(3, 3), "projector.bias": torch.ones(2, dtype=torch.int8)}
    prefixed(folder, lambda name: f"text.{name}", extra)
    with pytest.warns(UserWarning, match="2 weights that belong to no text model were not loaded"):
        actual = load(folder)
    assert_same_weights(actual, plain)


def test_two_weights_of_one_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", MULTIMODAL)
    prefixed(folder, lambda name: name, {"text.model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"is a second weight for model\.norm\.weight"):
        load(folder)


def test_an_untied_head_must_be_on_disk(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks the weight lm_head\.weight"):
        load(folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the folder .*nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config\.json"):
        load(tmp_path)


def test_adapter_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match=r"holds a LoRA adapter and no model; load its base model \(org/base\)"):
        load(tmp_path)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="pickled, which slothcore does not open"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 1000, -10])
def test_truncated_file(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load(folder)


def test_damaged_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"x" * 32
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged"):
        load(folder)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return saved(tiny_llama(), tmp_path / "sharded", max_shard_size="20KB")


def test_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00005.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00005\.safetensors is missing, though .*index"):
        load(shards)


def test_a_single_file_counts_before_an_index(shards: Path, folder: Path) -> None:
    """A folder of shards into which somebody saved the model again, whole: transformers reads that file as well."""
    shutil.copy(folder / "model.safetensors", shards)
    (shards / "model-00002-of-00005.safetensors").unlink()
    assert stored_tensors(shards).keys() == stored_tensors(folder).keys()


def test_truncated_shard(shards: Path) -> None:
    file = shards / "model-00002-of-00005.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00005\.safetensors is truncated or damaged"):
        load(shards)


def test_index_that_lies(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00005.safetensors"
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"says that model-00002-of-00005\.safetensors holds lm_head\.weight, but"):
        load(shards)
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load(shards)


@pytest.mark.parametrize("kind", ["another folder", "absolute", "no text", "no safetensors"])
def test_an_index_names_files_of_its_folder_only(shards: Path, kind: str, tmp_path: Path) -> None:
    """The file that it names is there and would load, so nothing but the check keeps it out."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(shards, elsewhere)
    name = "model-00005-of-00005.safetensors"
    (shards / "config.bin").write_bytes((shards / name).read_bytes())
    file = {
        "another folder": f"../{elsewhere.name}/{name}",
        "absolute": str(elsewhere / name),
        "no text": 5,
        "no safetensors": "config.bin",
    }[kind]
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    index["weight_map"] = {weight: file if old == name else old for weight, old in index["weight_map"].items()}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must lie in a \.safetensors file of this folder, got"):
        load(shards)


def test_missing_weight(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_unexpected_weight(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    with pytest.raises(ValueError, match=r"has no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \[31\], but config.json asks for \[32\]"):
        load(folder)


def test_integer_weight(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as I8"):
        load(folder)


def test_nothing_is_allocated_for_a_folder_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr("slothcore.models.load.read_tensors", lambda *a, **b: pytest.fail("began to read weights"))
    with pytest.raises(ValueError, match="lacks the weight"):
        load(folder)


# Writing


@pytest.mark.parametrize("switches", ["grouped queries", "tied head", "biases", "llama3 rope"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_reads_what_we_write(switches: str, max_shard_bytes: int, tmp_path: Path) -> None:
    model = load(saved(tiny_llama(**VARIANTS[switches]), tmp_path / "theirs"))
    save_pretrained(
        model.state_dict().items(), tmp_path / "ours", hf_config=model.hf_config, max_shard_bytes=max_shard_bytes
    )
    files = {path.name for path in (tmp_path / "ours").iterdir()}
    assert ("model.safetensors" in files) == (max_shard_bytes == 10**9)
    assert ("model.safetensors.index.json" in files) == (max_shard_bytes != 10**9)
    assert not [name for name in files if name.endswith(".tmp")]

    reference, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        expected, actual = reference.float()(token_ids(1, 30)).logits, model(token_ids(1, 30)).logits
    assert (actual - expected).abs().max() < 1e-4
    assert_same_weights(load(tmp_path / "ours"), model)


def test_shards_respect_their_limit(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    save_pretrained(model.state_dict().items(), tmp_path / "out", hf_config=model.hf_config, max_shard_bytes=13_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 13_000
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_stored_dtype_is_written_to_the_config(folder: Path, tmp_path: Path) -> None:
    model = load(folder, bits=16)
    save_pretrained(model.state_dict().items(), tmp_path / "out", hf_config=model.hf_config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert model.hf_config["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_an_earlier_model_in_the_folder_is_replaced(folder: Path, tmp_path: Path) -> None:
    model, out = load(folder), tmp_path / "out"
    save_pretrained(model.state_dict().items(), out, hf_config=model.hf_config, max_shard_bytes=13_000)
    save_pretrained(model.state_dict().items(), out, hf_config=model.hf_config)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    save_pretrained(model.state_dict().items(), out, hf_config=model.hf_config, max_shard_bytes=20_000)
    assert not (out / "model.safetensors").exists()
    assert_same_weights(load(out), model)


@pytest.mark.parametrize("failing", ["weights", "replace"])
def test_a_failure_leaves_the_folder_as_it_was(failing: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def state() -> Iterator[tuple[str, Tensor]]:
        items = list(model.state_dict().items())
        yield from ((name, weight + 1) for name, weight in items[:9])
        if failing == "weights":
            raise KeyboardInterrupt
        yield from items[9:]

    def refuse(*args: Any) -> None:
        raise OSError("disk full")

    if failing == "replace":
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises((KeyboardInterrupt, OSError)):
        save_pretrained(state(), folder, hf_config=model.hf_config, max_shard_bytes=13_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights to save"):
        save_pretrained([], tmp_path, hf_config={})
    assert not list(tmp_path.iterdir())


def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="only git-lfs's pointer to the weights; run `git lfs pull`"):
        stored_tensors(tmp_path)
