"""Gemma 3: the text models, and the text part of the multimodal ones."""

from collections.abc import Mapping
from typing import Any

from slothcore.models.config import DecoderConfig, fields_without_rope, refuse_other_architectures, take_layer_windows
from slothcore.models.gemma import DEFAULTS, gemma_switches, take_attention_scale, take_hidden_activation
from slothcore.models.hf_config import HfConfig
from slothcore.models.rope_config import take_layer_ropes

WEIGHT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""Where a multimodal checkpoint keeps the text model: as published, and as transformers 5 writes it."""

VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# Files of multimodal models leave out every value that is the default of transformers' Gemma3TextConfig.
SIZES: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
}


def config_from_hf(hf: HfConfig) -> DecoderConfig:
    """Gemma 3 (arXiv:2503.19786): Gemma 2 with normed heads for soft caps; five local layers to each global one.

    Local layers see a window and have RoPE frequencies of their own.
    """
    take_hidden_activation(hf)
    fields = fields_without_rope(hf, **SIZES, **DEFAULTS, sliding_window=4096)
    layers = fields["num_hidden_layers"]
    fields["rope"], fields["local_rope"] = take_layer_ropes(hf, fields["max_position_embeddings"], fields["head_dim"])
    hf.require("attn_logit_softcapping", None)
    # transformers 5 writes the pattern with an underscore, beside the layer_types that were made from it.
    written = hf.take("_sliding_window_pattern", int, 6)
    pattern = hf.take("sliding_window_pattern", int, written)
    if pattern < 1:
        raise ValueError(f"{hf.source}: sliding_window_pattern must be positive, got {pattern}")
    return DecoderConfig(
        **fields,
        **gemma_switches(hf, fields["hidden_size"]),
        qk_norm=True,
        sandwich_norms=True,
        attention_scale=take_attention_scale(hf),
        logit_softcap=hf.take("final_logit_softcapping", float, None),
        layer_windows=take_layer_windows(
            hf, layers, hf.take("sliding_window", int, None), is_sliding=lambda layer: (layer + 1) % pattern != 0
        ),
    )


def text_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The config.json of the text model inside a multimodal one.

    Raises: ValueError, naming the key, if the outer file says something that is not implemented.
    """
    hf = HfConfig(dict(values), source)
    text = {**hf.take("text_config", dict, {})}
    hf.require("model_type", "gemma3")
    refuse_other_architectures(hf)
    hf.take("vision_config", dict, None)
    for key in ("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        hf.take(key, int, None)
    hf.take("initializer_range", float, None)  # of the vision part; the text part has its own
    for key in ("pad_token_id", "torch_dtype", "dtype", "quantization_config"):
        value = hf.values.pop(key, None)
        if value is not None and text.get(key) is None:
            text[key] = value
    # Outside stands what the model goes by. When transformers 5 saves, it fills in the text part's with defaults.
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
        value = hf.values.pop(key, None)
        if value is not None:
            text[key] = value
    hf.finish()
    return {**text, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
