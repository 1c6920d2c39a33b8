"""Qwen3-MoE: 30B-A3B, 235B-A22B and the models trained from them."""

from slothcore.models.config import DecoderConfig, MoeConfig, common_fields
from slothcore.models.hf_config import HfConfig
from slothcore.models.mixtral import take_num_experts
from slothcore.models.qwen import trained_length


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Qwen3-MoE (arXiv:2505.09388): Qwen3's attention with its norms of queries and keys, and many narrow experts.

    A layer is sparse unless `mlp_only_layers` names it or `decoder_sparse_step` passes it over.
    """
    for key, only in (("qkv_bias", False), ("use_qk_norm", True), ("shared_expert_intermediate_size", 0)):
        hf.require(key, only)  # Qwen3-Coder's files say them
    attention_bias = hf.take("attention_bias", bool, False)
    common = common_fields(hf, num_key_value_heads=4, max_position_embeddings=32768)
    common["max_position_embeddings"] = trained_length(hf, common)
    layers: int = common["num_hidden_layers"]
    return DecoderConfig(
        **common,
        qkv_bias=attention_bias,
        attention_output_bias=attention_bias,
        qk_norm=True,
        layer_windows=_layer_windows(hf, layers),
        moe=_moe(hf, layers),
    )


def _moe(hf: HfConfig, layers: int) -> MoeConfig | None:
    step = hf.take("decoder_sparse_step", int, 1)
    if step < 1:
        raise ValueError(f"{hf.source}: decoder_sparse_step must be at least 1, got {step}")
    dense = hf.take("mlp_only_layers", list, [])
    sparse = tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))
    moe = MoeConfig(
        num_experts=take_num_experts(hf),
        experts_per_token=hf.take("num_experts_per_tok", int, 8),
        intermediate_size=hf.take("moe_intermediate_size", int, 768),
        normalize_weights=hf.take("norm_topk_prob", bool, False),
        aux_loss_coef=hf.take("router_aux_loss_coef", float, 0.001),
        use_aux_loss=hf.take("output_router_logits", bool, False),
        layers=sparse,
    )
    return moe if any(sparse) else None


def _layer_windows(hf: HfConfig, layers: int) -> tuple[int | None, ...] | None:
    """The window of every layer, if `use_sliding_window` switches it on."""
    window = hf.take("sliding_window", int, None)
    first = hf.take("max_window_layers", int, None)
    if not hf.take("use_sliding_window", bool, False) or window is None:
        return None
    # transformers gives this family's layers one mask and does not read the key, whose meaning in other Qwen models is
    # that the layers before it see everything.
    if first:
        raise ValueError(
            f"{hf.source}: max_window_layers = {first!r} with use_sliding_window is not supported; with 0, or without "
            "the key, the window holds in every layer"
        )
    return (window,) * layers
