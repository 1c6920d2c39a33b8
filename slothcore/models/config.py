"""What a decoder is, and the fields of a Hugging Face `config.json` that every family spells alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slothcore.layers.rope import RopeParameters
from slothcore.models.hf_config import HfConfig
from slothcore.models.rope_config import take_rope

HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
HIDDEN_ACTS: tuple[str, ...] = get_args(HiddenAct)


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Routed experts in place of the dense MLP: a router sends each token to a few of them.

    Attributes:
        num_experts: experts of one layer.
        experts_per_token: how many of them a token goes to.
        intermediate_size: width of one expert.
        normalize_weights: whether the chosen experts' weights are scaled to a sum of one.
        aux_loss_coef: weight of the load-balancing loss.
        use_aux_loss: whether training adds that loss.
        block_name: how a layer's routed block is called, as the checkpoint has it.
        expert_names: how an expert's gate, up and down projections are called.
        layers: which layers are sparse.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    normalize_weights: bool
    aux_loss_coef: float = 0.001
    use_aux_loss: bool = False
    block_name: Literal["mlp", "block_sparse_moe"] = "mlp"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    layers: tuple[bool, ...]

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.intermediate_size < 1:
            raise ValueError(
                f"the number and the width of experts must be positive, got {self.num_experts} and "
                f"{self.intermediate_size}"
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in 1..{self.num_experts} (the experts), got {self.experts_per_token}"
            )


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Every switch of the one decoder. Names are Hugging Face's where it has one."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: HiddenAct
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeParameters
    local_rope: RopeParameters | None = None  # of the layers that have a window; None: `rope` there too
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: bool = False  # one qkv_proj, its rows q | k | v
    fused_gate_up: bool = False  # one gate_up_proj, its rows gate | up
    qk_norm: bool = False  # a norm over each query and key head before RoPE
    sandwich_norms: bool = False  # each branch is normed before it is added, too
    norm_weight_offset: float = 0.0
    norm_casts_before_weight: bool = True
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    layer_windows: tuple[int | None, ...] | None = None  # None: every layer sees the whole document
    moe: MoeConfig | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not self.initializer_range >= 0:
            raise ValueError(f"initializer_range must be at least 0, got {self.initializer_range!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.hidden_act not in HIDDEN_ACTS:
            raise ValueError(f"hidden_act must be one of {', '.join(HIDDEN_ACTS)}, got {self.hidden_act!r}")
        if self.layer_windows is not None and len(self.layer_windows) != self.num_hidden_layers:
            raise ValueError(
                f"layer_windows must have one entry for each of {self.num_hidden_layers} layers, "
                f"got {len(self.layer_windows)}"
            )
        if not all(window is None or window > 0 for window in self.layer_windows or ()):
            raise ValueError(f"a window of attention must be positive, got {self.layer_windows}")
        for name in ("attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.moe is not None and len(self.moe.layers) != self.num_hidden_layers:
            raise ValueError(
                f"moe.layers must have one entry for each of {self.num_hidden_layers} layers, got "
                f"{len(self.moe.layers)}"
            )
        if not all(isinstance(token, int) for token in self.eos_token_ids):
            raise ValueError(f"eos_token_id must be a token id or a list of them, got {list(self.eos_token_ids)!r}")
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id must be below vocab_size, got {self.pad_token_id} and {self.vocab_size}; "
                "set it to null, or to a token that the embedding has"
            )

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longest_document(self) -> int:
        """How many positions the model is meant for.

        Files with the types dynamic and yarn may keep in max_position_embeddings what the model was trained for; Qwen
        tells users to add yarn to config.json and to change nothing else.
        """
        rope = self.rope
        if rope.rope_type == "dynamic":
            return round(self.max_position_embeddings * rope.factor)
        if rope.rope_type == "yarn":
            return max(self.max_position_embeddings, round(rope.original_max_position_embeddings * rope.factor))
        return self.max_position_embeddings

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None: its whole document."""
        return None if self.layer_windows is None else self.layer_windows[layer]

    def is_local(self, layer: int) -> bool:
        """Whether this layer turns its heads by `local_rope`."""
        return self.local_rope is not None and self.window(layer) is not None

    def is_sparse(self, layer: int) -> bool:
        """Whether this layer has routed experts in place of the dense MLP."""
        return self.moe is not None and self.moe.layers[layer]


