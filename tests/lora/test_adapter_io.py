"""Adapters on disk: PEFT reads ours, we read PEFT's, and what does not fit is refused before the model is touched."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.lora.reference import (
    load_pair,
    logits_of,
    make_batch,
    randomise_zero_factors,
    reference_logits,
    write_tiny_llama,
)

BIASED = {"attention_bias": True, "mlp_bias": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all linears": ({}, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "two names": ({}, {"r": 4, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "expression": ({}, {"r": 4, "target_modules": r".*\.0\.mlp\.(up|down)_proj"}),
    "head adapted": ({}, {"r": 4, "target_modules": ["lm_head", "q_proj"]}),
    "head adapted, and some layers": (
        {},
        {"r": 4, "target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]},
    ),
    "biases of targets": (BIASED, {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"]}),
    "all biases": (BIASED, {"r": 4, "bias": "all", "target_modules": ["q_proj", "v_proj"]}),
    "head trained": ({"tie_word_embeddings": True}, {"r": 4, "modules_to_save": ["lm_head"]}),
    "DoRA": (BIASED, {"r": 4, "use_dora": True, "use_rslora": True, "bias": "lora_only"}),
    "DoRA of the head": ({}, {"r": 4, "use_dora": True, "target_modules": ["lm_head", "q_proj"]}),
    "embedding and norms trained": ({}, {"r": 4, "modules_to_save": ["embed_tokens", "norm"]}),
}
PEFT_ONLY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ranks and alphas by pattern": (
        {},
        {
            "r": 4,
            "target_modules": "all-linear",
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 8, "^model.layers.0.mlp.up_proj": 3},
            "alpha_pattern": {"down_proj": 64, r"0\.self_attn\.[kv]_proj": 1},
            "use_rslora": True,
        },
    ),
    "some layers, some excluded": (
        {},
        {"r": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "exclude_modules": ["o_proj"]},
    ),
    "layers of a named list": (
        {},
        {"r": 4, "target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "base")


def adapted(folder: Path, **options: Any) -> Decoder:
    model = load_model(folder, bits=32, device="cpu")
    add_lora(model, **options)
    randomise_zero_factors(model)
    return model


def assert_same_adapter(ours: dict[str, Tensor], pefts: dict[str, Tensor]) -> None:
    """To an adapter of the head PEFT adds the frozen weight under it."""
    pefts = {name: tensor for name, tensor in pefts.items() if not name.endswith(".base_layer.weight")}
    assert ours.keys() == pefts.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, pefts[name]), name


def disturb(model: torch.nn.Module) -> None:
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


# What PEFT cannot be asked for in these words, and reads all the same.
OURS_ONLY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "expression for some layers": (
        {},
        {"r": 4, "target_modules": r".*\.(q|up)_proj", "layers_to_transform": [1], "rank_pattern": {"up_proj": 2}},
    ),
}


@pytest.mark.parametrize("name", [*CASES, *OURS_ONLY])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_peft_reads_ours(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    model_options, options = {**CASES, **OURS_ONLY}[name]
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base", **model_options))
    add_lora(ours, **options)
    disturb(ours)
    save_adapter(ours, tmp_path / "adapter")
    peft_model = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    batch = make_batch(ours.config.vocab_size)
    assert (logits_of(ours, batch) - reference_logits(peft_model, batch)).abs().max() < 1e-4
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config

    # PEFT, saving the same adapter again, writes the same names and values.
    peft_model.save_pretrained(tmp_path / "again")
    mine, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert_same_adapter(mine, theirs)


@pytest.mark.parametrize("name", [*CASES, *PEFT_ONLY])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_we_read_pefts(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    model_options, options = {**CASES, **PEFT_ONLY}[name]
    options = {"target_modules": "all-linear", **options}
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base", **model_options))
    peft_model = peft.get_peft_model(
        reference, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
    ).eval()
    disturb(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    batch = make_batch(ours.config.vocab_size)
    assert (logits_of(ours, batch) - reference_logits(peft_model, batch)).abs().max() < 1e-4

    # And what we save of it is what PEFT saved.
    save_adapter(ours, tmp_path / "again")
    mine, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("again", "adapter"))
    assert_same_adapter(mine, theirs)


def test_the_files_are_laid_out_as_pefts(base: Path, tmp_path: Path) -> None:
    model = adapted(base, r=4, lora_alpha=8.0, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True)
    assert values["peft_type"] == "LORA"
    assert values["task_type"] == "CAUSAL_LM"
    assert values["lora_alpha"] == 8
    assert isinstance(values["lora_alpha"], int)
    assert values["modules_to_save"] == ["lm_head"]
    assert values["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert "base_model.model.lm_head.weight" in names
    assert "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in names
    assert len(names) == 2 * 7 * 2 + 1


@pytest.mark.parametrize("init", [True, "pissa"])
def test_patterns_keep_their_order(base: Path, tmp_path: Path, init: bool | str) -> None:
    """Of those that match, the first counts."""
    patterns = {"v_proj": 2, "o_proj": 6, "[qkvo]_proj": 3}
    model = adapted(base, rank_pattern=patterns, init_lora_weights=init)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config is not None
    assert list(again.lora_config.rank_pattern.items()) == list(patterns.items())
    assert again.model.layers[0].self_attn.v_proj.lora_A.shape[0] == 2


def test_a_failed_save_leaves_the_earlier_adapter(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(base, r=4)
    save_adapter(model, tmp_path / "adapter")
    before = {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()}
    disturb(model)

    def full_disk(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_adapter(model, tmp_path / "adapter")
    assert {p.name: p.read_bytes() for p in (tmp_path / "adapter").iterdir()} == before


def test_places(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere, ~ is the user's own folder; and an adapter is no file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = adapted(base, r=4)
    save_adapter(model, "~/adapter")
    assert (tmp_path / "home" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "~").exists()
    assert load_adapter(load_model(base, bits=32, device="cpu"), "~/adapter").lora_config == model.lora_config
    with pytest.raises(ValueError, match=r"config.json is a file; give a folder to write the adapter into"):
        save_adapter(model, base / "config.json")


def test_a_round_trip_is_exact_and_trains_on(base: Path, tmp_path: Path) -> None:
    model = adapted(base, r=4, lora_dropout=0.1)
    save_adapter(model, tmp_path)
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path)
    assert again.lora_config == model.lora_config
    mine = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in again.named_parameters() if p.requires_grad}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_a_frozen_adapter_is_saved_whole(tmp_path: Path) -> None:
    model = adapted(write_tiny_llama(tmp_path / "base", **BIASED), r=4, bias="all", modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "adapter")
    frozen = load_model(tmp_path / "base", bits=32, device="cpu")
    load_adapter(frozen, tmp_path / "adapter", trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())
    save_adapter(frozen, tmp_path / "again")
    mine, theirs = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert_same_adapter(mine, theirs)


def test_a_second_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    model = adapted(base, r=4)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="has a LoRA adapter already"):
        load_adapter(model, tmp_path / "adapter")


def test_the_adapter_names_its_base(base: Path, tmp_path: Path) -> None:
    model = load_model(base, bits=32, device="cpu")
    model.name_or_path = "someone/tiny"
    save_adapter(add_lora(model, r=4), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"


def test_factors_may_be_kept_in_the_compute_dtype(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, r=4), tmp_path)
    for lora_dtype, expected in (("float32", torch.float32), ("auto", torch.bfloat16)):
        model = load_model(base, bits=16, dtype=torch.bfloat16, device="cpu")
        load_adapter(model, tmp_path, lora_dtype=lora_dtype)
        assert model.model.layers[0].mlp.up_proj.lora_A.dtype == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "only adapters of peft_type LORA are supported, got 'IA3'"),
        (
            {"use_dora": True},
            r"lacks 14 tensors .*, the first model\.layers\.0\..*\.lora_magnitude_vector; it was made",
        ),
        ({"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
        ({"use_rslora": "false"}, "use_rslora must be true or false, got 'false'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported$"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .* is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices = .* is not supported"),
        ({"some_new_feature": {"x": 1}}, "some_new_feature = .* is not supported"),
        ({"rank_patern": {"q_proj": 1}}, "rank_patern = .* did you mean 'rank_pattern'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', so .* path_initial_model"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', so the adapter may belong to changed base"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', so the adapter may belong to changed base"),
        ({"r": None}, "lacks r"),
        ({"r": 0}, "at least 1, got r = 0"),
        ({"bias": "some"}, "bias must be one of none, all, lora_only, got 'some'"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be a list of whole numbers, got '1'"),
        ({"layers_to_transform": [1, "2"]}, r"layers_to_transform must be a list of whole numbers, got \(1, '2'\)"),
        ({"target_modules": ["query"]}, "target_modules 'query' match no linear layer; known are q_proj, k_proj"),
        ({"target_modules": ["q_proj"]}, r"holds 24 tensors that this model has no place for, the first model\.layers"),
        ({"target_modules": ["lm_head", "q_proj"]}, r"lacks 2 tensors that this model needs, the first lm_head.lora_A"),
        ({"r": 8}, r"lora_A.weight has the shape \(4, 64\), but this model needs \(8, 64\); it was made for tiny"),
    ],
)
def test_refused_configurations(base: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    save_adapter(adapted(base, r=4), tmp_path)
    file = tmp_path / "adapter_config.json"
    values = {**json.loads(file.read_text()), "base_model_name_or_path": "tiny"}
    file.write_text(json.dumps({**values, "some_new_flag": False, "peft_version": "9.9", **change}))
    model = load_model(base, bits=32, device="cpu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert getattr(model, "lora_config", None) is None
    assert before.keys() == model.state_dict().keys()
    assert all(p.requires_grad for p in model.parameters())


def test_refused_files(base: Path, tmp_path: Path) -> None:
    model = load_model(base, bits=32, device="cpu")
    with pytest.raises(ValueError, match=r"is no adapter folder: it has no adapter_config.json"):
        load_adapter(model, base)
    good = tmp_path / "good"
    save_adapter(adapted(base, r=4), good)
    broken = tmp_path / "broken"
    shutil.copytree(good, broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_adapter(model, broken)
    shutil.copyfile(good / "adapter_config.json", broken / "adapter_config.json")
    content = (good / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is truncated or damaged"):
        load_adapter(model, broken)
    codes = {name: tensor.to(torch.int8) for name, tensor in load_file(good / "adapter_model.safetensors").items()}
    save_file(codes, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"lora_[AB].weight is stored as int8, codes of .*; save the adapter in 16 or"):
        load_adapter(model, broken)
    (broken / "adapter_model.safetensors").rename(broken / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors; adapter_model.bin is pickled"):
        load_adapter(model, broken)


def test_another_base_model_is_noticed(base: Path, tmp_path: Path) -> None:
    save_adapter(adapted(base, r=4), tmp_path / "adapter")
    wider = write_tiny_llama(tmp_path / "wider", hidden_size=32, head_dim=16)
    with pytest.raises(ValueError, match=r"has the shape .* but this model needs"):
        load_adapter(load_model(wider, bits=32, device="cpu"), tmp_path / "adapter")
    deeper = write_tiny_llama(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"lacks 14 tensors that this model needs, the first model.layers.2"):
        load_adapter(load_model(deeper, bits=32, device="cpu"), tmp_path / "adapter")


def test_names_that_older_versions_of_peft_wrote(base: Path, tmp_path: Path) -> None:
    """With `modules_to_save` in the name of a saved module, and plain names for biases of targets."""
    model = adapted(write_tiny_llama(tmp_path / "biased", **BIASED), r=4, bias="all", modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {
        name.replace("lm_head.", "lm_head.modules_to_save.").replace(".base_layer.", "."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    again = load_adapter(load_model(tmp_path / "biased", bits=32, device="cpu"), tmp_path / "adapter")
    batch = make_batch(model.config.vocab_size)
    assert torch.equal(logits_of(model, batch), logits_of(again, batch))


def test_names_with_the_adapters_name(base: Path, tmp_path: Path) -> None:
    """As in a state dict that was gathered without PEFT's own function."""
    model = adapted(base, r=4, modules_to_save=["lm_head"], use_dora=True)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    renamed = {
        re.sub(r"(lora_[AB])\.", r"\1.default.", name)
        .replace("lm_head.", "lm_head.modules_to_save.default.")
        .replace("magnitude_vector", "magnitude_vector.default.weight"): tensor
        for name, tensor in load_file(file).items()
    }
    assert all(".default." in name for name in renamed)
    save_file(renamed, file)
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path)
    batch = make_batch(model.config.vocab_size)
    assert torch.equal(logits_of(model, batch), logits_of(again, batch))


def test_an_empty_list_of_layers_means_all(base: Path, tmp_path: Path) -> None:
    """As in PEFT."""
    model = adapted(base, r=4)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_to_transform": []}))
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path)
    assert sum(name.endswith("lora_A") for name, _ in again.named_parameters()) == 14


def test_an_embedding_that_came_with_the_adapter_is_used(base: Path, tmp_path: Path) -> None:
    """As PEFT adds it after the vocabulary was changed."""
    model = adapted(base, r=4)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    embedding = torch.randn(97, 64)
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": embedding}, file)
    again = load_adapter(load_model(base, bits=32, device="cpu"), tmp_path)
    assert torch.equal(again.model.embed_tokens.weight, embedding)
    assert not again.model.embed_tokens.weight.requires_grad
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": embedding[1:]}, file)
    with pytest.raises(ValueError, match=r"embed_tokens.weight has the shape \(96, 64\), but this model needs \(97"):
        load_adapter(load_model(base, bits=32, device="cpu"), tmp_path)


def test_a_model_without_an_adapter_has_nothing_to_save(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no LoRA adapter to save"):
        save_adapter(load_model(base, bits=32, device="cpu"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
