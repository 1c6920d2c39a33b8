"""What llama.cpp calls a model's architecture, and the metadata by which it builds it.

llama.cpp has a program of its own for each architecture. Most switches of a `DecoderConfig` are a key in the file,
some are fixed; a model that differs in those is refused here, and not computed wrongly there.
"""

import math
import warnings
from dataclasses import dataclass

from slothcore.export.gguf_file import Value
from slothcore.layers.rope import RopeParameters
from slothcore.models.config import DecoderConfig


@dataclass(frozen=True)
class Architecture:
    """What of one architecture of llama.cpp no key of a file can change.

    Attributes:
        name: in `general.architecture`.
        rope_pairs: whether RoPE turns channels 2i and 2i + 1 together, where Hugging Face has i and i + head_dim / 2.
        rope_types: the RoPE types that it computes; "default" always.
        windows: whether layers can have windows.
        biases: which of "qkv", "o" and "mlp" can have one.
        act: the activation.
        own_head: whether the head can be another matrix than the embedding.
    """

    name: str
    rope_pairs: bool = False
    rope_types: tuple[str, ...] = ("linear", "dynamic", "yarn")
    windows: bool = False
    biases: tuple[str, ...] = ("qkv",)
    act: str = "silu"
    own_head: bool = True


LLAMA = Architecture(
    "llama",
    rope_pairs=True,
    rope_types=("linear", "dynamic", "yarn", "llama3", "longrope"),
    biases=("qkv", "o", "mlp"),
)
GELU = "gelu_pytorch_tanh"
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "gemma": Architecture("gemma", act=GELU, own_head=False),
    "gemma2": Architecture("gemma2", act=GELU, own_head=False, windows=True),
    # What yarn does to cosines and sines it would do in layers with a window, too.
    "gemma3_text": Architecture("gemma3", act=GELU, windows=True, rope_types=("linear", "dynamic")),
    "phi3": Architecture("phi3", rope_types=("longrope",), biases=()),
}
# Of the layers of each Gemma, by whose number llama.cpp knows the one whose attention scale is not head_dim ** -0.5.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
# tanh(x / c) * c is x for all scores that occur: stands for "no cap" where the architecture always has one.
NO_CAP = 1e6


def architecture(config: DecoderConfig, *, tied: bool) -> Architecture:
    """The architecture of a model.

    Args:
        tied: whether the head is the embedding's matrix.
    Raises: ValueError if llama.cpp computes no such model.
    """
    found = ARCHITECTURES[config.model_type]

    def refuse(what: str) -> ValueError:
        return ValueError(
            f"llama.cpp's architecture {found.name} has no {what}, which this model needs; export it with the format "
            "merged"
        )

    if config.hidden_act != found.act:
        raise refuse(f"activation {config.hidden_act}")
    if not tied and not found.own_head:
        raise refuse("head of its own beside the embedding")
    for name, is_there in (("qkv", config.qkv_bias), ("o", config.attention_output_bias), ("mlp", config.mlp_bias)):
        if is_there and name not in found.biases:
            raise refuse(f"{name} bias")
    for rope in filter(None, (config.rope, config.local_rope)):
        if rope.rope_type not in ("default", *found.rope_types):
            raise refuse(f"RoPE of the type {rope.rope_type}")
        if rope.rope_type == "yarn" and not rope.truncate:
            raise refuse("yarn with untruncated ends (truncate: false)")
    if config.local_rope is not None and config.local_rope.rope_type != "default":
        raise refuse(f"RoPE of the type {config.local_rope.rope_type} in layers with a window")
    if config.rope.partial_rotary_factor != 1 and found.name != "phi3":
        raise refuse("heads that turn in part")
    if found.name == "phi3" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise refuse("heads that are together wider or narrower than the hidden size")
    if config.moe is not None and config.model_type == "qwen3_moe":
        if not all(config.moe.layers):
            raise refuse("dense layers between the sparse ones")
        if not config.moe.normalize_weights:
            raise refuse("experts whose weights are not normalised (norm_topk_prob: false)")
    if config.moe is None and found.name == "qwen3moe":
        raise refuse("model without experts")
    if found.windows:
        _period(config)
    return found


