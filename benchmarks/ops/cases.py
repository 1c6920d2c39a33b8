"""All operations that `bench_ops.py` times."""

from collections.abc import Iterator

import torch

from benchmarks.ops import compute_bound, memory_bound
from benchmarks.ops.case import OpCase
from benchmarks.shapes import OpShape


def all_cases(shape: OpShape, *, dtype: torch.dtype, device: str) -> Iterator[OpCase]:
    """The cases one by one, so that the tensors of one are free before the next."""
    yield from memory_bound.norm_cases(shape, dtype, device)
    yield memory_bound.rope_case(shape, dtype, device)
    yield from memory_bound.glu_cases(shape, dtype, device)
    yield from memory_bound.dequantize_cases(shape, dtype, device)
    yield from compute_bound.attention_cases(shape, dtype, device)
    yield compute_bound.cross_entropy_case(shape, dtype, device)
    yield from compute_bound.lora_cases(shape, dtype, device)
