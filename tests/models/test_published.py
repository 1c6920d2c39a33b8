"""config.json of published models: each is read, and means what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from slothcore.models.config import DecoderConfig
from slothcore.models.families import FAMILIES, decoder_config, text_config
from slothcore.models.load import from_config, read_config
from tests.models.published import PUBLISHED

parametrize = pytest.mark.parametrize("name", PUBLISHED)


def read(values: dict[str, Any], folder: Path) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(values))
    return read_config(folder)[2]


def by_transformers(values: dict[str, Any], folder: Path) -> PreTrainedConfig:
    """`values` as transformers reads them; it no longer knows the first name of longrope."""
    (folder / "config.json").write_text(json.dumps(values).replace('"su"', '"longrope"'))
    return AutoConfig.from_pretrained(folder)


def test_every_family_is_there() -> None:
    assert {values["model_type"] for values in PUBLISHED.values()} == FAMILIES.keys()


@parametrize
def test_what_transformers_writes_in_its_place_means_the_same(name: str, tmp_path: Path) -> None:
    by_transformers(PUBLISHED[name], tmp_path).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert read(rewritten, tmp_path) == read(PUBLISHED[name], tmp_path)


@parametrize
def test_weights_windows_and_scale_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """With few layers: the patterns of windows begin at the first one, those of the experts do not vary."""
    values = text_config(PUBLISHED[name]) | {"num_hidden_layers": 7}
    values.pop("quantization_config", None)
    reference_config = by_transformers(values, tmp_path)
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(reference_config)
        ours = from_config(values)
    assert sum(weight.numel() for weight in ours.parameters()) == sum(w.numel() for w in reference.parameters())
    for index, layer in enumerate(reference.model.layers):
        assert ours.config.scale == pytest.approx(layer.self_attn.scaling)
        types = getattr(reference_config, "layer_types", None)
        window = getattr(reference_config, "sliding_window", None)
        assert ours.config.window(index) == (None if types and types[index] == "full_attention" else window)


def test_a_model_for_a_million_tokens_was_trained_on_fewer() -> None:
    for name in ("qwen2.5 14B 1M", "qwen3 30B 1M"):
        values = PUBLISHED[name]
        assert decoder_config(values).longest_document == 262144
        scaled = {**values, "rope_scaling": {"type": "linear", "factor": 2.0}}
        assert decoder_config(scaled).longest_document == 1010000


def test_yarn_reaches_beyond_max_position_embeddings(tmp_path: Path) -> None:
    """Qwen's model cards tell users to add it and to change nothing else."""
    for name in ("qwen2.5 7B yarn", "qwen3 8B yarn"):
        config = read(PUBLISHED[name], tmp_path)
        assert config.max_position_embeddings < config.longest_document == 131072
        assert from_config(tmp_path, device="meta").max_seq_length == 131072
        _, _, longer, message = read_config(tmp_path, max_seq_length=131072)
        assert (longer, message) == (config, None)
        with pytest.raises(ValueError, match=r"max_seq_length 131073 cannot be had.* for 131072 positions"):
            read_config(tmp_path, max_seq_length=131073)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("codeqwen1.5", {"rotary_emb_base": 10000}),
        ("qwen2.5 14B 1M", {"dual_chunk_attention_config": {"original_max_position_embeddings": "262144"}}),
        ("qwen3 coder 30B", {"qkv_bias": True}),
        ("qwen3 coder 30B", {"shared_expert_intermediate_size": 512}),
        ("qwen3 coder 30B", {"use_qk_norm": False}),
    ],
)
def test_another_value_of_a_key_that_few_files_have_is_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        decoder_config({**PUBLISHED[name], **change})


def test_the_ids_outside_a_text_part_count(tmp_path: Path) -> None:
    """When transformers saves, it fills in those of the text part with the defaults of its class."""
    by_transformers(PUBLISHED["gemma 3 4B"], tmp_path).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert rewritten["text_config"]["eos_token_id"] == 1
    assert decoder_config(rewritten).eos_token_ids == (1, 106)
