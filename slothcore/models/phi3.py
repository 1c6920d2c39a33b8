"""Phi-3 mini and medium, Phi-3.5-mini, Phi-4 and Phi-4-mini."""

from slothcore.models.config import DecoderConfig, common_fields
from slothcore.models.hf_config import HfConfig


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Phi-3 (arXiv:2404.14219): Llama with fused projections, a window in the short models, LongRoPE in the long ones.

    Phi-4-mini (arXiv:2503.01743) rotates a part of each head only and ties its head.
    """
    for key in ("resid_pdrop", "embd_pdrop"):
        hf.require(key, 0.0)
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        hf.require(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini's files say them; other values mean other layers
        hf.require(key, 1)
    common = common_fields(
        hf,
        partial_rotary=True,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=32000,
        pad_token_id=32000,
    )
    rope_type = common["rope"].rope_type
    if rope_type not in ("default", "longrope"):
        # transformers refuses such a file as well, so an export could not be read.
        raise ValueError(f"RoPE type {rope_type!r} is not one that Phi-3 has (only 'default', 'longrope')")
    window = hf.take("sliding_window", int, None)
    return DecoderConfig(
        **common,
        fused_qkv=True,
        fused_gate_up=True,
        layer_windows=None if window is None else (window,) * common["num_hidden_layers"],
    )
