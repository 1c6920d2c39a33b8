"""Tiny random models of every family that transformers itself makes and saves: the reference of the parity tests.

Each variant sets some switches so that they bite: windows shorter than the text, soft caps that the scores reach,
unequal RoPE bases, large weights. What turns a variant's switches off stands beside them, so that a test can show that
they matter.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from slothcore.layers.rope import RopeParameters
from tests.models.tiny import LLAMA3_ROPE, SIZES

SHORT, LONG = 20, 90
"""Lengths of the texts: below and far above every window, and every RoPE's original length, that is named here."""

LOCAL = {"sliding_window": 7}
ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {
    "mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}
"""The block of experts, and their gate, up and down projections, as the families' files call them."""


@dataclass(frozen=True)
class Variant:
    """One tiny configuration.

    Attributes:
        family: the `model_type` that slothcore reads.
        name: what is special about it.
        config_class: transformers' configuration class.
        options: its keywords, over `SIZES`.
        off: fields of `DecoderConfig` whose change turns the variant's switches off; empty where it is about layout.
        target_modules: the linears that a PEFT user of this family names.
    """

    family: str
    name: str
    config_class: type[PreTrainedConfig]
    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ATTENTION_AND_MLP

    @property
    def is_multimodal(self) -> bool:
        """Whether the file holds a vision model as well, of which slothcore reads the text part."""
        return self.config_class is Gemma3Config

    @property
    def has_experts(self) -> bool:
        """Whether experts take the MLP's place; PEFT adapts them under other names than slothcore."""
        return self.family in EXPERTS

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
LONGROPE_SIZES = {"max_position_embeddings": 256, "original_max_position_embeddings": 32}


def longrope(pairs: int) -> dict[str, Any]:
    """LongRoPE with a factor of its own for each of `pairs` pairs of channels, short and long ones unlike."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [1.5 + 1.7 * i for i in range(pairs)],
    }


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **values}}


PLAIN_ROPE = {"rope": RopeParameters(rope_theta=1e4)}
NO_WINDOW = {"layer_windows": None}

FAMILIES_TINY: dict[str, list[Variant]] = {
    "llama": [
        Variant("llama", "grouped-queries", LlamaConfig),
        Variant("llama", "llama3-rope", LlamaConfig, {"rope_parameters": LLAMA3_ROPE}, PLAIN_ROPE),
        Variant("llama", "linear-rope", LlamaConfig, rope("linear", factor=2.5), PLAIN_ROPE),
        Variant(
            "llama",
            "dynamic-rope",
            LlamaConfig,
            {**rope("dynamic", factor=2.0), "max_position_embeddings": 32},
            PLAIN_ROPE,
        ),
        Variant(
            "llama",
            "biases",
            LlamaConfig,
            {"attention_bias": True, "mlp_bias": True},
            {"qkv_bias": False, "attention_output_bias": False, "mlp_bias": False},
        ),
        Variant("llama", "tied-head", LlamaConfig, {"tie_word_embeddings": True}),
    ],
    "mistral": [
        Variant("mistral", "window", MistralConfig, LOCAL, NO_WINDOW),
        Variant("mistral", "wide-heads", MistralConfig, {"sliding_window": None, "head_dim": 24}),
        Variant("mistral", "yarn-rope", MistralConfig, {"sliding_window": None, "rope_parameters": YARN}, PLAIN_ROPE),
    ],
    "qwen2": [
        Variant("qwen2", "tied-head", Qwen2Config, {"tie_word_embeddings": True}, {"qkv_bias": False}),
        Variant(
            "qwen2",
            "windows-above",
            Qwen2Config,
            {**LOCAL, "use_sliding_window": True, "max_window_layers": 1},
            NO_WINDOW,
        ),
        Variant("qwen2", "yarn-rope", Qwen2Config, {"rope_parameters": YARN}, PLAIN_ROPE),
    ],
    "qwen3": [
        Variant("qwen3", "head-norms", Qwen3Config, {"head_dim": 16}, {"qk_norm": False}),
        Variant(
            "qwen3",
            "biases-and-windows",
            Qwen3Config,
            {
                **LOCAL,
                "head_dim": 8,
                "attention_bias": True,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            {**NO_WINDOW, "qkv_bias": False, "attention_output_bias": False},
        ),
        Variant(
            "qwen3",
            "tied-yarn-rope",
            Qwen3Config,
            {"head_dim": 8, "tie_word_embeddings": True, "rope_parameters": YARN},
            PLAIN_ROPE,
        ),
    ],
    "mixtral": [
        Variant(
            "mixtral",
            "windows-and-balance",
            MixtralConfig,
            {**LOCAL, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
            NO_WINDOW,
            ATTENTION,
        ),
        Variant(
            "mixtral",
            "three-of-five",
            MixtralConfig,
            {"num_local_experts": 5, "num_experts_per_tok": 3, "head_dim": 16},
            target_modules=ATTENTION,
        ),
    ],
    "qwen3_moe": [
        Variant(
            "qwen3_moe",
            "dense-layer-between",
            Qwen3MoeConfig,
            {
                "num_hidden_layers": 3,
                "mlp_only_layers": [1],
                "head_dim": 16,
                "num_experts": 6,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "norm_topk_prob": False,
                "output_router_logits": True,
                "router_aux_loss_coef": 0.5,
            },
            {"qk_norm": False},
            ATTENTION,
        ),
        Variant(
            "qwen3_moe",
            "normalized-every-second",
            Qwen3MoeConfig,
            {
                **LOCAL,
                "use_sliding_window": True,
                "decoder_sparse_step": 2,
                "attention_bias": True,
                "head_dim": 8,
                "num_experts": 4,
                "num_experts_per_tok": 3,
                "moe_intermediate_size": 40,
                "norm_topk_prob": True,
            },
            NO_WINDOW,
            ATTENTION,
        ),
    ],
    "gemma": [
        Variant(
            "gemma",
            "one-key-head",
            GemmaConfig,
            {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0},
            {"hidden_act": "silu", "norm_weight_offset": 0.0, "embedding_scale": 1.0},
        ),
        Variant("gemma", "untied", GemmaConfig, {"tie_word_embeddings": False, "head_dim": 8, "hidden_act": "gelu"}),
    ],
    "gemma2": [
        Variant(
            "gemma2",
            "windows-and-caps",
            Gemma2Config,
            {
                **LOCAL,
                "num_hidden_layers": 3,
                "head_dim": 16,
                "query_pre_attn_scalar": 5,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
                "pad_token_id": 0,
            },
            {
                **NO_WINDOW,
                "attention_softcap": None,
                "logit_softcap": None,
                "attention_scale": None,
                "sandwich_norms": False,
            },
        ),
        Variant(
            "gemma2",
            "layer-types",
            Gemma2Config,
            {
                **LOCAL,
                "head_dim": 8,
                "query_pre_attn_scalar": 11,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "layer_types": ["full_attention", "sliding_attention"],
                "attention_bias": True,
            },
            {**NO_WINDOW, "qkv_bias": False, "attention_output_bias": False},
        ),
    ],
    "gemma3_text": [
        Variant(
            "gemma3_text",
            "local-and-global",
            Gemma3TextConfig,
            {
                **LOCAL,
                "num_hidden_layers": 4,
                "sliding_window_pattern": 3,
                "head_dim": 16,
                "query_pre_attn_scalar": 7,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
                "final_logit_softcapping": 3.0,
            },
            {"local_rope": None, "logit_softcap": None, "attention_scale": None, "qk_norm": False},
        ),
        Variant(
            "gemma3_text",
            "default-pattern",
            Gemma3TextConfig,
            {**LOCAL, "num_hidden_layers": 6, "head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0},
            NO_WINDOW,
        ),
    ],
    "gemma3": [
        Variant(
            "gemma3",
            "text-of-multimodal",
            Gemma3Config,
            {
                **LOCAL,
                "num_hidden_layers": 3,
                "head_dim": 8,
                "query_pre_attn_scalar": 9,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                },
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            {"local_rope": None},
        ),
    ],
    "phi3": [
        Variant("phi3", "window", Phi3Config, {**LOCAL, "pad_token_id": 0}, NO_WINDOW, FUSED),
        Variant(
            "phi3",
            "longrope",
            Phi3Config,
            {**LONGROPE_SIZES, "pad_token_id": None, "rope_parameters": longrope(4)},
            PLAIN_ROPE,
            FUSED,
        ),
        Variant(
            "phi3",
            "tied-partial-longrope",
            Phi3Config,
            {
                **LONGROPE_SIZES,
                "pad_token_id": None,
                "tie_word_embeddings": True,
                "rope_parameters": {**longrope(3), "partial_rotary_factor": 0.75},
            },
            PLAIN_ROPE,
            FUSED,
        ),
    ],
}

ALL_VARIANTS: list[Variant] = [variant for variants in FAMILIES_TINY.values() for variant in variants]

TINY_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}


def tiny_config(variant: Variant) -> PreTrainedConfig:
    """transformers' configuration of a variant."""
    options = {**SIZES, **variant.options}
    if not variant.is_multimodal:
        return variant.config_class(**options)
    return variant.config_class(
        text_config=options,
        vision_config=TINY_VISION,
        mm_tokens_per_image=4,
        boi_token_index=95,
        eoi_token_index=96,
        image_token_index=94,
        tie_word_embeddings=options["tie_word_embeddings"],
    )


def tiny_model(variant: Variant) -> PreTrainedModel:
    """A float32 model in eval mode whose every weight is random and large, the norms' and biases' too.

    Norm weights lie around what leaves the values as they are: one, or zero where the family adds one to them.
    """
    auto = AutoModelForImageTextToText if variant.is_multimodal else AutoModelForCausalLM
    model = auto.from_config(tiny_config(variant), attn_implementation="eager").float().eval()
    around = 0.0 if "gemma" in variant.family else 1.0
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2, generator=generator)
            if "norm" in name:
                weight += around
    return model


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Write `model` as transformers does and return the folder."""
    model.save_pretrained(folder, **options)
    return folder


def gradients_by_our_names(model: PreTrainedModel) -> dict[str, Tensor | None]:
    """The gradients of a transformers model under slothcore's names of the weights; a vision part is left out."""
    gradients: dict[str, Tensor | None] = {}
    block, projections = EXPERTS.get(model.config.model_type, ("mlp", ()))
    for name, weight in model.named_parameters():
        if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
            continue
        name = name.replace("model.language_model.", "model.", 1)
        if ".mlp.experts." in name:
            path = name.rpartition(".")[0].replace(".mlp.", f".{block}.")
            # transformers keeps gate and up in one stack, [E, 2 I, H].
            taken = projections[:2] if name.endswith("gate_up_proj") else projections[2:]
            for projection, gradient in zip(taken, weight.grad.chunk(len(taken), dim=1), strict=True):
                gradients[f"{path}.{projection}.weight"] = gradient
        else:
            gradients[name.replace(".mlp.gate.", f".{block}.gate.")] = weight.grad
    return gradients


