"""Unsloth, set up as its notebooks do. Importing it patches transformers, so it needs a process of its own."""

# ruff: noqa: I001  (it must come before transformers and peft)
from unsloth import FastLanguageModel

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.peers import Settings, hf
from benchmarks.peers.hf import adamw_8bit
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


def loss(model: nn.Module, sequences: Iterable[Tensor], settings: Settings, num_items: int | None = None) -> Tensor:
    """Sequences of one length as a batch; others without padding, as its SFTTrainer has them unless told otherwise."""
    documents = list(sequences)
    lengths = torch.tensor([len(document) for document in documents], dtype=torch.int32)
    if (lengths == lengths[0]).all():
        return hf.loss(model, documents, settings, num_items)
    return hf.loss_of(model, hf.end_to_end(documents) | {"packed_seq_lengths": lengths}, settings, num_items)
