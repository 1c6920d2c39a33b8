"""The mixtures of GGUF files against what `llama-quantize --dry-run` of llama.cpp chose for the same tensors."""

from dataclasses import replace

import pytest

from benchmarks.gguf_quantize import LLAMA_8B, tensors_of_8b
from slothcore.export.gguf_types import MIXTURES, Kind, Mixture, kind_of, row_bytes, tensor_bytes
from slothcore.models.config import DecoderConfig, MoeConfig

# Bits a number of each kind: those of the number, and the block's scales and minima spread over its numbers.
BITS = {
    "Q8_0": 8 + 16 / 32,
    "Q6_K": 6 + (16 * 8 + 16) / 256,
    "Q5_K": 5 + (8 * 12 + 32) / 256,
    "Q4_K": 4 + (8 * 12 + 32) / 256,
}
# Which layers had Q6_K for `ffn_down` and for the values of attention, by the number of layers.
LAYERS_WITH_MORE_BITS = {
    7: {2, 5, 6},
    26: {0, 1, 2, 5, 8, 11, 14, 17, 20, 22, 23, 24, 25},
    32: {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31},
    48: {0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35, 38, 41, 42, 43, 44, 45, 46, 47},
}


def config_of(
    model_type: str = "llama", *, layers: int = 32, heads: int = 32, kv_heads: int = 8, experts: int = 0
) -> DecoderConfig:
    moe = None
    if experts:
        moe = MoeConfig(
            num_experts=experts,
            experts_per_token=2,
            intermediate_size=14336,
            normalize_weights=True,
            layers=(True,) * layers,
        )
    return replace(
        LLAMA_8B,
        model_type=model_type,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        moe=moe,
    )


def kind(name: str, mixture: Mixture, config: DecoderConfig, *, columns: int = 4096, tied: bool = False) -> Kind:
    return kind_of(name, mixture, config, shape=(64, columns), tied=tied)


@pytest.mark.parametrize(
    ("mixture", "usual", "more"),
    [("Q8_0", "Q8_0", "Q8_0"), ("Q6_K", "Q6_K", "Q6_K"), ("Q5_K_M", "Q5_K", "Q6_K"), ("Q4_K_M", "Q4_K", "Q6_K")],
)
def test_the_bytes_of_an_8b_model(mixture: Mixture, usual: str, more: str) -> None:
    """Counted by hand: the head has more bits, and so have values and `ffn_down` of half of the 32 layers."""
    table, wide, narrow, mlp = 128256 * 4096, 4096 * 4096, 1024 * 4096, 14336 * 4096
    with_more = table + 16 * (narrow + mlp)
    without = table + 32 * (2 * wide + narrow + 2 * mlp) + 16 * (narrow + mlp)
    in_float32 = (2 * 32 + 1) * 4096 + 64  # the norms, and RoPE's factors
    expected = (with_more * BITS[more] + without * BITS[usual]) / 8 + 4 * in_float32
    found = sum(
        tensor_bytes(kind_of(name, mixture, LLAMA_8B, shape=shape, tied=False), shape)
        for name, shape in tensors_of_8b()
    )
    assert found == expected


@pytest.mark.parametrize("layers", LAYERS_WITH_MORE_BITS)
@pytest.mark.parametrize("place", ["attn_v", "attn_qkv", "ffn_down", "ffn_down_exps"])
def test_some_layers_get_more_bits(layers: int, place: str) -> None:
    config = config_of(layers=layers, experts=16 if place.endswith("exps") else 0)
    for mixture, usual in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K"), ("Q6_K", "Q6_K"), ("Q8_0", "Q8_0")):
        expected = {
            layer: "Q6_K" if mixture.endswith("M") and layer in LAYERS_WITH_MORE_BITS[layers] else usual
            for layer in range(layers)
        }
        assert {layer: kind(f"blk.{layer}.{place}.weight", mixture, config) for layer in range(layers)} == expected


