"""config.json of every family: published files, defaults, and the refusal of what is not implemented."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slothcore.models.families import FAMILIES, decoder_config, family_of, supported_families_table, text_config
from slothcore.models.load import from_config
from tests.conftest import SHARED_DATA
from tests.models.zoo import ALL_VARIANTS, FAMILIES_TINY, Variant, tiny_config, tiny_model

PUBLISHED = sorted(SHARED_DATA.glob("configs/*.json"))
FIRST_VARIANTS = [variants[0] for variants in FAMILIES_TINY.values()]

MINIMAL: dict[str, Any] = {
    "vocab_size": 40000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def written(variant: Variant) -> dict[str, Any]:
    """What transformers writes into config.json for a variant."""
    return json.loads(tiny_config(variant).to_json_string(use_diff=False))


@pytest.mark.skipif(not PUBLISHED, reason="the folder shared/data beside the checkout is absent")
@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_files_have_the_parameters_of_transformers(file: Path) -> None:
    with torch.device("meta"):
        ours = from_config(file)
        reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file))
    assert ours.hf_config == json.loads(file.read_text())
    assert sum(weight.numel() for weight in ours.parameters()) == sum(w.numel() for w in reference.parameters())
    if ours.config.moe is None:
        expected = {name: weight.shape for name, weight in reference.named_parameters()}
        assert {name: weight.shape for name, weight in ours.named_parameters()} == expected


def test_a_family_that_is_not_supported_gets_the_list_of_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"model_type 'gpt2' is not supported; supported are llama, mistral, .*phi3"):
        decoder_config({"model_type": "gpt2"})


def test_every_family_has_a_tiny_variant() -> None:
    assert FAMILIES_TINY.keys() == FAMILIES.keys()
    for family, variants in FAMILIES_TINY.items():
        assert variants
        assert all(variant.family == family for variant in variants)
        assert len({variant.name for variant in variants}) == len(variants)


@pytest.mark.parametrize("variant", FIRST_VARIANTS, ids=lambda variant: variant.family)
def test_absent_keys_mean_what_transformers_takes_them_for(variant: Variant) -> None:
    """A file with the sizes alone reads as what transformers writes after filling in its defaults."""
    sizes: dict[str, Any] = dict(MINIMAL)
    if variant.is_multimodal:
        sizes = {"text_config": {"hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024}}
    elif "moe" in variant.family or variant.family == "mixtral":
        sizes |= {"num_local_experts": 8, "num_experts": 8}
    full = json.loads(variant.config_class(**sizes).to_json_string(use_diff=False))
    ours = decoder_config({"model_type": variant.family, **sizes})
    assert ours == decoder_config(full)
    assert ours.num_hidden_layers == (34 if variant.is_multimodal else 12)


OLDER_KEYS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 5, "sliding_window": 7},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7},
    "gemma2": {"sliding_window": 7},
    "gemma3_text": {
        "sliding_window": 7,
        "sliding_window_pattern": 4,
        "rope_theta": 5e5,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "phi3": {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "sliding_window": 7},
}


@pytest.mark.parametrize("family", OLDER_KEYS)
def test_older_keys_mean_the_newer_ones(family: str) -> None:
    """A rule such as "every sixth layer" reads as the list of layers that transformers writes in its place."""
    values = {**MINIMAL, **OLDER_KEYS[family]}
    full = json.loads(FAMILIES_TINY[family][0].config_class(**values).to_json_string(use_diff=False))
    kept = ("use_sliding_window", "sliding_window")
    newer = {key: value for key, value in full.items() if key in kept or key not in OLDER_KEYS[family]}
    older = decoder_config({"model_type": family, **values})
    assert older == decoder_config(newer)
    assert older.layer_windows is not None
    assert older != decoder_config({"model_type": family, **MINIMAL})


@pytest.mark.parametrize("variant", ALL_VARIANTS, ids=str)
def test_an_unknown_key_is_refused_by_name(variant: Variant) -> None:
    values = written(variant)
    decoder_config(values)
    with pytest.raises(ValueError, match=r"here/config\.json: the key 'attention_sharpness' .*0.5.* is not supported"):
        decoder_config({**values, "attention_sharpness": 0.5}, "here/config.json")
    if variant.is_multimodal:
        text = {**values["text_config"], "attention_sharpness": 0.5}
        with pytest.raises(ValueError, match="the key 'attention_sharpness'"):
            decoder_config({**values, "text_config": text})


REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "mistral": [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"layer_types": ["sliding_attention"] * 2}, "'layer_types'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"sliding_window": -3}, "window of attention must be positive"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu"),
    ],
    "qwen2": [
        ({"use_mrope": True}, "use_mrope = True"),
        ({"layer_types": ["linear_attention"] * 2}, "layer_types names 'linear_attention'"),
        ({"layer_types": ["full_attention"]}, "one entry for each of 2 layers, got 1"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window gives them no window"),
        ({"attention_bias": False}, "'attention_bias'"),
    ],
    "qwen3": [({"layer_types": ["chunked_attention"] * 2}, "layer_types names 'chunked_attention'")],
    "gemma": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation = 'gelu_pytorch_tanh'"),
    ],
    "gemma2": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"hidden_activation": "gelu"}, "hidden_act must be one of .*'gelu'"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ({"sliding_window_size": 9}, "sliding_window_size = 9"),
        ({"attn_logit_softcapping": 0.0}, "attention_softcap must be positive"),
    ],
    "gemma3_text": [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern must be positive"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be positive"),
    ],
    "gemma3": [({"is_encoder_decoder": True}, "is_encoder_decoder"), ({"text_config": 3}, "text_config must be dict")],
    "phi3": [
        ({"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ({"embd_pdrop": 0.1}, "embd_pdrop = 0.1"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"full_attn_mod": 2}, "full_attn_mod = 2"),
    ],
}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [(family, *case) for family, cases in REFUSED.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_not_implemented_is_refused_by_name(family: str, change: dict[str, Any], message: str) -> None:
    values = written(FAMILIES_TINY[family][0])
    with pytest.raises(ValueError, match=message) as caught:
        decoder_config({**values, **change}, "here/config.json")
    assert str(caught.value).startswith("here/config.json")


def test_gemma_means_the_tanh_gelu() -> None:
    values = written(FAMILIES_TINY["gemma"][0])
    expected = decoder_config(values)
    assert expected.hidden_act == "gelu_pytorch_tanh"
    for act in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None}, {"hidden_act": None}):
        assert decoder_config({**values, **act}) == expected


def test_null_is_not_the_same_as_absent() -> None:
    """Where a family's default is not "none", null still says none."""
    window = {key: value for key, value in written(FAMILIES_TINY["mistral"][0]).items() if key != "sliding_window"}
    assert decoder_config(window).layer_windows == (4096, 4096)
    assert decoder_config({**window, "sliding_window": None}).layer_windows is None
    caps = written(FAMILIES_TINY["gemma2"][0])
    without = decoder_config({**caps, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (without.attention_softcap, without.logit_softcap) == (None, None)
    assert decoder_config({**caps, "pad_token_id": None}).pad_token_id is None


def test_the_text_part_of_a_multimodal_file() -> None:
    """As published for 4B: sizes that are the default are left out, tokens stand outside."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    }
    config = decoder_config(published)
    assert (config.vocab_size, config.num_attention_heads, config.num_key_value_heads) == (262208, 8, 4)
    assert (config.head_dim, config.tie_word_embeddings, config.eos_token_ids) == (256, True, (1, 106))
    assert (config.rope.rope_type, config.rope.factor, config.rope.rope_theta) == ("linear", 8.0, 1e6)
    assert config.local_rope is not None
    assert (config.local_rope.rope_type, config.local_rope.rope_theta) == ("default", 1e4)
    assert config.layer_windows is not None
    assert config.layer_windows[:7] == (1024, 1024, 1024, 1024, 1024, None, 1024)

    text = text_config(published)
    assert text["model_type"] == "gemma3_text"
    assert "vision_config" not in text
    assert decoder_config(text) == config
    assert family_of(published).weight_prefixes
    assert not family_of(text).weight_prefixes


@pytest.mark.parametrize("variant", FIRST_VARIANTS, ids=lambda variant: variant.family)
def test_random_weights_start_alike(variant: Variant) -> None:
    """Norms begin as the identity, which the offset of Gemma's moves to zero."""
    config = tiny_config(variant)
    model = from_config(json.loads(config.to_json_string(use_diff=False)), device="cpu")
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1.0 - model.config.norm_weight_offset).all(), name
    reference = tiny_model(variant).eval()
    assert sum(weight.numel() for weight in model.parameters()) == sum(
        weight.numel()
        for name, weight in reference.named_parameters()
        if not name.startswith(("model.vision_tower.", "model.multi_modal_projector."))
    )


def test_the_table_of_families_names_every_family() -> None:
    lines = supported_families_table().splitlines()
    assert len(lines) == 2 + len(FAMILIES)
    assert "| Llama | `llama` | Llama 1, Llama 2, Llama 3," in lines[2]
