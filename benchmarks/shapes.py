"""What is measured: model configurations, cases of a training step, and the shapes of single operations."""

from dataclasses import dataclass
from typing import Any

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

# The same model in small, to try the machinery on a CPU. Its figures mean nothing.
TINY = LLAMA_3_1_8B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@dataclass(frozen=True)
class StepCase:
    """One optimizer step over `rows` sequences of `length` tokens, every token but the first of a row a target."""

    rows: int
    length: int

    @classmethod
    def parse(cls, text: str) -> "StepCase":
        """From "4x2048". Raises: ValueError for anything else."""
        rows, _, length = text.partition("x")
        if not (rows.isdigit() and length.isdigit() and int(rows) >= 1 and int(length) >= 2):
            raise ValueError(f"a case is ROWSxLENGTH, such as 4x2048, got {text!r}")
        return cls(int(rows), int(length))

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


@dataclass(frozen=True)
class OpShape:
    """Sizes from which the shapes of single operations follow; documents of equal length fill the tokens."""

    tokens: int
    document_length: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def documents(self) -> int:
        return self.tokens // self.document_length

    @classmethod
    def of(cls, config: dict[str, Any], *, tokens: int, document_length: int) -> "OpShape":
        """The sizes of a model. Raises: ValueError if documents of this length do not fill the tokens."""
        if tokens % document_length:
            raise ValueError(f"{tokens} tokens are no whole number of documents of {document_length}")
        return cls(
            tokens,
            document_length,
            config["hidden_size"],
            config["intermediate_size"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["vocab_size"],
        )