@pytest.mark.parametrize("place", ["attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "ffn_up_exps"])
def test_other_weights_get_the_usual_kind_in_every_layer(place: str) -> None:
    for mixture, usual in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K"), ("Q6_K", "Q6_K")):
        found = {kind(f"blk.{layer}.{place}.weight", mixture, config_of()) for layer in range(32)}
        assert found == {usual}


def test_the_head_gets_six_bits_and_so_does_an_embedding_that_is_the_head() -> None:
    config = config_of()
    for mixture, usual in (("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K"), ("Q6_K", "Q6_K")):
        assert kind("output.weight", mixture, config) == "Q6_K"
        assert kind("token_embd.weight", mixture, config) == usual
        assert kind("token_embd.weight", mixture, config, tied=True) == "Q6_K"
    assert kind("output.weight", "Q8_0", config) == kind("token_embd.weight", "Q8_0", config, tied=True) == "Q8_0"


def test_a_model_of_eight_experts_has_finer_attention() -> None:
    eight = config_of("mixtral", experts=8)
    for layer in (0, 4, 31):
        block = f"blk.{layer}."
        for mixture in ("Q4_K_M", "Q5_K_M", "Q6_K"):
            assert kind(f"{block}attn_v.weight", mixture, eight) == "Q8_0"
            assert kind(f"{block}attn_k.weight", mixture, eight) == "Q8_0"
        assert kind(f"{block}attn_output.weight", "Q4_K_M", eight) == "Q5_K"
        assert kind(f"{block}attn_output.weight", "Q5_K_M", eight) == "Q5_K"
        assert kind(f"{block}attn_output.weight", "Q6_K", eight) == "Q6_K"
        assert kind(f"{block}attn_q.weight", "Q4_K_M", eight) == "Q4_K"


@pytest.mark.parametrize(
    ("model_type", "kv_heads", "expected"),
    [("llama", 8, "Q5_K"), ("llama", 64, "Q4_K"), ("qwen2", 8, "Q5_K"), ("qwen2", 64, "Q5_K"), ("qwen3", 8, "Q4_K")],
)
def test_a_70b_model_has_finer_values(model_type: str, kv_heads: int, expected: str) -> None:
    config = config_of(model_type, layers=80, heads=64, kv_heads=kv_heads)
    # Layer 11 gets no more bits for its place.
    assert kind("blk.11.attn_v.weight", "Q4_K_M", config) == expected
    assert kind("blk.11.attn_k.weight", "Q4_K_M", config) == "Q4_K"
    assert kind("blk.12.attn_v.weight", "Q4_K_M", config) == "Q6_K"


def test_rows_that_fill_no_large_blocks_get_the_next_larger_kind_of_small_ones() -> None:
    config = config_of("qwen2", layers=24)
    columns = 896  # of Qwen2.5-0.5B
    assert kind("blk.5.attn_q.weight", "Q4_K_M", config, columns=columns) == "Q5_0"
    assert kind("blk.5.attn_q.weight", "Q5_K_M", config, columns=columns) == "Q5_1"
    assert kind("blk.5.attn_q.weight", "Q6_K", config, columns=columns) == "Q8_0"
    assert kind("blk.0.attn_v.weight", "Q4_K_M", config, columns=columns) == "Q8_0"
    assert kind("token_embd.weight", "Q4_K_M", config, columns=columns) == "Q5_0"
    assert kind("token_embd.weight", "Q4_K_M", config, columns=columns, tied=True) == "Q8_0"
    assert kind("output.weight", "Q5_K_M", config, columns=columns) == "Q8_0"
    # Not even small blocks.
    for mixture in ("Q8_0", "Q4_K_M", "Q5_K_M", "Q6_K"):
        assert kind("blk.5.ffn_down.weight", mixture, config, columns=100) == "F16"
        assert kind("output.weight", mixture, config, columns=100) == "F16"


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_is_small_stays_float32(mixture: Mixture) -> None:
    config = config_of("qwen3_moe", experts=128)
    assert kind_of("blk.0.attn_q.bias", mixture, config, shape=(4096,), tied=False) == "F32"
    assert kind_of("rope_freqs.weight", mixture, config, shape=(64,), tied=False) == "F32"
    assert kind_of("blk.0.attn_norm.weight", mixture, config, shape=(4096,), tied=False) == "F32"
    assert kind_of("blk.0.ffn_gate_inp.weight", mixture, config, shape=(128, 4096), tied=False) == "F32"
    expected = mixture if mixture in ("F32", "F16", "BF16", "Q8_0") else mixture[:4]
    assert kind_of("blk.9.ffn_gate_exps.weight", mixture, config, shape=(128, 768, 2048), tied=False) == expected


def test_bytes_are_those_of_the_gguf_library() -> None:
    gguf = pytest.importorskip("gguf")
    for mixture in MIXTURES:
        for columns in (512, 96):
            found = kind("blk.5.attn_q.weight", mixture, config_of(), columns=columns)
            shape = gguf.quant_shape_to_byte_shape((3, 7, columns), gguf.GGMLQuantizationType[found])
            assert shape == (3, 7, row_bytes(found, columns))
            assert tensor_bytes(found, (3, 7, columns)) == 21 * shape[-1]


def test_an_unknown_mixture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of F32, .*, got 'Q3_K_M'"):
        kind("output.weight", "Q3_K_M", config_of())  # type: ignore[arg-type]
