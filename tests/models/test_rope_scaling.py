"""RoPE scaled for longer texts than the model's own: what the new config.json says, also to transformers."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, LlamaForCausalLM, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slothcore.layers.rope import RopeParameters, inverse_frequencies
from slothcore.models.config import DecoderConfig
from slothcore.models.families import decoder_config
from slothcore.models.load import load_model
from slothcore.models.rope_scaling import SCALINGS, scaled_config
from tests.models.test_config import TINY
from tests.models.test_rope_config import FACTORS, GEMMA3, HEAD_DIM, PHI3
from tests.models.test_rope_config import SCALINGS as ROPES
from tests.models.tiny import saved, tiny_llama, token_ids

LLAMA3, YARN = ROPES["llama3"], ROPES["yarn"]


def scaled(
    values: dict[str, Any], max_seq_length: int | None, rope_scaling: str | dict[str, Any] | None = None
) -> tuple[dict[str, Any], DecoderConfig, str]:
    """The new config.json, what it means, and what was said; transformers must mean the same by it."""
    before = json.dumps(values)
    result, message = scaled_config(values, max_seq_length, rope_scaling)
    assert json.dumps(values) == before, "the caller's dict was changed"
    config = decoder_config(json.loads(json.dumps(result)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = AutoConfig.for_model(**{**json.loads(json.dumps(result)), "pad_token_id": 0})
    if config.local_rope is None and config.rope.rope_type != "default":
        expected, attention_factor = ROPE_INIT_FUNCTIONS[config.rope.rope_type](reference)
        assert torch.equal(inverse_frequencies(config.rope, config.head_dim), expected)
        assert config.rope.attention_scaling == attention_factor
    return result, config, message or ""


@pytest.mark.parametrize("max_seq_length", [None, 1, 2047, 2048])
def test_a_model_that_is_long_enough_stays(max_seq_length: int | None) -> None:
    assert scaled_config(TINY, max_seq_length) == (TINY, None)


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    ],
    ids=str,
)
def test_longer_than_the_model_means_linear_and_says_so(spelling: dict[str, Any]) -> None:
    values = {**TINY, "max_position_embeddings": 4096, **spelling}
    _, config, message = scaled(values, 10240)
    theta = decoder_config(values).rope.rope_theta
    assert config.rope == RopeParameters(rope_type="linear", rope_theta=theta, factor=2.5)
    assert config.max_position_embeddings == 10240
    assert message == (
        "RoPE scaling (linear, factor 2.5) takes the model from 4096 positions to 10240, because max_seq_length is "
        "10240; rope_scaling chooses another type"
    )


@pytest.mark.parametrize("rope_type", [*SCALINGS, "longrope"])
def test_a_file_without_head_dim_gets_it_where_transformers_needs_it(rope_type: str) -> None:
    """Mixtral's configuration is the one for which transformers does not fill it in."""
    values = {**TINY, "model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4}
    factors = [1.0, 2.0, 3.0, 4.0]
    longrope = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
    result, config, _ = scaled(
        {**values, "max_position_embeddings": 2048}, 8192, longrope if rope_type == "longrope" else rope_type
    )
    assert (config.rope.rope_type, config.rope.factor) == (rope_type, 4.0)
    assert result.get("head_dim") == (None if rope_type in ("linear", "llama3") else config.head_dim)


def test_the_default_length_of_a_file_without_one_is_the_families() -> None:
    assert "max_position_embeddings" not in TINY
    _, config, message = scaled(TINY, 4096)
    assert config.rope.factor == 2.0
    assert "from 2048 positions to 4096" in message


@pytest.mark.parametrize("name", SCALINGS)
def test_no_length_is_lost_to_rounding(name: str) -> None:
    for length in (*range(2049, 4100, 41), 10**6 + 1):
        result, message = scaled_config(TINY, length, name)
        assert decoder_config(result).longest_document == length
        assert str(message).endswith(f"to {length}")
        assert scaled_config(result, length) == (result, None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", RopeParameters(rope_type="linear", factor=4.0)),
        ("yarn", RopeParameters(rope_type="yarn", factor=4.0, original_max_position_embeddings=2048)),
        ("llama3", RopeParameters(rope_type="llama3", factor=4.0, original_max_position_embeddings=2048)),
    ],
)
def test_a_type_by_name(name: str, expected: RopeParameters) -> None:
    result, config, message = scaled(TINY, 8192, name)
    assert config.rope == expected
    assert config.max_position_embeddings == config.longest_document == 8192
    assert message == f"RoPE scaling ({name}, factor 4) takes the model from 2048 positions to 8192"
    assert scaled(result, 8192, name)[0] == result, "asked again of the result, it stays"
    assert scaled(result, None)[0] == result