def common_fields(hf: HfConfig, *, partial_rotary: bool = False, **defaults: Any) -> dict[str, Any]:
    """The fields that every family spells alike, as keyword arguments of `DecoderConfig`.

    Args:
        hf: their keys are taken out of it.
        partial_rotary: whether this architecture can turn a part of each head only.
        defaults: what this family takes for a key that is absent, where that is not the value below. A null in the
            file stays null: it means "none".
    """
    fields = fields_without_rope(hf, **defaults)
    lengths = fields["max_position_embeddings"], fields["head_dim"]
    return {**fields, "rope": take_rope(hf, *lengths, partial_rotary=partial_rotary)}


def fields_without_rope(hf: HfConfig, **defaults: Any) -> dict[str, Any]:
    """`common_fields` for a family whose rotary positions need a reading of their own."""
    for key, value in defaults.items():
        hf.values.setdefault(key, value)
    refuse_other_architectures(hf)
    hf.require("attention_dropout", 0.0)
    quantization = hf.take("quantization_config", dict, {})
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ValueError(
            f"{hf.source}: these weights are quantised already (quantization_config, quant_method {method!r}); load "
            "the original 16-bit model, slothcore quantises it itself with bits=4"
        )
    heads, hidden_size = hf.take("num_attention_heads", int), hf.take("hidden_size", int)
    head_dim = hf.take("head_dim", int, 0)
    if not head_dim:
        if heads <= 0 or hidden_size % heads:
            raise ValueError(
                f"{hf.source}: hidden_size must be a multiple of num_attention_heads where head_dim is not given, "
                f"got {hidden_size} and {heads}"
            )
        head_dim = hidden_size // heads
    eos = hf.take("eos_token_id", (int, list), [])
    return {
        "model_type": hf.take("model_type", str),
        "vocab_size": hf.take("vocab_size", int),
        "hidden_size": hidden_size,
        "intermediate_size": hf.take("intermediate_size", int),
        "num_hidden_layers": hf.take("num_hidden_layers", int),
        "num_attention_heads": heads,
        "num_key_value_heads": hf.take("num_key_value_heads", int, heads),
        "head_dim": head_dim,
        "hidden_act": hf.take("hidden_act", str, "silu"),
        "rms_norm_eps": hf.take("rms_norm_eps", float, 1e-6),
        "max_position_embeddings": hf.take("max_position_embeddings", int, 2048),
        "tie_word_embeddings": hf.take("tie_word_embeddings", bool, False),
        "initializer_range": hf.take("initializer_range", float, 0.02),
        "bos_token_id": hf.take("bos_token_id", int, None),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": hf.take("pad_token_id", int, None),
    }


def refuse_other_architectures(hf: HfConfig) -> None:
    """Take the keys that say "this is no plain causal decoder" where they are set."""
    for key in ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"):
        hf.require(key, False)
    hf.require("chunk_size_feed_forward", 0)
    hf.require("pruned_heads", {})


def take_layer_windows(
    hf: HfConfig, num_hidden_layers: int, window: int | None, *, is_sliding: Callable[[int], bool]
) -> tuple[int | None, ...] | None:
    """Which layers see only a window: what `layer_types` says, else what the family's own rule says.

    Args:
        hf: `layer_types` is taken out of it.
        window: of the sliding layers; None: the file has none.
        is_sliding: the family's rule, by the number of a layer.
    Returns: the window of each layer; None if no layer has one.
    Raises: ValueError for a layer type that is not implemented, or sliding layers without a window.
    """
    types = hf.take("layer_types", list, None)
    if types is None:
        sliding = [window is not None and is_sliding(layer) for layer in range(num_hidden_layers)]
    else:
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise ValueError(
                    f"{hf.source}: layer_types names {kind!r}, which is not supported (only 'full_attention', "
                    "'sliding_attention')"
                )
        if len(types) != num_hidden_layers:
            raise ValueError(
                f"{hf.source}: layer_types must have one entry for each of {num_hidden_layers} layers, got {len(types)}"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        if any(sliding) and window is None:
            raise ValueError(f"{hf.source}: layer_types names sliding layers, but sliding_window gives them no window")
    return tuple(window if slides else None for slides in sliding) if any(sliding) else None
