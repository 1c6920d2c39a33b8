"""transformers + PEFT + bitsandbytes with Liger's kernels in the place of its layers."""

from liger_kernel.transformers import apply_liger_kernel_to_llama
from torch import nn

from benchmarks.peers import Settings, hf
from benchmarks.peers.hf import adamw_8bit, configure, loss

__all__ = ["adamw_8bit", "configure", "load", "loss"]


def load(settings: Settings) -> nn.Module:
    apply_liger_kernel_to_llama()
    return hf.load(settings)
