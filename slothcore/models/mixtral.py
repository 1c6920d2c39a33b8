"""Mixtral 8x7B and 8x22B."""

from slothcore.models.config import DecoderConfig, MoeConfig, common_fields
from slothcore.models.hf_config import HfConfig


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Mixtral (arXiv:2401.04088): Mistral's attention, and in every layer experts that are as wide as a dense MLP."""
    hf.require("router_jitter_noise", 0.0)
    common = common_fields(
        hf,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        bos_token_id=1,
        eos_token_id=2,
    )
    layers: int = common["num_hidden_layers"]
    window = hf.take("sliding_window", int, None)
    return DecoderConfig(
        **common,
        layer_windows=None if window is None else (window,) * layers,
        moe=MoeConfig(
            num_experts=take_num_experts(hf),
            experts_per_token=hf.take("num_experts_per_tok", int, 2),
            intermediate_size=common["intermediate_size"],
            normalize_weights=True,
            aux_loss_coef=hf.take("router_aux_loss_coef", float, 0.001),
            use_aux_loss=hf.take("output_router_logits", bool, False),
            block_name="block_sparse_moe",
            expert_names=("w1", "w3", "w2"),
            layers=(True,) * layers,
        ),
    )


def take_num_experts(hf: HfConfig) -> int:
    """How many experts a layer has. Newer files of every family say `num_local_experts`, older ones some `num_experts`.

    Raises: ValueError if the file says neither, or two different numbers.
    """
    local, plain = hf.take("num_local_experts", int, None), hf.take("num_experts", int, None)
    if local is not None and plain is not None and local != plain:
        raise ValueError(f"{hf.source}: num_local_experts = {local} and num_experts = {plain} contradict each other")
    found: int | None = plain if local is None else local
    if found is None:
        raise ValueError(f"{hf.source} lacks the key 'num_local_experts' (or 'num_experts')")
    return found
