"""What launchers ask about a GPU, its copy engine, and this Triton. Each answer is found once."""

from functools import cache

import torch
from torch import Tensor


@cache
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability; None for the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9."""
    capability = device_capability(device)
    return capability is not None and capability[0] == 9


def has_tensor_cores(device: torch.device) -> bool:
    """Whether `tl.dot` of 16-bit operands uses a GPU's; before Ampere Triton multiplies element by element, and only
    cuBLAS does not. The interpreter counts as having them.
    """
    capability = device_capability(device)
    return capability is None or capability >= (8, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def has_gluon() -> bool:
    """Whether this Triton has the parts of Gluon that kernels here are written with; older ones do not."""
    try:
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.language.nvidia import hopper
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor  # noqa: F401
    except ImportError:
        return False
    return hasattr(gl, "warp_specialize") and hasattr(hopper, "warpgroup_mma_wait")


def copy_engine_takes(matrix: Tensor) -> bool:
    """Rows must be contiguous, apart (an expanded gradient's are not) and start at multiples of 16 bytes."""
    return (
        matrix.stride(1) == 1
        and matrix.stride(0) >= matrix.shape[1]
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.numel() > 0
    )