def metadata(config: DecoderConfig, found: Architecture) -> dict[str, Value]:
    """The keys that say how to build the model.

    Warns: where long texts will be computed otherwise than here.
    """
    name, rope = found.name, config.rope
    context = config.max_position_embeddings if rope.rope_type == "dynamic" else config.longest_document
    values: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": rope.rotary_dim(config.head_dim),
        "rope.freq_base": float(rope.rope_theta),
        **_rope_scaling(rope, found),
    }
    if config.moe is not None:
        values["expert_count"] = config.moe.num_experts
        values["expert_used_count"] = config.moe.experts_per_token
        if name == "qwen3moe":
            values["expert_feed_forward_length"] = config.moe.intermediate_size
    if name == "gemma2":
        values["attn_logit_softcapping"] = float(config.attention_softcap or NO_CAP)
        values["final_logit_softcapping"] = float(config.logit_softcap or NO_CAP)
    elif config.logit_softcap is not None:
        values["final_logit_softcapping"] = float(config.logit_softcap)
    if found.windows:
        values |= _windows(config)
    if name == "phi3":
        values["attention.sliding_window"] = config.window(0) or 0
    if rope.rope_type == "dynamic":
        warnings.warn(
            f"llama.cpp has no RoPE of the type dynamic: the file is for texts of up to {context} tokens, for which it "
            "changes nothing",
            stacklevel=2,
        )
    window = min(filter(None, config.layer_windows or ()), default=None)
    if window is not None and not found.windows and window < context:
        warnings.warn(
            f"llama.cpp computes this architecture ({name}) without its window of {window} tokens; what it says to "
            "texts longer than that differs from slothcore",
            stacklevel=2,
        )
    return {f"{name}.{key}": value for key, value in values.items()}


def query_factor(config: DecoderConfig) -> float:
    """What the queries are multiplied by in the file, so that llama.cpp's fixed attention scale gives the model's."""
    theirs = config.head_dim**-0.5
    if SCALED_BY_WIDTH.get(config.model_type) == config.num_hidden_layers:
        theirs = (config.hidden_size // config.num_attention_heads) ** -0.5
    factor = config.scale / theirs
    return 1.0 if abs(factor - 1) < 1e-6 else factor


def _rope_scaling(rope: RopeParameters, found: Architecture) -> dict[str, Value]:
    """llama3 needs none of these: its factors are a tensor. Those of longrope are two, which longer contexts choose."""
    if rope.rope_type == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.factor)}
    if rope.rope_type == "longrope":
        values: dict[str, Value] = {
            "rope.scaling.original_context_length": rope.original_max_position_embeddings,
            "rope.scaling.attn_factor": float(rope.attention_scaling),
        }
        return {"rope.scaling.type": "longrope", **values} if found.name == "llama" else values
    if rope.rope_type != "yarn":
        return {}
    # It lets cosines and sines grow as the authors of yarn do, by itself.
    grown = 0.1 * math.log(rope.factor) + 1
    return {
        "rope.scaling.attn_factor": rope.attention_scaling / grown,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(rope.factor),
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }


def _windows(config: DecoderConfig) -> dict[str, Value]:
    window = min(filter(None, config.layer_windows or ()), default=None)
    values: dict[str, Value] = {}
    if config.local_rope is not None:
        values["rope.freq_base_swa"] = float(config.local_rope.rope_theta)
    if window is None:
        # Of Gemma 2 it would take the usual one.
        return values | {"attention.sliding_window": config.longest_document}
    return values | {"attention.sliding_window": window, "attention.sliding_window_pattern": _period(config)}


def _period(config: DecoderConfig) -> int:
    """Every how manyth layer sees the whole text.

    Raises: ValueError if the layers with a window do not lie so, or have different ones.
    """
    windows = config.layer_windows or (None,) * config.num_hidden_layers
    sizes = set(windows) - {None}
    for period in range(1, len(windows) + 2):
        if len(sizes) <= 1 and all((w is None) == (i % period == period - 1) for i, w in enumerate(windows)):
            return period
    raise ValueError(
        f"llama.cpp knows windows of one size in all layers but every n-th, and this model has {windows}; export it "
        "with the format merged"
    )
