"""save_merged: a complete folder that transformers reads with equal logits, or no folder at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from slothcore.data.tokenizer import Tokenizer
from slothcore.export import merged
from slothcore.export.merged import save_merged
from slothcore.layers.linear import Linear
from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.lora.merge import merged_weight
from slothcore.models import writing
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.data.tiny_tokenizers import CHATML, write_byte_tokenizer
from tests.lora.reference import (
    load_pair,
    logits_of,
    make_batch,
    randomise_zero_factors,
    reference_logits,
    write_tiny_llama,
)

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linears": ({}, {"r": 8}),
    "tied head": ({"tie_word_embeddings": True}, {"r": 4, "use_rslora": True}),
    "DoRA": ({"attention_bias": True}, {"r": 4, "use_dora": True, "use_rslora": True}),
    "DoRA, tied head adapted": (
        {"tie_word_embeddings": True},
        {"r": 4, "use_dora": True, "target_modules": ["lm_head", "up_proj"]},
    ),
    "tied head adapted": ({"tie_word_embeddings": True}, {"r": 4, "target_modules": ["lm_head", "up_proj"]}),
    "tied head trained": ({"tie_word_embeddings": True}, {"r": 4, "modules_to_save": ["lm_head"]}),
    "biases and norms trained": (
        {"attention_bias": True, "mlp_bias": True},
        {"r": 4, "bias": "all", "modules_to_save": ["norm", "embed_tokens"]},
    ),
}


def adapted(folder: Path, *, bits: int = 32, **options: Any) -> Decoder:
    """A model whose adapter, and whatever else trains, has moved."""
    model = load_model(folder, bits=bits, dtype=torch.float32, device="cpu")
    add_lora(model, **options)
    randomise_zero_factors(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def through_transformers(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return reference_logits(model, make_batch(97))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", [32, 4])
def test_transformers_gives_the_same_logits(tmp_path: Path, name: str, bits: int) -> None:
    model_options, options = CASES[name]
    model = adapted(write_tiny_llama(tmp_path / "base", **model_options), bits=bits, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_merged(model, None, tmp_path / "merged", dtype=torch.float32)
    expected = logits_of(model, make_batch(97))
    assert (through_transformers(tmp_path / "merged") - expected).abs().max() < 1e-4
    # And so does slothcore; the model itself was only read.
    again = load_model(tmp_path / "merged", bits=32, device="cpu")
    assert (logits_of(again, make_batch(97)) - expected).abs().max() < 1e-4
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_head_is_stored_once_exactly_if_it_is_still_the_embedding(tmp_path: Path) -> None:
    for name, tied in (("tied head", True), ("tied head adapted", False), ("tied head trained", False)):
        model_options, options = CASES[name]
        model = adapted(write_tiny_llama(tmp_path / name / "base", **model_options), **options)
        save_merged(model, None, tmp_path / name / "merged")
        config = json.loads((tmp_path / name / "merged" / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(tmp_path / name / "merged" / "model.safetensors")) is not tied


@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("init", [True, "pissa"])
def test_an_adapter_is_not_put_on_the_model_that_it_is_merged_into(tmp_path: Path, bits: int, init: bool | str) -> None:
    base, out = write_tiny_llama(tmp_path / "base"), tmp_path / "merged"
    model = adapted(base, bits=bits, r=4, init_lora_weights=init)
    save_merged(model, None, out, bits=4 if bits == 4 else None)
    save_adapter(model, tmp_path / "adapter")
    message = r"adapter is merged into the weights of \S+merged already, and would count twice; leave it out"
    for lora_dtype in ("float32", "auto"):
        with pytest.raises(ValueError, match=message):
            load_adapter(load_model(out, bits=bits, device="cpu"), tmp_path / "adapter", lora_dtype=lora_dtype)
    load_adapter(load_model(base, bits=bits, device="cpu"), tmp_path / "adapter")

    # Another is welcome; what both make is still the first one's.
    further = adapted(out, bits=bits, r=4)
    save_adapter(further, tmp_path / "further")
    load_adapter(load_model(out, bits=bits, device="cpu"), tmp_path / "further")
    save_merged(further, None, tmp_path / "both")
    for name in ("adapter", "further"):
        with pytest.raises(ValueError, match=f"{name} is merged into the weights of"):
            load_adapter(load_model(tmp_path / "both", bits=bits, device="cpu"), tmp_path / name)


def test_the_folder_is_complete(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    model = adapted(base, r=4)
    model.hf_config = {**config, "quantization_config": {"load_in_4bit": True}, "_name_or_path": "/somewhere"}
    model.generation_config = {"temperature": 0.6, "do_sample": True}
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer", config={"chat_template": CHATML}))
    save_merged(model, tokenizer, tmp_path / "a" / "merged", max_shard_bytes=100_000)
    folder = tmp_path / "a" / "merged"
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert {p.name for p in folder.iterdir()} - {p.name for p in shards} == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = json.loads((folder / "config.json").read_text())
    assert len(written.pop("slothcore_merged")) == 1
    assert written.get("dtype", written.get("torch_dtype")) == "bfloat16"
    assert not {"quantization_config", "_name_or_path"} & written.keys()
    assert {k: v for k, v in written.items() if "dtype" not in k} == {
        k: v for k, v in config.items() if "dtype" not in k
    }
    ends = [2, tokenizer.token_id("<|im_end|>")]
    assert json.loads((folder / "generation_config.json").read_text()) == {
        **model.generation_config,
        "eos_token_id": ends,
    }
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for shard in shards:
        assert shard.stat().st_size < 120_000
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in list(file.keys()):
                assert index["weight_map"][name] == shard.name
                assert file.get_slice(name).get_dtype() == "BF16"
    assert Tokenizer.from_folder(folder).encode("the cat") == tokenizer.encode("the cat")
    assert through_transformers(folder).isfinite().all()


def test_a_weight_is_rounded_once(tmp_path: Path) -> None:
    """bfloat16 of the float32 sum; adding in bfloat16, or rounding the base first, gives other bits."""
    _, reference = load_pair(write_tiny_llama(tmp_path), bits=4)
    model = adapted(tmp_path, bits=4, r=8)
    differs = 0
    for path, linear in model.named_modules():
        if not isinstance(linear, Linear) or linear.lora_A is None:
            continue
        base = reference.get_submodule(path).weight.detach()
        delta = linear.lora_scaling * (linear.lora_B @ linear.lora_A).detach()
        exact = (base.double() + delta.double()).float()
        torch.testing.assert_close(merged_weight(linear, torch.float32), exact, rtol=1e-6, atol=1e-7)
        rounded = merged_weight(linear, torch.bfloat16)
        assert torch.equal(rounded, merged_weight(linear, torch.float32).bfloat16())
        differs += int((rounded != base.bfloat16() + delta.bfloat16()).sum())
    assert differs > 0


def test_a_model_without_an_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    save_merged(load_model(base, bits=32, device="cpu"), None, tmp_path / "merged", dtype=torch.float32)
    mine, original = load_file(tmp_path / "merged" / "model.safetensors"), load_file(base / "model.safetensors")
    assert mine.keys() == original.keys()
    assert all(torch.equal(mine[name], original[name]) for name in mine)


def test_an_existing_folder_is_replaced(tmp_path: Path) -> None:
    model = adapted(write_tiny_llama(tmp_path / "base"), r=4)
    folder = tmp_path / "merged"
    save_merged(model, None, folder, max_shard_bytes=100_000)
    (folder / "notes.txt").write_text("mine")
    save_merged(model, None, folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert through_transformers(folder).isfinite().all()

    model.generation_config = {}
    save_merged(model, None, folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "notes.txt"}


def test_an_existing_tokenizer_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """Nothing of it is left to be read as the new model's; one is not lost where the new model brings none."""
    model = adapted(write_tiny_llama(tmp_path / "base"), r=4)
    plain = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "plain"))
    talking = write_byte_tokenizer(tmp_path / "talking")
    (talking / "chat_template.jinja").write_text("{{ messages }}")
    (talking / "additional_chat_templates").mkdir()
    (talking / "additional_chat_templates" / "search.jinja").write_text("{{ documents }}")
    folder = tmp_path / "merged"
    # Twice, for folders in it are there already then.
    for tokenizer in (Tokenizer.from_folder(talking), Tokenizer.from_folder(talking), None):
        save_merged(model, tokenizer, folder)
        assert Tokenizer.from_folder(folder).chat_template == "{{ messages }}"
        assert [file.name for file in folder.glob("*/*")] == ["search.jinja"]
    save_merged(model, plain, folder)
    assert Tokenizer.from_folder(folder).chat_template is None
    save_merged(model, plain, tmp_path / "new")
    of_new = {file.name for file in (tmp_path / "new").rglob("*") if file.is_file()}
    assert {file.name for file in folder.rglob("*") if file.is_file()} == of_new
    assert through_transformers(folder).isfinite().all()


