"""Unsloth's fast inference, as its notebooks switch it on. Importing it patches transformers: a process of its own."""

# ruff: noqa: I001  (it must come before transformers and peft)
from unsloth import FastLanguageModel

from torch import nn

from benchmarks.peers import Settings
from benchmarks.peers.unsloth import load
from benchmarks.writers.hf import write

__all__ = ["load", "prepare", "write"]


def prepare(model: nn.Module, settings: Settings, *, rows: int, tokens: int) -> nn.Module:
    FastLanguageModel.for_inference(model)
    return model
