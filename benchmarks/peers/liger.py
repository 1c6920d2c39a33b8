"""transformers + PEFT + bitsandbytes with Liger's kernels in the place of its layers."""

from liger_kernel.transformers import apply_liger_kernel_to_llama
from torch import nn

from benchmarks.peers import Settings, hf
from benchmarks.peers.hf import loss

__all__ = ["load", "loss"]


def load(settings: Settings) -> nn.Module:
    apply_liger_kernel_to_llama()
    return hf.load(settings)
