"""Llama 1, 2, 3, 3.1, 3.2, and the families that publish the same architecture under its name."""

from slothcore.models.config import DecoderConfig, common_fields
from slothcore.models.hf_config import HfConfig


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Llama (arXiv:2302.13971, 2307.09288, 2407.21783): pre-norm, rotary positions, SiLU-gated MLP."""
    hf.require("rope_interleaved", False)  # SmolLM's files say it
    attention_bias = hf.take("attention_bias", bool, False)
    return DecoderConfig(
        **common_fields(hf, bos_token_id=1, eos_token_id=2),
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=hf.take("mlp_bias", bool, False),
    )
