"""What versions of PEFT that are older than a word of its format find in the files that are written here."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from slothcore.lora.adapter_io import load_adapter, save_adapter
from slothcore.lora.attach import add_lora
from slothcore.models.load import load_model
from tests.lora.reference import (
    load_pair,
    logits_of,
    make_batch,
    randomise_zero_factors,
    reference_logits,
    write_tiny_llama,
)
from tests.lora.test_expert_adapters import assert_same_logits
from tests.models.zoo import FAMILIES_TINY, saved, tiny_model

VARIANT = FAMILIES_TINY["qwen3_moe"][0]
# PEFT 0.10's fields of a LoRA adapter.
FIELDS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "r", "rank_pattern"),
    *("revision", "target_modules", "task_type", "use_dora", "use_rslora"),
}


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["o_proj", "0.mlp.up_proj"], "rank_pattern": {"q_proj": 2}},
        {"exclude_modules": r".*\.0\..*", "target_modules": r".*\.(q|up)_proj", "layers_to_transform": [0, 1]},
        {"exclude_modules": ["lm_head"], "use_dora": True, "modules_to_save": ["norm"]},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "pissa", "exclude_modules": ["o_proj"]},
        {"use_dora": True, "use_rslora": True, "bias": "all"},
    ],
    ids=str,
)
def test_an_adapter_has_no_word_that_older_versions_refuse(options: dict[str, Any], tmp_path: Path) -> None:
    ours, reference = load_pair(write_tiny_llama(tmp_path / "base"))
    add_lora(ours, r=4, **options)
    randomise_zero_factors(ours)
    save_adapter(ours, tmp_path / "adapter")
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told.keys() <= FIELDS
    assert told["init_lora_weights"] is True
    batch = make_batch(ours.config.vocab_size)
    by_peft = PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert (reference_logits(by_peft, batch) - logits_of(ours, batch)).abs().max() < 1e-4
    again = load_adapter(load_model(tmp_path / "base", bits=32, device="cpu"), tmp_path / "adapter")
    assert again.lora_config == ours.lora_config


def test_a_layer_that_is_left_out_is_no_expert(tmp_path: Path) -> None:
    """PEFT fuses whatever is called like one, without asking what is excluded."""
    folder = saved(tiny_model(VARIANT), tmp_path / "base")
    ours = load_model(folder, bits=32, device="cpu")
    add_lora(ours, r=4, target_modules=["q_proj", "up_proj"], exclude_modules=r".*\.mlp\..*", use_dora=True)
    randomise_zero_factors(ours)
    save_adapter(ours, tmp_path / "adapter")
    assert_same_logits(ours.eval(), PeftModel.from_pretrained(tiny_model(VARIANT), tmp_path / "adapter").eval())
