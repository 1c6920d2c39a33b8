"""Reading RoPE from config.json in every spelling."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slothcore.layers.rope import RopeParameters, RotaryEmbedding, inverse_frequencies
from slothcore.models.families import decoder_config
from tests.models.test_config import TINY

HEAD_DIM = 8
LENGTHS = {"max_position_embeddings": 128}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 2], "long_factor": [1.5, 3.0, 7.0, 20.0]}
PHI3: dict[str, Any] = {
    **TINY,
    **LENGTHS,
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
}
GEMMA3: dict[str, Any] = {**TINY, "model_type": "gemma3_text", "head_dim": HEAD_DIM, "sliding_window": 16}
GEMMA3 |= {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 2}

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn without a length": {"rope_type": "yarn", "factor": 4.0},
    "yarn with everything": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 6,
        "beta_slow": 2,
        "mscale": 0.8,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    "yarn with an attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
    "yarn with neutral zeros": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "mscale": 0, "mscale_all_dim": 0},
    "yarn with factor null": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32, **FACTORS},
    "longrope with a factor": {
        "rope_type": "longrope",
        "factor": 3.0,
        "original_max_position_embeddings": 32,
        **FACTORS,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_old_and_new_spelling_mean_what_they_mean_to_transformers(scaling: dict[str, Any]) -> None:
    new = {**TINY, **LENGTHS, "rope_parameters": {"rope_theta": 5e5, **scaling}}
    old = {**TINY, **LENGTHS, "rope_theta": 5e5, "rope_scaling": scaling}
    renamed = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    oldest = {**TINY, **LENGTHS, "rope_theta": 5e5, "rope_scaling": renamed}
    read = decoder_config(new).rope
    assert read == decoder_config(old).rope == decoder_config(oldest).rope
    for spelling in (new, old, oldest):
        reference = LlamaConfig.from_dict(json.loads(json.dumps(spelling)))
        expected, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](reference)
        assert torch.equal(inverse_frequencies(read, HEAD_DIM), expected)
        assert read.attention_scaling == attention_factor
        positions = torch.arange(150)
        cos, sin = LlamaRotaryEmbedding(reference)(torch.zeros(1), positions[None])
        ours = RotaryEmbedding(read, HEAD_DIM)(positions, torch.tensor([0, 150]))
        torch.testing.assert_close(ours[0], cos[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-7)
        torch.testing.assert_close(ours[1], sin[0, :, : HEAD_DIM // 2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_phi3_names_and_lengths(name: str, key: str) -> None:
    values = {**PHI3, "rope_scaling": {key: name, **FACTORS}}
    rope = decoder_config(values).rope
    assert (rope.rope_type, rope.original_max_position_embeddings, rope.factor) == ("longrope", 32, 4.0)
    assert rope.attention_scaling == math.sqrt(1 + math.log(4) / math.log(32))
    # transformers 5 no longer reads "su", the name in the first files.
    reference = Phi3Config.from_dict({**values, "rope_scaling": {key: name.replace("su", "longrope"), **FACTORS}})
    assert reference.rope_parameters["rope_type"] == "longrope"
    for length in (None, 33):
        expected, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](reference, seq_len=length)
        assert torch.equal(inverse_frequencies(rope, HEAD_DIM, is_long=length is not None), expected)
        assert rope.attention_scaling == attention_factor


def test_phi4_mini_turns_part_of_a_head() -> None:
    factors = {key: value[:3] for key, value in FACTORS.items()}
    beside = {**PHI3, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **factors}}
    within = {**PHI3, "rope_parameters": {"rope_type": "longrope", "partial_rotary_factor": 0.75, **factors}}
    rope = decoder_config(beside).rope
    assert rope == decoder_config(within).rope
    assert rope.rotary_dim(HEAD_DIM) == 6


def test_the_published_phi_35(shared_data: Path) -> None:
    file = shared_data / "configs" / "Phi-3.5-mini-instruct.json"
    rope = decoder_config(json.loads(file.read_text())).rope
    assert (rope.rope_type, rope.factor, rope.original_max_position_embeddings) == ("longrope", 32.0, 4096)
    assert rope.attention_scaling == pytest.approx(1.190238, abs=1e-6)
    reference = AutoConfig.for_model(**json.loads(file.read_text()))
    for length in (None, 4097):
        expected, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](reference, seq_len=length)
        assert torch.equal(inverse_frequencies(rope, 96, is_long=length is not None), expected)
        assert rope.attention_scaling == attention_factor


def test_gemma3_has_two_ropes_in_both_spellings() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    old = {**GEMMA3, "rope_theta": 1e5, "rope_local_base_freq": 100, "rope_scaling": linear}
    new = {
        **GEMMA3,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e5, **linear},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    }
    ropes = [(config.rope, config.local_rope) for config in (decoder_config(old), decoder_config(new))]
    assert ropes[0] == ropes[1]
    assert ropes[0] == (
        RopeParameters(rope_type="linear", rope_theta=1e5, factor=8.0),
        RopeParameters(rope_theta=100.0),
    )
    for values in (old, new):
        reference = Gemma3RotaryEmbedding(Gemma3TextConfig.from_dict(json.loads(json.dumps(values))))
        for rope, kind in zip(ropes[0], ("full_attention", "sliding_attention"), strict=True):
            assert rope is not None
            assert torch.equal(inverse_frequencies(rope, HEAD_DIM), getattr(reference, f"{kind}_inv_freq"))


def test_gemma3_defaults() -> None:
    config = decoder_config(GEMMA3)
    assert (config.rope, config.local_rope) == (RopeParameters(rope_theta=1e6), RopeParameters(rope_theta=1e4))
    empty = {"full_attention": None, "sliding_attention": {"rope_type": "default"}}
    assert decoder_config({**GEMMA3, "rope_parameters": empty}) == config


def test_both_spellings_at_once_must_agree() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    agreed = {**TINY, "rope_parameters": {"rope_theta": 1e5, **linear}, "rope_scaling": linear}
    assert decoder_config(agreed).rope == RopeParameters(rope_type="linear", rope_theta=1e5, factor=2.0)
    for values in (
        {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "rope_scaling": linear},
        {**GEMMA3, "rope_parameters": {"full_attention": {"rope_theta": 1e5}}, "rope_scaling": linear},
    ):
        with pytest.raises(ValueError, match="rope_parameters and rope_scaling contradict each other"):
            decoder_config(values)


def test_theta_in_the_dict_wins_over_theta_beside_it() -> None:
    values = {**TINY, "rope_theta": 7.0, "rope_parameters": {"rope_theta": 1e5}}
    assert decoder_config(values).rope.rope_theta == 1e5
    assert LlamaConfig.from_dict(values).rope_parameters["rope_theta"] == 1e5


def test_of_two_ropes_transformers_does_not_read_truncate() -> None:
    """So that a model would learn with other angles than its export is run with."""
    values = {**GEMMA3, "rope_parameters": {"full_attention": {**GEMMA3_YARN, "truncate": False}}}
    reference = Gemma3TextConfig.from_dict(json.loads(json.dumps(values)))
    found, _ = ROPE_INIT_FUNCTIONS["yarn"](reference, layer_type="full_attention")
    read = decoder_config({**GEMMA3, "rope_parameters": {"full_attention": GEMMA3_YARN}}).rope
    assert torch.equal(inverse_frequencies(read, HEAD_DIM), found)
    assert not torch.equal(inverse_frequencies(replace(read, truncate=False), HEAD_DIM), found)


LONG = {"rope_type": "longrope", **FACTORS}
GEMMA3_YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("base", "rope", "message"),
    [
        (TINY, {"rope_type": "ntk", "factor": 2.0}, "RoPE type 'ntk' is not supported; known are default, linear, dyn"),
        (TINY, {"rope_type": 3}, "rope_type must be str, got 3"),
        (TINY, {"rope_type": "dynamic"}, "lacks the key 'factor'"),
        (TINY, {"rope_type": "yarn"}, "lacks the key 'factor', or 'original_max_position_embeddings'"),
        (TINY, {"rope_type": "linear", "factor": "2"}, "factor must be float or int, got '2'"),
        (TINY, {"rope_type": "linear", "factor": 2, "beta_fast": 3}, "the key 'beta_fast' .* is not supported"),
        (TINY, {"rope_type": "yarn", "factor": 2, "beta_fats": 3}, "'beta_fats' .*did you mean 'beta_fast'"),
        (TINY, {"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}, "beta_fast must exceed beta_slow"),
        (TINY, {"rope_type": "yarn", "factor": 2, "truncate": 1}, "truncate must be bool, got 1"),
        (
            TINY,
            {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 64},
            "scales from max_position_embeddings, 2048, and original_max_position_embeddings says 64",
        ),
        (TINY, {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        (TINY, LONG, "lacks the key 'factor', or 'original_max_position_embeddings'"),
        (TINY, {**LONG, "original_max_position_embeddings": 1}, "original_max_position_embeddings must exceed 1"),
        (PHI3, {"rope_type": "linear", "factor": 2.0}, "RoPE type 'linear' is not one that Phi-3 has"),
        (PHI3, {**LONG, "short_factor": [1.0]}, "short_factor must have 4 entries, .* 8 rotated channels, got 1"),
        (PHI3, {**LONG, "long_factor": [1.0] * 5}, "long_factor must have 4 entries, .* got 5"),
        (PHI3, {**LONG, "long_factor": [1.0, 2.0, "3", 4.0]}, "long_factor must be a list of numbers, got '3'"),
        (PHI3, {**LONG, "long_factor": [1.0, 2.0, -3, 4.0]}, "long_factor must hold positive numbers only"),
        (PHI3, {"rope_type": "longrope", "short_factor": [1.0] * 4}, "lacks the key 'long_factor'"),
        (
            PHI3,
            {**LONG, "partial_rotary_factor": 0.6},
            "short_factor must have 2 entries, .* 4 rotated channels, got 4",
        ),
        (PHI3, {**LONG, "long_mscale": 1.2}, "'long_mscale' .* is not supported"),
        (GEMMA3, {"rope_type": "linear", "factor": 2.0}, "rope_parameters: the key 'rope_type' .* is not supported"),
        (GEMMA3, {"full_attention": {"rope_type": "linear"}}, "lacks the key 'factor'"),
        (GEMMA3, {"sliding_attention": {"rope_theta": 1e4, "base": 2}}, "the key 'base' .* is not supported"),
        (GEMMA3, {"slide_attention": {}}, "'slide_attention' .*did you mean 'sliding_attention'"),
        (GEMMA3, {"full_attention": {**GEMMA3_YARN, "truncate": False}}, "truncate = false .* leave it out"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused_by_name(base: dict[str, Any], rope: dict[str, Any], message: str) -> None:
    decoder_config(base)
    with pytest.raises(ValueError, match=message) as caught:
        decoder_config({**base, "rope_parameters": rope}, "here/config.json")
    assert str(caught.value).startswith("here/config.json")
    assert "\n" not in str(caught.value)


def test_the_factor_by_which_authors_undo_the_growth_of_yarn() -> None:
    """As in DeepSeek-R1-0528-Qwen3-8B: 0.878 times what a factor of 4 gives is one."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    own = decoder_config({**TINY, "rope_scaling": {**scaling, "attn_factor": 0.8782488562869419}}).rope
    assert own.attention_scaling == pytest.approx(1.0)
    assert decoder_config({**TINY, "rope_scaling": scaling}).rope.attention_scaling == pytest.approx(1.1386294)
