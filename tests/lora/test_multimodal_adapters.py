"""Adapters of the text part of a multimodal model: PEFT puts them on the whole one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.lora.test_expert_adapters import TOLERANCE, assert_same_logits, logits_of
from tests.models.zoo import FAMILIES_TINY, saved, tiny_model

VARIANT = FAMILIES_TINY["gemma3"][0]
WHOLE, PART = "base_model.model.model.language_model.", "base_model.model.model."

pytestmark = pytest.mark.filterwarnings("ignore:.*belong to no text model")

OPTIONS = {
    "all linears": {},
    "an expression": {"target_modules": r"model\.layers\.[02]\.self_attn\.(q|v)_proj"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 2]},
    "all but some": {"exclude_modules": r"model\.layers\.0\..*"},
    "the head": {"target_modules": ["k_proj", "lm_head"]},
    "ranks of their own": {
        "rank_pattern": {r"^model\.layers\.1\.mlp\.up_proj": 2, "o_proj": 7},
        "alpha_pattern": {r"^model\.layers\.2\.self_attn\.q_proj": 3},
    },
    "rank-stabilised": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "of base weights": {"init_lora_weights": "pissa"},
    "norms": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
    "a whole block": {"modules_to_save": ["layers.1.mlp"]},
    "tables": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tiny_model(VARIANT), tmp_path / "base")


def base(folder: Path) -> Decoder:
    return load_model(folder, bits=32, device="cpu")


def adapted(folder: Path, **options: Any) -> Decoder:
    torch.manual_seed(11)
    model = add_lora(base(folder), **{"r": 4, "lora_alpha": 6, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_peft_puts_ours_on_the_whole_model(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """And we read it, and what PEFT saves of it."""
    ours = adapted(folder, **options)
    assert (logits_of(ours) - logits_of(base(folder))).abs().max() > 100 * TOLERANCE
    save_adapter(ours, tmp_path / "adapter")
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        whole = auto.from_pretrained(folder, attn_implementation="eager")
        theirs = PeftModel.from_pretrained(whole, tmp_path / "adapter").eval()
        assert_same_logits(ours, theirs)
        assert not [name for name, _ in theirs.named_parameters() if "vision" in name and "lora" in name]
    again = load_adapter(base(folder), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config
    assert_same_logits(again, ours)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(load_adapter(base(folder), tmp_path / "theirs"), ours)


def test_adapters_of_the_part_are_still_read(folder: Path, tmp_path: Path) -> None:
    """With the names of the text model and no word of what was trained, as slothcore wrote them at first."""
    ours = adapted(folder)
    save_adapter(ours, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {name.replace(WHOLE, PART): tensor for name, tensor in load_file(weights).items()}
    assert not any("language_model" in name for name in renamed)
    save_file(renamed, weights)
    file = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(file.read_text())
    assert ours.lora_config is not None
    file.write_text(json.dumps({**values, "target_modules": ours.lora_config.target_modules}))
    again = load_adapter(base(folder), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits_of(ours))


@pytest.mark.parametrize(
    "saved", [None, ["language_model.norm", "lm_head"], ["language_model.layers.1.mlp"], ["model.language_model.norm"]]
)
def test_an_adapter_that_peft_trained_on_the_whole_model(saved: list[str] | None, folder: Path, tmp_path: Path) -> None:
    targets = r".*language_model.*\.(q_proj|up_proj)"
    config = PeftConfig(r=3, target_modules=targets, rank_pattern={"up_proj": 5}, modules_to_save=saved)
    theirs = get_peft_model(tiny_model(VARIANT), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.2)
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(base(folder), tmp_path / "adapter")
    assert_same_logits(ours, theirs)
    save_adapter(ours, tmp_path / "ours")
    assert_same_logits(ours, PeftModel.from_pretrained(tiny_model(VARIANT), tmp_path / "ours").eval())


@pytest.mark.parametrize(
    ("targets", "before", "saved"),
    [
        (r".*language_model.*\.(q_proj|up_proj)", None, []),
        (["model.language_model.layers.0.mlp.up_proj"], ["language_model.model.layers.0.mlp.up_proj"], []),
        (r"model\.lang.*\.1\..*_proj|lm_head", r"language_model\.(model\.layers\.1\..*_proj|lm_head)", []),
        (r".*language_model.*\.q_proj", None, ["lm_head", "embed_tokens", "model.language_model.norm"]),
    ],
)
def test_names_that_older_versions_of_transformers_gave(
    targets: Any, before: Any, saved: list[str], folder: Path, tmp_path: Path
) -> None:
    """Before 4.52 the text part lay beneath `language_model`, and its head with it."""

    def older(name: str) -> str:
        name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        return re.sub(r"^lm_head", "language_model.lm_head", name)

    theirs = get_peft_model(tiny_model(VARIANT), PeftConfig(r=3, target_modules=targets, modules_to_save=saved)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_(0.0, 0.2)
            elif parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "adapter")
    file, weights = (tmp_path / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    told = json.loads(file.read_text())
    named = {"target_modules": before or targets, "modules_to_save": [older(name) for name in saved]}
    file.write_text(json.dumps({**told, **named}))
    prefix = "base_model.model."
    tensors = {prefix + older(name.removeprefix(prefix)): tensor for name, tensor in load_file(weights).items()}
    assert all(name.startswith(f"{prefix}language_model.") for name in tensors)
    save_file(tensors, weights)
    assert_same_logits(load_adapter(base(folder), tmp_path / "adapter"), theirs)
