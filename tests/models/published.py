"""Files config.json of published models, for what differs between them: sizes, lengths, and the keys that they hold.

Book-keeping that every file has alike stands once for a family.
"""

from typing import Any

Values = dict[str, Any]

COMMON: Values = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
}
BITSANDBYTES: Values = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "model.layers.1.mlp"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
UNSLOTH: Values = {"unsloth_fixed": True, "unsloth_version": "2025.3.14", "quantization_config": BITSANDBYTES}
YARN: Values = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
DUAL_CHUNK: Values = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def sizes(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Values:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


def longrope(pairs: int, name: str = "longrope") -> Values:
    """With a factor for each pair of channels; the published ones are searched for, and unlike each other as well."""
    short, long = [1 + i / 100 for i in range(pairs)], [1.1 + i / 2 for i in range(pairs)]
    return {"rope_scaling": {"type": name, "short_factor": short, "long_factor": long}}


def tokens(bos: int, eos: int | list[int], pad: int | None = None) -> Values:
    return {"bos_token_id": bos, "eos_token_id": eos} | ({} if pad is None else {"pad_token_id": pad})


LLAMA = COMMON | tokens(1, 2) | {"model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": None}
WRITTEN_IN_FULL: Values = {
    "add_cross_attention": False,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "is_decoder": False,
    "length_penalty": 1.0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "return_dict_in_generate": False,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
"""What transformers 4 adds if it is told to write every value, not only those that are no default."""
CODELLAMA = LLAMA | {"max_position_embeddings": 16384, "rope_theta": 1000000}
YI = LLAMA | {"attention_bias": False, "max_position_embeddings": 4096, "rope_theta": 5e6, "pad_token_id": 0}
SMOLLM = LLAMA | {
    "attention_bias": False,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
SMOLLM_CHAT = {
    "pad_token_id": 2,
    "rope_theta": 130000,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}
LLAMA_7B = sizes(4096, 11008, 32, 32, 32, 32000)
PHI_LONG_LENGTHS = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
PHI_MINI, PHI_MEDIUM = sizes(3072, 8192, 32, 32, 32, 32064), sizes(5120, 17920, 40, 40, 10, 32064)

MISTRAL = COMMON | tokens(1, 2) | {"model_type": "mistral", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
MISTRAL_7B = sizes(4096, 14336, 32, 32, 8, 32000)
NO_WINDOW = {"rope_theta": 1000000.0, "sliding_window": None}
WINDOW = {"rope_theta": 10000.0, "sliding_window": 4096}
MIXTRAL = (
    MISTRAL
    | NO_WINDOW
    | {"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8, "output_router_logits": False}
)

QWEN2 = (
    COMMON
    | tokens(151643, 151645)
    | {
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
    }
)
QWEN_LONG = {"max_position_embeddings": 131072, "sliding_window": 131072, "use_mrope": False}
QWEN_1M = {"max_position_embeddings": 1010000, "dual_chunk_attention_config": DUAL_CHUNK, "rope_theta": 10000000.0}
QWEN_7B, QWEN_14B = sizes(3584, 18944, 28, 28, 4, 152064), sizes(5120, 13824, 48, 40, 8, 152064)
CODEQWEN = {"rms_norm_eps": 1e-5, "rotary_emb_base": 1000000, "seq_length": 65536, "max_position_embeddings": 65536}
QWEN3 = QWEN2 | {
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
QWEN3_8B = sizes(4096, 12288, 36, 32, 8, 151936)
QWEN3_MOE = QWEN3 | {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
QWEN3_30B = sizes(2048, 6144, 48, 32, 4, 151936)
QWEN3_CODER = {
    "max_position_embeddings": 262144,
    "qkv_bias": False,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.0,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}

GEMMA = (
    {key: value for key, value in COMMON.items() if key != "tie_word_embeddings"}
    | tokens(2, 1, 0)
    | {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
)
GEMMA_2B, GEMMA_7B = sizes(2048, 16384, 18, 8, 1, 256000), sizes(3072, 24576, 28, 16, 16, 256000)
GEMMA2 = GEMMA | {
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "model_type": "gemma2",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
GEMMA3 = {key: value for key, value in GEMMA.items() if key != "hidden_act"} | {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
}
VISION = {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "num_hidden_layers": 27}


def gemma3_with_vision(text: Values, **outside: Any) -> Values:
    """The text part leaves out what is the default of transformers."""
    scaling = {"factor": 8.0, "rope_type": "linear"}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "rope_scaling": scaling, "sliding_window": 1024, **text},
        "torch_dtype": "bfloat16",
        "vision_config": VISION,
        **outside,
    }


GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
GEMMA3_12B = {**GEMMA3_4B, "hidden_size": 3840, "num_attention_heads": 16, "num_hidden_layers": 48}
GEMMA3_27B = {"head_dim": 128, "hidden_size": 5376, "num_hidden_layers": 62, "query_pre_attn_scalar": 168}
PHI3 = (
    COMMON
    | tokens(1, 32000, 32000)
    | {
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "original_max_position_embeddings": 4096,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    }
)
PHI_LONG = PHI_LONG_LENGTHS | {"sliding_window": 262144}
PHI4 = tokens(100257, 100265, 100349) | {"original_max_position_embeddings": 16384, "max_position_embeddings": 16384}
PHI4_MINI = tokens(199999, 199999, 199999) | {
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
}

PUBLISHED: dict[str, Values] = {
    "llama 1": LLAMA | LLAMA_7B | {"rms_norm_eps": 1e-6, "max_sequence_length": 2048, "pad_token_id": -1},
    "llama 2 32k": LLAMA | LLAMA_7B | {"rope_scaling": {"factor": 8.0, "type": "linear"}},
    "llama 2 in full": LLAMA | LLAMA_7B | WRITTEN_IN_FULL,
    "llama 2 yarn": LLAMA | LLAMA_7B | {"rope_scaling": YARN | {"finetuned": True}},
    "codellama 7B": CODELLAMA | sizes(4096, 11008, 32, 32, 32, 32016),
    "codellama 34B": CODELLAMA | sizes(8192, 22016, 48, 64, 8, 32000),
    "yi 34B": YI | sizes(7168, 20480, 60, 56, 8, 64000),
    "yi 34B 200K": YI | sizes(7168, 20480, 60, 56, 8, 64000) | {"max_position_embeddings": 200000, "rope_theta": 1e7},
    "smollm2 135M": SMOLLM | sizes(576, 1536, 30, 9, 3, 49152) | tokens(0, 0),
    "smollm2 1.7B instruct": SMOLLM | sizes(2048, 8192, 24, 32, 32, 49152) | SMOLLM_CHAT,
    "phi 4 as llama": LLAMA | sizes(5120, 17920, 40, 40, 10, 100352) | PHI4 | {"rope_theta": 250000} | UNSLOTH,
    "phi 3.5 as llama": LLAMA | PHI_MINI | PHI_LONG_LENGTHS | longrope(48),
    "mistral 7B instruct v0.1": MISTRAL | MISTRAL_7B | WINDOW,
    "mistral 7B instruct v0.2": MISTRAL | MISTRAL_7B | NO_WINDOW,
    "mistral small 22B": MISTRAL | sizes(6144, 16384, 56, 48, 8, 32768) | NO_WINDOW | {"head_dim": 128},
    "mistral nemo": MISTRAL | sizes(5120, 14336, 40, 32, 8, 131072) | NO_WINDOW | {"head_dim": 128},
    "zephyr": MISTRAL | MISTRAL_7B | WINDOW | {"_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2},
    "phi 3 as mistral": MISTRAL | PHI_MINI | tokens(1, 32000, 32009) | {"sliding_window": 2048} | UNSLOTH,
    "mixtral 8x7B instruct": MIXTRAL | MISTRAL_7B | {"router_aux_loss_coef": 0.02},
    "mixtral 8x22B": MIXTRAL | sizes(6144, 16384, 56, 48, 8, 32768) | {"router_jitter_noise": 0.0},
    "qwen1.5 32B": QWEN2 | sizes(5120, 27392, 64, 40, 8, 152064) | {"max_window_layers": 35},
    "codeqwen1.5": QWEN2 | sizes(4096, 13440, 32, 32, 4, 92416) | tokens(2, 2) | CODEQWEN,
    "qwen2 72B": QWEN2 | sizes(8192, 29568, 80, 64, 8, 152064) | QWEN_LONG | {"max_window_layers": 80},
    "qwen2.5 3B": QWEN2 | sizes(2048, 11008, 36, 16, 2, 151936) | QWEN_LONG | {"tie_word_embeddings": True},
    "qwen2.5 7B yarn": QWEN2 | QWEN_7B | {"rope_scaling": YARN},
    "qwen2.5 14B 1M": QWEN2 | QWEN_14B | QWEN_1M,
    "qwen2.5 7B bnb": QWEN2 | QWEN_7B | UNSLOTH | {"_name_or_path": "unsloth/qwen2.5-7b", "pad_token_id": 151665},
    "qwen3 0.6B": QWEN3 | sizes(1024, 3072, 28, 16, 8, 151936) | {"tie_word_embeddings": True},
    "qwen3 8B yarn": QWEN3 | QWEN3_8B | {"rope_scaling": YARN},
    "qwen3 8B bnb": QWEN3 | QWEN3_8B | UNSLOTH | {"pad_token_id": 151654},
    "qwen3 235B": QWEN3_MOE | sizes(4096, 12288, 94, 64, 4, 151936) | {"moe_intermediate_size": 1536},
    "qwen3 30B 1M": QWEN3_MOE | QWEN3_30B | QWEN_1M,
    "qwen3 coder 30B": QWEN3_MOE | QWEN3_30B | {"intermediate_size": 5472} | QWEN3_CODER,
    "gemma 7B": GEMMA | GEMMA_7B | {"hidden_act": "gelu"} | UNSLOTH,
    "codegemma 2B": GEMMA | GEMMA_2B,
    "codegemma 7B": GEMMA | GEMMA_7B | {"hidden_activation": None},
    "gemma 2 2B it": GEMMA2 | sizes(2304, 9216, 26, 8, 4, 256000) | {"eos_token_id": [1, 107]},
    "gemma 2 9B": GEMMA2 | sizes(3584, 14336, 42, 16, 8, 256000) | {"sliding_window_size": 4096} | UNSLOTH,
    "gemma 2 27B": GEMMA2 | sizes(4608, 36864, 46, 32, 16, 256000) | {"head_dim": 128, "query_pre_attn_scalar": 144},
    "gemma 3 270M": GEMMA3 | sizes(640, 2048, 18, 4, 1, 262144) | {"_sliding_window_pattern": 6},
    "gemma 3 1B": GEMMA3 | sizes(1152, 6912, 26, 4, 1, 262144) | {"sliding_window_pattern": 6} | UNSLOTH,
    "gemma 3 4B": gemma3_with_vision(GEMMA3_4B),
    "gemma 3 12B": gemma3_with_vision({**GEMMA3_12B, "intermediate_size": 15360, "num_key_value_heads": 8}),
    "gemma 3 27B": gemma3_with_vision({**GEMMA3_27B, "intermediate_size": 21504, "num_attention_heads": 32}),
    "gemma 3 4B bnb": gemma3_with_vision({**GEMMA3, **GEMMA3_4B}, **UNSLOTH, bos_token_id=2, pad_token_id=0),
    "phi 3 mini 4k": PHI3 | PHI_MINI,
    "phi 3 mini 128k": PHI3 | PHI_MINI | PHI_LONG | longrope(48),
    "phi 3 medium 4k": PHI3 | PHI_MEDIUM,
    "phi 3 medium 128k": PHI3 | PHI_MEDIUM | PHI_LONG | {"sliding_window": 131072} | longrope(64, "su"),
    "phi 4": PHI3 | sizes(5120, 17920, 40, 40, 10, 100352) | PHI4 | {"sliding_window": None, "rope_theta": 250000},
    "phi 4 mini": PHI3 | sizes(3072, 8192, 32, 24, 8, 200064) | PHI4_MINI | PHI_LONG | longrope(48),
}
