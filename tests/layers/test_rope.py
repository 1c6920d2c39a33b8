"""Cosines and sines of rotary positions, of every type, against transformers."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from slothcore.layers.rope import RopeParameters, RotaryEmbedding, inverse_frequencies

HEAD_DIM = 64
TRAINED = 40  # positions, so that short tests reach beyond
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": TRAINED}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
TYPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "dynamic, odd factor": {"rope_type": "dynamic", "factor": 1.3},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "yarn": YARN,
    "yarn, fitted": {**YARN, "rope_theta": 1e6, "original_max_position_embeddings": 32768},
    "yarn, no truncation": {**YARN, "truncate": False},
    "yarn, betas": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5},
    "yarn, mscales": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, one mscale": {**YARN, "mscale": 0.7},
    "yarn, attention factor": {**YARN, "attention_factor": 0.8},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "short_factor": tuple(1.0 + 0.01 * i for i in range(HEAD_DIM // 2)),
        "long_factor": tuple(1.0 + 0.3 * i for i in range(HEAD_DIM // 2)),
    },
}
TYPES["longrope, attention factor"] = {**TYPES["longrope"], "attention_factor": 1.7}
TYPES["longrope, factor 1"] = {**TYPES["longrope"], "factor": 1.0}
LENGTH_DEPENDENT = [name for name, rope in TYPES.items() if rope["rope_type"] in ("dynamic", "longrope")]


def ours(rope: dict[str, Any]) -> RotaryEmbedding:
    return RotaryEmbedding(RopeParameters(**{"rope_theta": 1e4, "max_position_embeddings": TRAINED, **rope}), HEAD_DIM)


def transformers_config(rope: dict[str, Any]) -> LlamaConfig:
    listed = {key: list(value) if isinstance(value, tuple) else value for key, value in rope.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaConfig(
            hidden_size=2 * HEAD_DIM,
            num_attention_heads=2,
            max_position_embeddings=TRAINED,
            rope_parameters={"rope_theta": 1e4, **listed},
        )


def theirs(rope: dict[str, Any], position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """[T, P] from a fresh module, which no earlier and longer text has left grown."""
    cos, sin = LlamaRotaryEmbedding(transformers_config(rope))(torch.zeros(1), position_ids[None])
    return cos[0, :, : HEAD_DIM // 2], sin[0, :, : HEAD_DIM // 2]


def assert_equal_pairs(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_frequencies_and_attention_factor_are_those_of_transformers_to_the_bit(rope: dict[str, Any]) -> None:
    config = transformers_config(rope)
    compute = ROPE_INIT_FUNCTIONS.get(rope["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, attention_factor = compute(config)
    parameters = ours(rope).rope
    assert torch.equal(inverse_frequencies(parameters, HEAD_DIM), expected)
    assert parameters.attention_scaling == attention_factor
    if rope["rope_type"] == "longrope":
        long, attention_factor = compute(config, seq_len=TRAINED + 1)
        assert torch.equal(inverse_frequencies(parameters, HEAD_DIM, is_long=True), long)
        assert parameters.attention_scaling == attention_factor
        assert not torch.equal(long, expected)


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED, TRAINED + 1, 3 * TRAINED])
@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_angles_are_those_of_transformers_before_and_beyond_the_original_length(
    rope: dict[str, Any], length: int
) -> None:
    positions = torch.arange(length)
    boundaries = torch.tensor([0, length], dtype=torch.int32)
    assert_equal_pairs(ours(rope)(positions, boundaries), theirs(rope, positions))


@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_a_packed_document_gets_the_angles_that_it_gets_alone(rope: dict[str, Any]) -> None:
    lengths = [TRAINED, 5, 2 * TRAINED, TRAINED + 1, 1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    cos, sin = ours(rope)(positions, boundaries)
    for pair, length in zip(zip(cos.split(lengths), sin.split(lengths), strict=True), lengths, strict=True):
        assert_equal_pairs(pair, theirs(rope, torch.arange(length)))


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_the_largest_position_of_a_document_counts_wherever_it_stands(name: str) -> None:
    positions = torch.tensor([2 * TRAINED, 0, 1, 3, 4])
    cos, sin = ours(TYPES[name])(positions, torch.tensor([0, 3, 5], dtype=torch.int32))
    assert_equal_pairs((cos[:3], sin[:3]), theirs(TYPES[name], positions[:3]))
    assert_equal_pairs((cos[3:], sin[3:]), theirs(TYPES[name], positions[3:]))


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_decoding_takes_each_token_as_the_last_of_its_text(name: str) -> None:
    positions = torch.tensor([3, TRAINED - 1, TRAINED, 2 * TRAINED])
    cos, sin = ours(TYPES[name])(positions)
    for row, position in enumerate(positions):
        assert_equal_pairs((cos[row : row + 1], sin[row : row + 1]), theirs(TYPES[name], position[None]))
    whole = ours(TYPES[name])(positions, torch.tensor([0, 4], dtype=torch.int32))
    assert not torch.allclose(whole[0][1], cos[1]), "one long document turns its early tokens otherwise"


def test_part_of_a_head_turns_as_in_phi3() -> None:
    rotary_dim = 48
    rope = {**TYPES["longrope"], "partial_rotary_factor": 0.75}
    for key in ("short_factor", "long_factor"):
        rope[key] = rope[key][: rotary_dim // 2]
    config = Phi3Config(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=4 * TRAINED,
        original_max_position_embeddings=TRAINED,
        pad_token_id=0,
        rope_parameters={**rope, "rope_theta": 1e4, **{k: list(rope[k]) for k in ("short_factor", "long_factor")}},
    )
    for length in (TRAINED, TRAINED + 1):
        positions = torch.arange(length)
        expected = [
            value[0, :, : rotary_dim // 2] for value in Phi3RotaryEmbedding(config)(torch.zeros(1), positions[None])
        ]
        cos, sin = ours(rope)(positions, torch.tensor([0, length], dtype=torch.int32))
        assert cos.shape == (length, rotary_dim // 2)
        assert_equal_pairs((cos, sin), (expected[0], expected[1]))


def test_angles_are_position_times_frequency() -> None:
    embedding = RotaryEmbedding(RopeParameters(rope_theta=100.0), head_dim=4)
    cos, sin = embedding(torch.tensor([0, 3, 10]))
    angles = torch.tensor([[p * 1.0, p * 100**-0.5] for p in (0, 3, 10)])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())
    assert cos.dtype == sin.dtype == torch.float32


def test_linear_scaling_stretches_positions() -> None:
    stretched = RotaryEmbedding(RopeParameters(rope_type="linear", factor=4.0), head_dim=8)
    plain = RotaryEmbedding(RopeParameters(), head_dim=8)
    for stretched_values, expected in zip(stretched(torch.tensor([4, 40])), plain(torch.tensor([1, 10])), strict=True):
        torch.testing.assert_close(stretched_values, expected)


def test_llama3_scaling_has_three_regions() -> None:
    parameters = RopeParameters(rope_type="llama3", rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192)
    scaled = inverse_frequencies(parameters, 128)
    plain = inverse_frequencies(RopeParameters(rope_theta=5e5), 128)
    wavelength = 2 * math.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    between = ~short & ~long
    assert all(region.any() for region in (short, long, between))
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_frequencies_survive_casts_and_stay_out_of_checkpoints(rope: dict[str, Any]) -> None:
    embedding = ours(rope)
    positions, boundaries = torch.tensor([3, 100_000]), torch.tensor([0, 1, 2])
    before = embedding(positions, boundaries)
    embedding.to(torch.bfloat16)
    for now, expected in zip(embedding(positions, boundaries), before, strict=True):
        assert torch.equal(now, expected)
    assert not embedding.state_dict()
    with torch.device("meta"):
        built = ours(rope)
    assert torch.equal(built(positions, boundaries)[0], before[0])


@pytest.mark.gpu
@pytest.mark.parametrize("rope", TYPES.values(), ids=TYPES)
def test_gpu_agrees_and_never_waits_for_the_gpu(rope: dict[str, Any]) -> None:
    lengths = [TRAINED, 5, 2 * TRAINED, TRAINED + 1, 1]
    positions = torch.cat([torch.arange(length) for length in lengths])
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    embedding = ours(rope)
    expected = embedding(positions, boundaries)
    on_gpu, gpu_boundaries = positions.cuda(), boundaries.cuda()
    embedding(on_gpu)  # moves the frequencies, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = embedding(on_gpu, gpu_boundaries)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, reference in zip(actual, expected, strict=True):
        # The GPU's pow and cos differ in the last bits; positions up to 80 multiply what frequencies differ by.
        torch.testing.assert_close(value.cpu(), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_type": "ntk"}, "rope_type must be one of default, linear, dynamic, llama3, yarn, longrope, got 'ntk'"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"rope_theta": 1.0}, "rope_theta must exceed 1"),
        ({"factor": -1.0}, "factor must be positive"),
        ({"rope_type": "dynamic", "factor": 0.5}, "factor must be at least 1 for the type dynamic"),
        ({"low_freq_factor": 4.0}, "high_freq_factor must exceed low_freq_factor"),
        ({"beta_slow": 40.0}, "beta_fast must exceed beta_slow, got 32.0 and 40.0"),
        ({"attention_factor": 0.0}, "attention_factor must be positive"),
        ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor must lie in \(0, 1\], got 1.5"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings must exceed 1"),
        ({"short_factor": (1.0, 0.0)}, "short_factor must hold positive numbers only"),
    ],
    ids=str,
)
def test_wrong_parameters(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeParameters(**wrong)


@pytest.mark.parametrize(
    ("parameters", "head_dim", "message"),
    [
        (RopeParameters(), 7, "head_dim must be even, got 7"),
        (
            RopeParameters(partial_rotary_factor=0.25),
            20,
            r"head_dim \* partial_rotary_factor 0.25 must be even, got 5 \(head_dim 20\)",
        ),
        (RopeParameters(partial_rotary_factor=0.1), 8, "must be even, got 0"),
        (RopeParameters(rope_type="dynamic"), 2, "more than 2 rotated channels"),
        (
            RopeParameters(rope_type="longrope", short_factor=(1.0,) * 4, long_factor=(1.0,) * 3),
            8,
            "long_factor must have 4 entries, one for each pair of the 8 rotated channels, got 3",
        ),
    ],
    ids=str,
)
def test_heads_that_do_not_fit(parameters: RopeParameters, head_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(parameters, head_dim)


@pytest.mark.parametrize("rope_type", ["default", "dynamic", "longrope"])
def test_tables_stay_where_a_captured_graph_reads_them(rope_type: str) -> None:
    """When the model has been on another device meanwhile."""
    rotary = RotaryEmbedding(RopeParameters(max_position_embeddings=TRAINED, **TYPES[rope_type]), HEAD_DIM)
    positions = torch.arange(2 * TRAINED)
    expected, tables = rotary(positions), rotary._on_device[positions.device]
    assert rotary(positions.to("meta"))[0].is_meta
    for actual, before in zip(rotary(positions), expected, strict=True):
        assert torch.equal(actual, before)
    assert rotary._on_device[positions.device] is tables
