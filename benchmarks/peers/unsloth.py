"""Unsloth, set up as its notebooks do. Importing it patches transformers, so it needs a process of its own."""

# ruff: noqa: I001  (it must come before transformers and peft)
from unsloth import FastLanguageModel

from torch import nn

from benchmarks.peers import Settings
from benchmarks.peers.hf import adamw_8bit, loss
from benchmarks.shapes import LORA_TARGETS

__all__ = ["adamw_8bit", "configure", "load", "loss"]


def load(settings: Settings) -> nn.Module:
    model, _ = FastLanguageModel.from_pretrained(
        model_name=settings.folder,
        max_seq_length=settings.longest,
        dtype=settings.dtype,
        load_in_4bit=settings.bits == 4,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=settings.lora_r,
        lora_alpha=settings.lora_r,
        target_modules=LORA_TARGETS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False if settings.recompute == "no" else "unsloth",
        max_seq_length=settings.longest,
    )
    return model.train()


def configure(model: nn.Module, settings: Settings) -> None:
    """Nothing: Unsloth settles recomputation when it loads the model."""
