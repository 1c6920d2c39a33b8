"""The systems compared in writing. Each file is one of them and offers the functions of `Writer`."""

from importlib import import_module
from typing import Any, Protocol, cast

from torch import nn

from benchmarks.peers import Settings

# In the order in which they run: whoever needs most of a time limit comes last.
MODULES = {"slothcore": "slothcore_", "transformers": "hf", "unsloth": "unsloth"}


class Writer(Protocol):
    """What a system's module offers."""

    def load(self, settings: Settings) -> nn.Module:
        """The model with LoRA attached and not merged; exactly the LoRA factors require gradients."""

    def prepare(self, model: nn.Module, settings: Settings, *, rows: int, tokens: int) -> Any:
        """What `write` takes: the model made ready for at most so many prompts at a time.

        Args:
            tokens: of all prompts together with their continuations, at most; one has `settings.longest` at most.
        """

    def write(self, ready: Any, prompts: list[list[int]], new_tokens: list[int]) -> list[list[int]]:
        """Greedy continuations, each of as many tokens as it is to have, on the host."""


def writer(system: str) -> Writer:
    """The system of this name. It is imported here, not above, because some of them patch the others."""
    return cast(Writer, import_module(f"benchmarks.writers.{MODULES[system]}"))