def quantize_as_bitsandbytes(model: PreTrainedModel) -> None:
    """Replace the weights that transformers would quantise by what bitsandbytes decodes from their NF4 codes."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head" and "vision" not in name:
            module.weight.data = through_nf4(module.weight.data)
        elif name.endswith(".mlp.experts"):
            # Gate and up of each expert were weights of their own when they were quantised.
            halves = [half for both in module.gate_up_proj.data for half in both.chunk(2)]
            module.gate_up_proj.data = torch.cat([through_nf4(half) for half in halves]).view_as(module.gate_up_proj)
            module.down_proj.data = torch.stack([through_nf4(down) for down in module.down_proj.data])


def through_nf4(weight: Tensor) -> Tensor:
    """What bitsandbytes decodes from a weight's NF4 codes."""
    # Blocks run over the flattened weight, so its shape is free; bitsandbytes' CPU decoder misreads rows that are no
    # multiple of a block.
    packed, state = bnb.quantize_4bit(weight.flatten(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state).view_as(weight)


def token_ids(*shape: int, vocab_size: int = SIZES["vocab_size"], seed: int = 3) -> Tensor:
    """Random ids; those that a multimodal model reserves for pictures never appear."""
    return torch.randint(0, vocab_size - 3, shape, generator=torch.Generator().manual_seed(seed))
