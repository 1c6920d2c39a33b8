"""The systems compared. Each file is one of them and offers the functions of `Peer`."""

from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor, nn

MODULES = {"slothcore": "slothcore_", "transformers": "hf", "liger": "liger", "unsloth": "unsloth"}


@dataclass(frozen=True)
class Settings:
    """How a system is to load and train the model.

    Attributes:
        folder: the checkpoint.
        bits: 4 (NF4, double quantisation), 16 (bfloat16) or 32.
        recompute: whether activations are computed again in the backward pass.
        lora_r: rank of LoRA on all seven linears of a layer; lora_alpha equals it.
        longest: most tokens of a sequence.
        device: "cuda" or "cpu".
    """

    folder: str
    bits: int
    recompute: bool
    lora_r: int
    longest: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return torch.float32 if self.bits == 32 else torch.bfloat16


class Peer(Protocol):
    """What a peer's module offers."""

    def load(self, settings: Settings) -> nn.Module:
        """The model with LoRA attached, in training mode; exactly the LoRA factors train."""

    def adamw_8bit(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """bitsandbytes' 8-bit AdamW, as the system offers it."""

    def loss(self, model: nn.Module, input_ids: Tensor, settings: Settings) -> Tensor:
        """The loss of input_ids [B, S] (on the CPU) as their own labels."""


def peer(system: str) -> Peer:
    """The peer of this name. It is imported here, not above, because some of them patch the others."""
    return cast(Peer, import_module(f"benchmarks.peers.{MODULES[system]}"))
