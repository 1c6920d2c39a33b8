"""Qwen1.5, Qwen2 and Qwen2.5 (one architecture), and dense Qwen3."""

from collections.abc import Mapping
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
    hf.require("rotary_emb_base", common["rope"].rope_theta)  # CodeQwen1.5 says it twice
    common["max_position_embeddings"] = trained_length(hf, common)
    window, first = hf.take("sliding_window", int, None), hf.take("max_window_layers", int, 28)
    if not hf.take("use_sliding_window", bool, False):
        window = None
    common["layer_windows"] = take_layer_windows(
        hf, common["num_hidden_layers"], window, is_sliding=lambda layer: layer >= first
    )
    return common


def trained_length(hf: HfConfig, common: Mapping[str, Any]) -> int:
    """`max_position_embeddings`; of a model for 1M tokens, the length for which it was trained.

    The rest of its length is for servers that cut the positions of longer texts by `dual_chunk_attention_config`. Up to
    the trained length that changes nothing, beyond it plain attention is not what the authors meant.
    """
    chunks = HfConfig(hf.take("dual_chunk_attention_config", dict, {}), f"{hf.source}, dual_chunk_attention_config")
    length: int = common["max_position_embeddings"]
    trained = chunks.take("original_max_position_embeddings", int, length)
    # Scaling brings a length of its own.
    return min(length, trained) if common["rope"].rope_type == "default" else length
