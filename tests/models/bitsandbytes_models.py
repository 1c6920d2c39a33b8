"""Tiny models that transformers + bitsandbytes quantise and save, and ways to change what they saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
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

from slothcore.models.decoder import Decoder
from slothcore.models.load import load_model
from tests.models.tiny import SIZES

# Rows of whole blocks: bitsandbytes' CPU decoder misreads others.
WHOLE_BLOCKS = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**WHOLE_BLOCKS),
    "qwen2": Qwen2Config(**{**WHOLE_BLOCKS, "tie_word_embeddings": True}),
    "mistral": MistralConfig(**WHOLE_BLOCKS, sliding_window=7),
    "qwen3": Qwen3Config(**WHOLE_BLOCKS, head_dim=16),
    "gemma2": Gemma2Config(**WHOLE_BLOCKS, head_dim=16, sliding_window=7, pad_token_id=0),
    "gemma3_text": Gemma3TextConfig(**WHOLE_BLOCKS, head_dim=16, sliding_window=7, pad_token_id=0),
    "phi3": Phi3Config(**WHOLE_BLOCKS, pad_token_id=0),
    "mixtral": MixtralConfig(**WHOLE_BLOCKS, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **WHOLE_BLOCKS, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}
STATE = "quant_state.bitsandbytes__nf4"


def quantized(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any
) -> PreTrainedModel:
    """A tiny model, quantised and saved into `folder`; itself as the reference, in training mode.

    In eval mode bitsandbytes would repack its weights for the CPU's matrix instructions.
    """
    dense = AutoModelForCausalLM.from_config(CONFIGS[family])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            weight.normal_(0.0, 0.2, generator=generator)
            if "norm" in name:
                weight += 1.0
    dense.save_pretrained(folder / "dense")
    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
        **options,
    }
    model = AutoModelForCausalLM.from_pretrained(
        folder / "dense",
        dtype=dtype,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(**settings),
        attn_implementation="eager",
    )
    model.save_pretrained(folder)
    # What is dense computes in float32 here, as it does in ours.
    for weight in model.parameters():
        if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
            weight.data = weight.data.float()
    return model.train()


def load(folder: Path, **options: Any) -> Decoder:
    return load_model(folder, **{"bits": 4, "device": "cpu", **options})


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite the weights through `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_state(folder: Path, weight: str, **changes: Any) -> None:
    """Change what a weight's quantisation state says."""

    def change(tensors: dict[str, Tensor]) -> None:
        state = json.loads(bytes(tensors[f"{weight}.{STATE}"].tolist()))
        tensors[f"{weight}.{STATE}"] = torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)

    edit(folder, change)
