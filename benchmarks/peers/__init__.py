"""The systems compared. Each file is one of them and offers the functions of `Peer`."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch
from torch import Tensor, nn

# In the order in which they run: whoever needs most of a time limit comes last.
MODULES = {"slothcore": "slothcore_", "unsloth": "unsloth", "liger": "liger", "transformers": "hf"}
# What must be installed for each.
PACKAGES = {
    "slothcore": (),
    "unsloth": ("unsloth",),
    "liger": ("transformers", "peft", "liger_kernel"),
    "transformers": ("transformers", "peft"),
}
# Sequences of a micro-batch that the peers' users choose for short sequences.
PEER_MICRO_BATCH = 2
# What may be computed again in the backward pass: nothing; gate and up; those, the rest waiting in the host's memory;
# all of a layer.
RECOMPUTE = ("no", "mlp", "offload", "yes")
# Systems that settle recomputation when they load the model.
FIXED_AT_LOADING = ("unsloth",)


@dataclass(frozen=True)
class Settings:
    """How a system is to load and train the model.

    Attributes:
        folder: the checkpoint.
        bits: 4 (NF4, double quantisation), 16 (bfloat16) or 32.
        recompute: one of `RECOMPUTE`; the peers know "no" and "yes".
        lora_r: rank of LoRA on all seven linears of a layer; lora_alpha equals it.
        longest: most tokens of a sequence.
        device: "cuda" or "cpu".
        decoded: how many layers keep their NF4 weights decoded; slothcore alone.
        graphs: whether short steps may be replayed as CUDA graphs; slothcore alone.
    """

    folder: str
    bits: int
    recompute: str
    lora_r: int
    longest: int
    device: str
    decoded: int = 0
    graphs: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return torch.float32 if self.bits == 32 else torch.bfloat16


class Peer(Protocol):
    """What a peer's module offers."""

    def load(self, settings: Settings) -> nn.Module:
        """The model with LoRA attached, in training mode; exactly the LoRA factors train."""

    def configure(self, model: nn.Module, settings: Settings) -> None:
        """Make a loaded model run as the settings have it, whatever it ran like before.

        Called before every case. A system of `FIXED_AT_LOADING` has nothing to do.
        """

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
    """The ways in which the users of a system cut a case into micro-batches.

    Where lengths differ the peers are measured in micro-batches of two, as in their notebooks, and in a single one,
    which decodes the weights once; transformers and Liger pad both. slothcore takes them all.
    """
    return [f"alpaca/{PEER_MICRO_BATCH}", "alpaca"] if case == "alpaca" and system != "slothcore" else [case]


def peer(system: str) -> Peer:
    """The peer of this name. It is imported here, not above, because some of them patch the others."""
    return cast(Peer, import_module(f"benchmarks.peers.{MODULES[system]}"))