def test_dynamic_scales_from_max_position_embeddings_which_therefore_stays() -> None:
    result, config, message = scaled(TINY, 8192, "dynamic")
    assert config.rope == RopeParameters(rope_type="dynamic", factor=4.0, max_position_embeddings=2048)
    assert config.max_position_embeddings == 2048
    assert config.longest_document == 8192
    assert message == "RoPE scaling (dynamic, factor 4) takes the model from 2048 positions to 8192"
    assert scaled(result, 8192, "dynamic")[0] == scaled(result, 5000)[0] == result
    with pytest.raises(ValueError, match=r"max_seq_length 8193 cannot be had: .* 'dynamic'"):
        scaled_config(result, 8193)


def test_the_recipe_of_qwen() -> None:
    """Qwen3 says 40960 positions, was trained on 32768, and reaches four times those."""
    recipe = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    values = {**TINY, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": HEAD_DIM, "rope_theta": 1e6}
    values["max_position_embeddings"] = 40960
    expected = RopeParameters(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
    without_factor = {key: value for key, value in recipe.items() if key != "factor"}
    for max_seq_length, scaling in ((None, recipe), (131072, recipe), (1000, recipe), (131072, without_factor)):
        result, config, message = scaled(values, max_seq_length, scaling)
        assert result["rope_scaling"] == recipe
        assert config.rope == expected
        assert config.max_position_embeddings == 131072
        assert message == "RoPE scaling (yarn, factor 4) takes the model from 32768 positions to 131072"
    old_name = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert scaled(values, None, old_name)[0]["rope_scaling"] == recipe


def test_a_dict_keeps_what_else_it_says() -> None:
    _, config, _ = scaled(TINY, None, {"rope_type": "yarn", "factor": 2, "beta_fast": 16, "attention_factor": 1.5})
    assert config.rope == RopeParameters(
        rope_type="yarn", factor=2.0, original_max_position_embeddings=2048, beta_fast=16.0, attention_factor=1.5
    )
    assert config.max_position_embeddings == 4096
    llama3 = {"rope_type": "llama3", "factor": 4.0, "high_freq_factor": 8.0}
    assert scaled(TINY, None, llama3)[1].rope.high_freq_factor == 8.0


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaled_model_is_the_same_to_transformers(name: str, tmp_path: Path) -> None:
    """Weights saved beside the new config.json give equal logits, below and beyond the trained length."""
    folder = saved(tiny_llama(max_position_embeddings=32), tmp_path)
    plain = load_model(folder, bits=32, device="cpu")
    config, _ = scaled_config(json.loads((folder / "config.json").read_text()), 96, name)
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder, bits=32, device="cpu")
    for length in (20, 90):
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = token_ids(1, length)
        with torch.no_grad():
            logits = model(ids).logits
            torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=1e-4)
            changed = (logits - plain(ids).logits).abs().max()
        assert (changed > 0.01) == (length > 32 or name != "dynamic")


