"""Kernels that begin while the one in front of them ends (programmatic dependent launch), on Hopper.

A step of decoding is hundreds of short launches, and between two of them the GPU idles for a microsecond or more. A
kernel launched with `launch_pdl` may begin as soon as every program of the one in front has given a signal or ended.
What nobody writes meanwhile it loads at once: weights, and where the tokens of the pass lie (their rows, positions and
angles, the pages). Then it waits until the kernel in front has ended and its results can be seen.

Such kernels may overlap in any number: each begins when the one before it has signalled. What keeps that sound:
- Each waits, in every program, before it writes anything or reads anything else, and so before it ends. The kernel in
  front has waited likewise, so whoever is past the wait has all that was launched before behind him: also the readers
  of a buffer whose memory he writes.
- What writes weights and places is none of them: whatever is launched behind such a kernel begins when it has ended.
"""

import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.gpu import is_hopper

MOST_ROWS = 64
"""With more rows a pass is no step of decoding, and its launches overlap with nothing that counts: but those of
nf4_gemm_warps.py, which begin early with any number of rows, to read codes meanwhile."""


def begins_early(x: Tensor) -> bool:
    """Whether kernels that read the few rows of x begin while the one in front of them ends."""
    return x.is_cuda and x.shape[0] <= MOST_ROWS and is_hopper(x.device)


@triton.jit
def signal_early(EARLY: tl.constexpr):
    """Let the next kernel begin: for programs that are few, or short; else its own take the places of this one's."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_early(EARLY: tl.constexpr):
    """Wait until all that was launched before has ended."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
