"""Tiny random Llamas that transformers itself makes and saves: the reference of every parity test."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one key head": {"num_key_value_heads": 1},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.5}},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24, "num_key_value_heads": 4},
    "pad token in the text": {"pad_token_id": 0},
}


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    """A float32 Llama in eval mode whose every weight is random, the norms' and biases' too.

    Weights are large for the sizes, so that attention is far from uniform and every switch shows in the logits.
    """
    config = LlamaConfig(**{**SIZES, **overrides}, attn_implementation="eager")
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 0.2, generator=generator)
            if "norm" in name:
                weight += 1.0
    return model


def saved(model: LlamaForCausalLM, folder: Path, **options: Any) -> Path:
    """Write `model` as transformers does and return the folder."""
    model.save_pretrained(folder, **options)
    return folder


def token_ids(*shape: int, vocab_size: int = SIZES["vocab_size"], seed: int = 3) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))
