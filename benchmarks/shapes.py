"""What is measured: model configurations, cases of a training step, and the shapes of single operations."""

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# How many rows of Alpaca have how many tokens: 4,000 rows, each the prompt with its Instruction, Input and Response
# headings plus the answer, in Llama 3's tokens with one at the beginning of the text.
ALPACA_LENGTHS = Path(__file__).resolve().parent / "alpaca_lengths.json"

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
            raise ValueError(f"a case is ROWSxLENGTH, such as 4x2048, or alpaca, got {text!r}")
        return cls(int(rows), int(length))

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def longest(self) -> int:
        return self.length

    @property
    def batches(self) -> int:
        """After how many steps the lengths come again."""
        return 1

    def lengths(self, step: int) -> list[int]:
        """Tokens of each sequence; the same in every step."""
        return [self.length] * self.rows

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}"


@dataclass(frozen=True)
class AlpacaCase:
    """One optimizer step over `rows` sequences as long as Alpaca's: 119 tokens on average, half of them under 103.

    The lengths of `batches` steps come again and again, so that a warm-up can meet them all before any is timed.
    """

    rows: int = 8
    batches: int = 4

    @property
    def longest(self) -> int:
        return max(alpaca_lengths())

    def lengths(self, step: int) -> list[int]:
        """Tokens of each sequence of this step; the same for every system and in every run."""
        counts = alpaca_lengths()
        return random.Random(step % self.batches).choices(list(counts), weights=list(counts.values()), k=self.rows)

    def __str__(self) -> str:
        return "alpaca"


@cache
def alpaca_lengths() -> dict[int, int]:
    """Tokens of a row -> how many rows have as many."""
    return {int(length): count for length, count in json.loads(ALPACA_LENGTHS.read_text(encoding="utf-8")).items()}


def parse_case(text: str) -> tuple[StepCase | AlpacaCase, int]:
    """The sequences of an optimizer step, and how many of them go through the model at a time.

    From "4x2048" or "alpaca", all at once, or "alpaca/2", two at a time, their gradients summed.

    Raises: ValueError for anything else.
    """
    name, slash, size = text.partition("/")
    case = AlpacaCase() if name == "alpaca" else StepCase.parse(name)
    if not slash:
        return case, case.rows
    if not (size.isdigit() and int(size) >= 1 and case.rows % int(size) == 0):
        raise ValueError(f"the micro-batch in {text!r} must divide the {case.rows} sequences of a step")
    return case, int(size)


def step_name(text: str) -> str:
    """What a case trains on, whatever its micro-batches: "alpaca" of "alpaca/2"."""
    return text.partition("/")[0]


def growth_cases(unit: int) -> tuple[list[str], list[str]]:
    """Steps whose cost should grow in proportion, in two series.

    Args:
        unit: 1024, or less to try the machinery.
    Returns: 1 to 64 documents of `unit` tokens; 8 * `unit` tokens in 1 to 16 documents.
    """
    return [f"{2**i}x{unit}" for i in range(7)], [f"{2**i}x{8 * unit // 2**i}" for i in range(5)]


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