def test_others_end_an_answer_where_the_template_ends_it(tmp_path: Path) -> None:
    """A base model's own files name another token, or none; what else they say stays."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "plain"))
    talking = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "talking", config={"chat_template": CHATML}))
    end = talking.token_id("<|im_end|>")
    base = write_tiny_llama(tmp_path / "base", vocab_size=talking.vocab_size, eos_token_id=2, bos_token_id=1)
    model = load_model(base, bits=32, device="cpu")
    for before, given, after in (
        ({}, talking, {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": [2, end]}),
        ({"eos_token_id": 5, "top_k": 9}, talking, {"eos_token_id": [5, end], "top_k": 9}),
        ({"eos_token_id": [5, end]}, talking, {"eos_token_id": [5, end]}),
        ({"eos_token_id": 5}, tokenizer, {"eos_token_id": 5}),
        ({"eos_token_id": 5}, None, {"eos_token_id": 5}),
    ):
        model.generation_config = before
        save_merged(model, given, tmp_path / "merged")
        assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()) == after
        assert model.generation_config == before
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").generation_config
        assert (read.bos_token_id, read.eos_token_id) == (after.get("bos_token_id"), after["eos_token_id"])


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(write_tiny_llama(tmp_path / "base"), r=4)
    tokenizer = Tokenizer.from_folder(write_byte_tokenizer(tmp_path / "tokenizer"))

    def failing(*arguments: Any) -> Any:
        yield from list(original(*arguments))[:5]
        raise OSError("no space left on device")

    original = merged.merged_state
    monkeypatch.setattr(merged, "merged_state", failing)
    with pytest.raises(OSError, match="no space"):
        save_merged(model, tokenizer, tmp_path / "out" / "merged", max_shard_bytes=10_000)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()

    monkeypatch.setattr(Tokenizer, "save", lambda self, path: failing_save(path))

    def failing_save(path: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        save_merged(model, tokenizer, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_only_one_weight_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a weight is asked for, the memory of all but what is being written is free, however large a shard is.

    Storages are watched, not tensors: a view keeps the memory of a tensor that is gone.
    """
    model = adapted(write_tiny_llama(tmp_path / "base"), r=4)
    monkeypatch.setattr(writing, "PIECES_UNDER_WAY", 1)
    made: list[tuple[int, StorageWeakRef]] = []
    most = 0
    original = merged.merged_state

    def watching(*arguments: Any) -> Any:
        nonlocal most
        for name, tensor in original(*arguments):
            copy = tensor.clone()  # a frozen float32 weight is the model's own, which lives on
            del tensor
            made.append((copy.nbytes, StorageWeakRef(copy.untyped_storage())))
            assert not made[-1][1].expired()
            yield name, copy
            del copy
            most = max(most, sum(not storage.expired() for _, storage in made))

    monkeypatch.setattr(merged, "merged_state", watching)
    save_merged(model, None, tmp_path / "merged", check=False)
    assert len(made) > 15
    assert most <= 2  # none, where the thread has written each before the next is asked for


