"""Cosines and sines of rotary positions; tests/models/test_config.py compares the frequencies with transformers."""

import math

import pytest
import torch

from slothcore.layers.rope import RopeParameters, RotaryEmbedding, inverse_frequencies


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
    for ours, expected in zip(stretched(torch.tensor([4, 40])), plain(torch.tensor([1, 10])), strict=True):
        torch.testing.assert_close(ours, expected)


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


def test_frequencies_survive_casts_and_stay_out_of_checkpoints() -> None:
    embedding = RotaryEmbedding(RopeParameters(), head_dim=64)
    positions = torch.tensor([100_000])
    before = embedding(positions)
    embedding.to(torch.bfloat16)
    for ours, expected in zip(embedding(positions), before, strict=True):
        assert torch.equal(ours, expected)
    assert not embedding.state_dict()
    with torch.device("meta"):
        built = RotaryEmbedding(RopeParameters(), head_dim=64)
    assert torch.equal(built(positions)[0], before[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rope_type": "dynamic"}, "rope_type must be one of default, linear, llama3, got 'dynamic'"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"factor": -1.0}, "factor must be positive"),
        ({"low_freq_factor": 4.0}, "high_freq_factor must exceed low_freq_factor"),
    ],
    ids=str,
)
def test_wrong_parameters(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeParameters(**wrong)
