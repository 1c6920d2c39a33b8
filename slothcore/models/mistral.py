"""Mistral 7B, Nemo 12B, Small 22B, and what was tuned from them (Zephyr)."""

from slothcore.models.config import DecoderConfig, common_fields
from slothcore.models.hf_config import HfConfig


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Mistral (arXiv:2310.06825): Llama without biases, whose every layer may see only a window.

    A file without `sliding_window` has one of 4096 tokens; null means none, as from version 0.2 on.
    """
    common = common_fields(
        hf,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=4096,
    )
    hf.require("attention_bias", False)
    window = hf.take("sliding_window", int, None)
    return DecoderConfig(
        **common,
        layer_windows=None if window is None else (window,) * common["num_hidden_layers"],
    )
