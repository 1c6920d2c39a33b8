"""Gemma 1 and Gemma 2."""

from typing import Any

from slothcore.models.config import DecoderConfig, common_fields, take_layer_windows
from slothcore.models.hf_config import HfConfig

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
}
"""What every Gemma takes for an absent key."""


def gemma_config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Gemma (arXiv:2403.08295): norm weights stored minus one, tanh-GELU, a scaled embedding that is also the head.

    The first files say "gelu", by which their authors meant the tanh approximation.
    """
    if hf.values.get("hidden_act") in ("gelu", None):
        hf.values["hidden_act"] = "gelu_pytorch_tanh"
    hf.require("hidden_activation", hf.values["hidden_act"])
    common = common_fields(hf, num_key_value_heads=16, max_position_embeddings=8192, **DEFAULTS)
    return DecoderConfig(**common, **gemma_switches(hf, common["hidden_size"]))


def gemma2_config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Gemma 2 (arXiv:2408.00118): soft caps, windows on even layers, and norms on both sides of each branch."""
    take_hidden_activation(hf)
    common = common_fields(
        hf,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        **DEFAULTS,
    )
    window = hf.take("sliding_window", int, None)
    hf.require("sliding_window_size", window)  # written beside the other key by some files, read by nobody
    return DecoderConfig(
        **common,
        **gemma_switches(hf, common["hidden_size"]),
        sandwich_norms=True,
        attention_scale=take_attention_scale(hf),
        attention_softcap=hf.take("attn_logit_softcapping", float, None),
        logit_softcap=hf.take("final_logit_softcapping", float, None),
        layer_windows=take_layer_windows(
            hf, common["num_hidden_layers"], window, is_sliding=lambda layer: layer % 2 == 0
        ),
    )


def gemma_switches(hf: HfConfig, hidden_size: int) -> dict[str, Any]:
    """The fields of `DecoderConfig` that are alike in all Gemmas."""
    hf.require("use_bidirectional_attention", False)
    bias = hf.take("attention_bias", bool, False)
    return {
        "qkv_bias": bias,
        "attention_output_bias": bias,
        "norm_weight_offset": 1.0,
        "norm_casts_before_weight": False,
        "embedding_scale": hidden_size**0.5,
    }


def take_attention_scale(hf: HfConfig) -> float:
    """The factor of the scores: of the number that stands in for the head's width."""
    scalar = hf.take("query_pre_attn_scalar", float, 256)
    if not scalar > 0:
        raise ValueError(f"{hf.source}: query_pre_attn_scalar must be positive, got {scalar}")
    return float(scalar**-0.5)


def take_hidden_activation(hf: HfConfig) -> None:
    """Read the activation where Gemma 2 and 3 keep it; an older key beside it must not say another one."""
    activation = hf.take("hidden_activation", str, "gelu_pytorch_tanh")
    hf.require("hidden_act", activation)
    hf.values["hidden_act"] = activation
