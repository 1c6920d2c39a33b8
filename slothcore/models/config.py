"""What a decoder is, and the strict reading of a Hugging Face `config.json` into it."""

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from slothcore.layers.rope import ROPE_TYPES, RopeParameters

HiddenAct = Literal["silu", "gelu_pytorch_tanh"]
HIDDEN_ACTS: tuple[str, ...] = get_args(HiddenAct)

# Keys that change neither the values nor the gradients of a model: book-keeping, how other libraries run it, and
# defaults of transformers' generate, which slothcore takes from the caller instead.
HARMLESS_KEYS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "do_sample",
        "dtype",
        "finetuning_task",
        "id2label",
        "is_llama_config",
        "label2id",
        "max_length",
        "max_sequence_length",
        "min_length",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "repetition_penalty",
        "return_dict",
        "task_specific_params",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
    }
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
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    norm_weight_offset: float = 0.0
    norm_casts_before_weight: bool = True
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    layer_windows: tuple[int | None, ...] | None = None  # None: every layer sees the whole document
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

    def window(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees, itself included; None: its whole document."""
        return None if self.layer_windows is None else self.layer_windows[layer]


_REQUIRED = object()


@dataclass
class HfConfig:
    """A `config.json` from which each key is taken once; what is left over at the end is an error.

    Attributes:
        values: the keys not yet taken.
        source: where they came from, for messages.
    """

    values: dict[str, Any]
    source: str = "config.json"
    known: set[str] = field(default_factory=set)

    def take(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """Remove and return a value; null counts as absent.

        Raises: ValueError if the key is absent without a default, or its value is not of `kind`.
        """
        self.known.add(key)
        value = self.values.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.source} lacks the key {key!r}")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds:
            kinds = (*kinds, int)
        # bool is an int to Python, but `"num_hidden_layers": true` is a mistake.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise ValueError(f"{self.source}: {key} must be {names}, got {value!r}")
        return value

    def require(self, key: str, *allowed: Any) -> None:
        """Take a key that has only some values we implement; absent counts as the first of them.

        Raises: ValueError naming the key and its value for any other.
        """
        self.known.add(key)
        value = self.values.pop(key, None)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.source}: {key} = {value!r} is not supported (only {', '.join(map(repr, allowed))})"
            )

    def finish(self) -> None:
        """Raise ValueError if a key is left that could change the model."""
        left = [key for key, value in self.values.items() if key not in HARMLESS_KEYS and value is not None]
        if left:
            key = left[0]
            near = difflib.get_close_matches(key, [*self.known, *HARMLESS_KEYS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.source}: the key {key!r} (= {self.values[key]!r}) is not supported{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises: ValueError, naming the file, if it is absent or holds anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def common_fields(hf: HfConfig) -> dict[str, Any]:
    """The fields that every family spells alike, as keyword arguments of `DecoderConfig`."""
    for key, neutral in (("is_encoder_decoder", False), ("add_cross_attention", False), ("chunk_size_feed_forward", 0)):
        hf.require(key, neutral)
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
    max_positions = hf.take("max_position_embeddings", int, 2048)
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
        "max_position_embeddings": max_positions,
        "rope": take_rope(hf, max_positions),
        "tie_word_embeddings": hf.take("tie_word_embeddings", bool, False),
        "initializer_range": hf.take("initializer_range", float, 0.02),
        "bos_token_id": hf.take("bos_token_id", int, None),
        "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,),
        "pad_token_id": hf.take("pad_token_id", int, None),
    }


def take_rope(hf: HfConfig, max_position_embeddings: int) -> RopeParameters:
    """Read RoPE from `rope_theta` with `rope_scaling`, or from the newer `rope_parameters` that holds both."""
    theta = hf.take("rope_theta", float, None)
    scaling = hf.take("rope_scaling", dict, None)
    parameters = hf.take("rope_parameters", dict, None)
    values = dict(parameters or scaling or {})
    rope_type = values.pop("rope_type", None) or values.pop("type", None) or "default"
    values.pop("type", None)  # older files name the type twice
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{hf.source}: RoPE type {rope_type!r} is not supported; known are {', '.join(ROPE_TYPES)}")
    inner = HfConfig(values, f"{hf.source}, RoPE")
    inner.require("partial_rotary_factor", 1.0)
    fields: dict[str, Any] = {
        "rope_type": rope_type,
        "rope_theta": float(inner.take("rope_theta", float, theta or 1e4)),
    }
    if rope_type != "default":
        fields["factor"] = float(inner.take("factor", float))
    if rope_type == "llama3":
        fields["low_freq_factor"] = float(inner.take("low_freq_factor", float))
        fields["high_freq_factor"] = float(inner.take("high_freq_factor", float))
        fields["original_max_position_embeddings"] = inner.take(
            "original_max_position_embeddings", int, max_position_embeddings
        )
    inner.finish()
    return RopeParameters(**fields)