@pytest.mark.parametrize("is_new", [False, True], ids=["old", "new"])
@pytest.mark.parametrize("is_multimodal", [False, True], ids=["text", "multimodal"])
def test_of_gemma3_the_global_layers_are_scaled(is_new: bool, is_multimodal: bool) -> None:
    text = {**GEMMA3, "max_position_embeddings": 64}
    if is_new:
        text["rope_parameters"] = {
            "full_attention": {"rope_type": "default", "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    else:
        text |= {"rope_theta": 1e5, "rope_local_base_freq": 100}
    values = {"model_type": "gemma3", "text_config": text, "vision_config": {}} if is_multimodal else text
    result, message = scaled_config(values, 256)
    config = decoder_config(result)
    assert config.rope == RopeParameters(rope_type="linear", rope_theta=1e5, factor=4.0)
    assert config.local_rope == RopeParameters(rope_theta=100.0)
    assert config.max_position_embeddings == 256
    assert message is not None
    assert "from 64 positions to 256" in message
    assert text["max_position_embeddings"] == 64


@pytest.mark.parametrize("beside", [None, 32, 128])
def test_the_length_that_a_scaling_names_wins_over_one_beside_it(beside: int | None) -> None:
    """Phi-3's files have one there, and without it its class means 4096."""
    values = {key: value for key, value in PHI3.items() if key != "original_max_position_embeddings"}
    values |= {} if beside is None else {"original_max_position_embeddings": beside}
    scaling = {"rope_type": "longrope", **FACTORS}
    for extra, trained in (({}, 128), ({"original_max_position_embeddings": 64}, 64)):
        _, config, message = scaled(values, 256, {**scaling, **extra})
        assert config.rope.original_max_position_embeddings == trained
        assert f"takes the model from {trained} positions to 256" in message


def test_no_file_keeps_a_length_that_contradicts_the_scaling() -> None:
    values = {**TINY, "max_position_embeddings": 64, "original_max_position_embeddings": 24}
    for rope_type in ("yarn", "llama3"):
        assert scaled(values, 256, rope_type)[1].rope.original_max_position_embeddings == 64


def test_phi3_has_no_other_type_than_longrope() -> None:
    with pytest.raises(ValueError, match=r"config.json with rope_scaling: RoPE type 'linear' is not one that Phi-3"):
        scaled_config(PHI3, 256)
    with pytest.raises(StrictDataclassClassValidationError, match="must be one of"):
        Phi3Config.from_dict({**PHI3, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    short = {**PHI3, "max_position_embeddings": 32}
    _, config, message = scaled(short, None, {"rope_type": "longrope", "factor": 4.0, **FACTORS})
    assert config.rope == RopeParameters(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=32,
        short_factor=tuple(map(float, FACTORS["short_factor"])),
        long_factor=tuple(map(float, FACTORS["long_factor"])),
    )
    assert config.max_position_embeddings == 128
    assert message == "RoPE scaling (longrope, factor 4) takes the model from 32 positions to 128"


def test_a_scaling_that_is_not_needed_is_left_out_and_said_so() -> None:
    result, message = scaled_config(TINY, 1024, "yarn")
    assert result == TINY
    assert message == (
        "rope_scaling 'yarn' is left out: max_seq_length 1024 is within the 2048 positions that the model was made for"
    )


@pytest.mark.parametrize(
    ("change", "max_seq_length", "rope_scaling", "message"),
    [
        ({}, None, "yarn", r"rope_scaling 'yarn' has no factor; give max_seq_length \(above 2048\), or a dict"),
        ({}, 4096, "yarm", "rope_scaling must be one of linear, dynamic, yarn, llama3, or a dict .*, got 'yarm'"),
        ({}, 4096, 2.0, "rope_scaling must be one of .*, got 2.0"),
        ({}, 4096, {"factor": 2.0}, "rope_scaling needs a rope_type beside 'factor': linear, dynamic, yarn, llama3"),
        ({}, 4096, {"rope_type": "default"}, "rope_type must be one of .*, got 'default'"),
        ({}, 4096, {"rope_type": "linear", "factor": 1.5}, r"factor 1.5 reaches 3072 .* max_seq_length 4096; .* 2$"),
        ({}, 4096, {"rope_type": "linear", "factor": "2"}, "factor must be a number above 1, got '2'"),
        ({}, None, {"rope_type": "linear", "factor": 0.5}, "factor must be a number above 1, got 0.5"),
        ({}, None, {"rope_type": "yarn", "factor": 2.0, "beta": 1}, "with rope_scaling, RoPE: the key 'beta'"),
        (
            {},
            4096,
            {"rope_type": "yarn", "original_max_position_embeddings": 0},
            "original_max_position_embeddings must be a positive int, got 0",
        ),
        ({}, 0, None, "max_seq_length must be at least 1, got 0"),
        ({}, 4096, {"rope_type": "longrope", "factor": 2.0}, "lacks the key 'short_factor'"),
        (
            {"rope_scaling": LLAMA3},
            4096,
            None,
            r"max_seq_length 4096 cannot be had: .*\(type 'llama3'\), for 2048 positions; use max_seq_length up to",
        ),
        ({"rope_scaling": LLAMA3}, 4096, "linear", "rope_scaling 'linear' cannot be had"),
        ({"rope_scaling": LLAMA3}, 1024, "yarn", "rope_scaling 'yarn' cannot be had"),
        ({"rope_scaling": YARN}, 1024, {**YARN, "factor": 8.0}, "cannot be had"),
        ({"rope_scaling": {"rope_type": "ntk"}}, 4096, None, "config.json: RoPE type 'ntk'"),
    ],
    ids=str,
)
def test_scaling_that_cannot_be_had(
    change: dict[str, Any], max_seq_length: int | None, rope_scaling: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        scaled_config({**TINY, **change}, max_seq_length, rope_scaling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rope_scaling", [None, "dynamic"])
def test_a_family_that_knows_no_such_scaling_says_how_far_it_goes(rope_scaling: str | None) -> None:
    values = {**PHI3, "max_position_embeddings": 32}
    with pytest.raises(ValueError, match=r"cannot be stretched with RoPE type '\w+' \(.*; use max_seq_length up to 32"):
        scaled_config(values, 64, rope_scaling)
