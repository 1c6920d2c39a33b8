"""The systems compared. Each file is one of them and offers the functions of `Peer`."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor, nn

MODULES = {"slothcore": "slothcore_", "transformers": "hf", "liger": "liger", "unsloth": "unsloth"}
# What must be installed for each.
PACKAGES = {
    "slothcore": (),
    "transformers": ("transformers", "peft"),
    "liger": ("transformers", "peft", "liger_kernel"),
    "unsloth": ("unsloth",),
}
# Sequences of a micro-batch that users of padded training choose for short sequences.
PADDED_MICRO_BATCH = 2


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

    def loss(
        self, model: nn.Module, sequences: Iterable[Tensor], settings: Settings, num_items: int | None = None
    ) -> Tensor:
        """The loss of sequences [S] each (on the CPU) as their own labels.

        Its sum over all targets over num_items; None: over their number. Each system lays out the sequences as its
        users do: padded to the longest, or end to end.
        """


def installed() -> list[str]:
    """The systems that can run here."""
    return [system for system, packages in PACKAGES.items() if all(find_spec(package) for package in packages)]


def variants(system: str, case: str) -> list[str]:
    """The ways in which the users of a system run a case.

    Sequences of different lengths cost padding: whoever pads is measured in micro-batches of two, as in the peers'
    notebooks, and in a single one, which pads more but dequantises the model once. slothcore packs them all.
    """
    return [f"alpaca/{PADDED_MICRO_BATCH}", "alpaca"] if case == "alpaca" and system != "slothcore" else [case]


def peer(system: str) -> Peer:
    """The peer of this name. It is imported here, not above, because some of them patch the others."""
    return cast(Peer, import_module(f"benchmarks.peers.{MODULES[system]}"))