@pytest.mark.gpu
def test_a_gpu_merges_the_same_weights(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base")
    # Quantised once: a CPU and a GPU may quantise a few values differently, as bitsandbytes does.
    model = load_model(base, bits=4, dtype=torch.bfloat16, device="cpu")
    randomise_zero_factors(add_lora(model, r=4, modules_to_save=["lm_head"]))
    save_merged(model, None, tmp_path / "cpu", dtype=torch.float32)
    save_merged(model.to("cuda"), None, tmp_path / "gpu", dtype=torch.float32)
    mine, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("gpu", "cpu"))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_refusals(tmp_path: Path) -> None:
    model = adapted(write_tiny_llama(tmp_path / "base"), r=4)
    with pytest.raises(
        ValueError, match=r"dtype must be torch.bfloat16, torch.float16 or torch.float32, got torch.int8"
    ):
        save_merged(model, None, tmp_path / "merged", dtype=torch.int8)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        save_merged(model, None, tmp_path / "file")
    save_adapter(model, tmp_path / "adapter")
    before = sorted((tmp_path / "adapter").iterdir())
    with pytest.raises(ValueError, match="holds a LoRA adapter; give another folder"):
        save_merged(model, None, tmp_path / "adapter")
    assert sorted((tmp_path / "adapter").iterdir()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "file"]
