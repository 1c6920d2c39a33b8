"""Reading config.json: what is known is read exactly, what is not known is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slothcore.layers.rope import RopeParameters, inverse_frequencies
from slothcore.models.config import DecoderConfig, MoeConfig
from slothcore.models.families import decoder_config
from slothcore.models.hf_config import read_json
from slothcore.models.load import from_config
from tests.models.tiny import LLAMA3_ROPE

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_defaults_are_those_of_transformers() -> None:
    config, reference = decoder_config(TINY), LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"})
    assert config.num_key_value_heads == reference.num_key_value_heads == 4
    assert config.head_dim == reference.head_dim == 8
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.hidden_act == reference.hidden_act
    assert config.initializer_range == reference.initializer_range
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rope.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.scale == 8**-0.5


def test_published_llama_configs(shared_data: Path) -> None:
    """Every file is read, and a model of exactly the published parameter count comes out."""
    counts = {
        "Llama-2-7b": 6_738_415_616,
        "Llama-2-13b": 13_015_864_320,
        "Llama-2-70b": 68_976_648_192,
        "Llama-3-8B": 8_030_261_248,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.2-1B-Instruct": 1_235_814_400,
        "Llama-3.2-3B": 3_212_749_824,
        "Llama-3.2-3B-Instruct": 3_212_749_824,
        "TinyLlama-1.1B-3T": 1_100_048_384,
        "TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
        "Yi-6B": 6_061_035_520,
    }
    seen = {}
    for file in sorted((shared_data / "configs").glob("*.json")):
        values = json.loads(file.read_text())
        if values["model_type"] == "llama":
            model = from_config(file, device="meta")
            assert model.hf_config == values
            seen[file.stem] = sum(weight.numel() for weight in model.parameters())
    assert seen == counts


def test_codellama_and_llama_1_keys() -> None:
    code = {**TINY, "rope_theta": 1000000, "rope_scaling": None, "pretraining_tp": 1, "vocab_size": 32016}
    assert decoder_config(code).rope == RopeParameters(rope_theta=1e6)
    first = {**TINY, "max_sequence_length": 2048, "pad_token_id": -1, "bos_token_id": 1, "eos_token_id": 2}
    config = decoder_config(first)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert from_config(first).model.embed_tokens.padding_idx is None


def test_smollm_keys() -> None:
    extra = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    assert decoder_config({**TINY, **extra, "tokenizer_class": "GPT2Tokenizer"}) == decoder_config(TINY)


def test_both_spellings_of_rope_are_equal() -> None:
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    old = decoder_config({**TINY, "rope_theta": 10000.0, "rope_scaling": scaling})
    assert old == decoder_config({**TINY, "rope_parameters": LLAMA3_ROPE})
    assert old.rope.factor == 4.0
    oldest = decoder_config({**TINY, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert oldest.rope == RopeParameters(rope_type="linear", factor=2.0)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
        {**LLAMA3_ROPE, "original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 5e5},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_inverse_frequencies_are_those_of_transformers_to_the_bit(rope: dict[str, Any]) -> None:
    reference = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, attention_factor = compute(reference)
    assert attention_factor == 1.0
    assert torch.equal(inverse_frequencies(RopeParameters(**rope), 128), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is not supported.*did you mean 'llama'.*supported are llama"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"rms_norm_epz": 1e-5}, "key 'rms_norm_epz'.*did you mean 'rms_norm_eps'"),
        ({"sliding_window": 4096}, "key 'sliding_window' .*4096"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already .*'gptq'.*bits=4"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"pad_token_id": 97}, "pad_token_id must be below vocab_size, got 97 and 97"),
        ({"eos_token_id": ["5"]}, "eos_token_id must be a token id or a list of them"),
        ({"rope_interleaved": True}, "rope_interleaved = True is not supported"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"hidden_size": "32"}, "hidden_size must be int, got '32'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be int, got True"),
        ({"hidden_size": None}, "lacks the key 'hidden_size'"),
        ({"hidden_size": 33}, "hidden_size must be a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be positive"),
        ({"initializer_range": -0.02}, "initializer_range must be at least 0, got -0.02"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "'ntk' is not supported; known are default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE lacks the key 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "facto": 1}}, "'facto'.*did you mean 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor must be positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor must exceed"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    decoder_config(TINY)
    with pytest.raises(ValueError, match=message) as caught:
        decoder_config({**TINY, **change}, "here/config.json")
    assert str(caught.value).startswith("here/config.json")
    assert "\n" not in str(caught.value)


def test_null_and_book_keeping_keys_pass() -> None:
    extra = {"transformers_version": "4.31", "torch_dtype": "float16", "use_cache": True, "sliding_window": None}
    assert decoder_config({**TINY, **extra}) == decoder_config(TINY)


def test_several_end_tokens() -> None:
    assert decoder_config({**TINY, "eos_token_id": [5, 6]}).eos_token_ids == (5, 6)


def test_layer_windows_must_fit() -> None:
    fields = {**vars(decoder_config(TINY)), "layer_windows": (4, None)}
    assert DecoderConfig(**fields).window(0) == 4
    with pytest.raises(ValueError, match="layer_windows must have one entry"):
        DecoderConfig(**{**fields, "layer_windows": (4,)})
    with pytest.raises(ValueError, match="a window of attention must be positive"):
        DecoderConfig(**{**fields, "layer_windows": (4, 0)})


@pytest.mark.parametrize("name", ["attention_softcap", "logit_softcap", "attention_scale"])
def test_caps_and_scales_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0.0"):
        DecoderConfig(**{**vars(decoder_config(TINY)), name: 0.0})


def test_experts_must_fit() -> None:
    moe = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 8, "normalize_weights": True}
    config = DecoderConfig(**{**vars(decoder_config(TINY)), "moe": MoeConfig(**moe, layers=(False, True))})
    assert [config.is_sparse(layer) for layer in range(2)] == [False, True]
    with pytest.raises(ValueError, match=r"moe\.layers must have one entry for each of 2 layers, got 1"):
        replace(config, moe=MoeConfig(**moe, layers=(True,)))
    with pytest.raises(ValueError, match=r"num_experts_per_tok must lie in 1\.\.4"):
        MoeConfig(**{**moe, "experts_per_token": 5}, layers=(True,))
    with pytest.raises(ValueError, match="width of experts must be positive"):
        MoeConfig(**{**moe, "intermediate_size": 0}, layers=(True,))


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.json does not exist"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is not readable as JSON"):
        read_json(tmp_path / "deep.json")
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"broken\.json is not readable as JSON"):
        read_json(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json must hold a JSON object, got list"):
        read_json(tmp_path / "list.json")
