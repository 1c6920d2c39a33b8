"""Qwen1.5, Qwen2 and Qwen2.5 (one architecture), and dense Qwen3."""

from typing import Any

from slothcore.models.config import DecoderConfig, common_fields, take_layer_windows
from slothcore.models.hf_config import HfConfig


def qwen2_config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Qwen2 (arXiv:2407.10671): Llama with biases on q, k and v; optionally a window from some layer on."""
    hf.require("use_mrope", False)
    fields = _fields(hf)
    return DecoderConfig(**fields, qkv_bias=True)


def qwen3_config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Qwen3 (arXiv:2505.09388): query and key heads are normed; biases only if the file says so."""
    fields = _fields(hf, head_dim=128)
    bias = hf.take("attention_bias", bool, False)
    return DecoderConfig(**fields, qkv_bias=bias, attention_output_bias=bias, qk_norm=True)


def _fields(hf: HfConfig, **defaults: Any) -> dict[str, Any]:
    """What both share; a window counts only where `use_sliding_window` is set."""
    common = common_fields(
        hf, num_key_value_heads=32, max_position_embeddings=32768, sliding_window=4096, max_window_layers=28, **defaults
    )
    window, first = hf.take("sliding_window", int, None), hf.take("max_window_layers", int, 28)
    if not hf.take("use_sliding_window", bool, False):
        window = None
    common["layer_windows"] = take_layer_windows(
        hf, common["num_hidden_layers"], window, is_sliding=lambda layer: layer >= first
    )
    return common
