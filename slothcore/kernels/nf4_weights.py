"""Several NF4 weights over one input, below each other in one launch: what each brings, and which one a program has.

Inside a kernel a weight is a tuple: words, absmax, nested_absmax, nested_offset, nested_code, lora_B, bias, its number
of rows, its rank and its scaling. `weight_arguments` makes the arguments of three of them, in the kernels' order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4 import absmax_arguments
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_tensor import Nf4Tensor

LARGEST_GROUP = 3


def are_alike(weights: Sequence[Nf4Tensor], lora_B: Factors, biases: Sequence[Tensor | None]) -> bool:
    """Whether one launch serves these: a program chooses its weight when it runs, so all are of one kind."""
    kinds = {weight.is_nested for weight in weights}, dtypes(lora_B), dtypes(biases), {bias is None for bias in biases}
    return 0 < len(weights) <= LARGEST_GROUP and all(len(kind) < 2 for kind in kinds)


def dtypes(tensors: Sequence[Tensor | None]) -> set[torch.dtype]:
    """Those of the tensors that there are."""
    return {tensor.dtype for tensor in tensors if tensor is not None}


def weight_arguments(weights: Sequence[Nf4Tensor], terms: Terms) -> list[Any]:
    """The pointers of three weights, their rows, ranks and scalings."""
    some_B = next((B for B in terms.lora_B if B is not None), None)
    pointers, rows, ranks = [], [], []
    for weight, B, bias in zip(weights, terms.lora_B, terms.biases, strict=True):
        words = weight.packed.view(torch.int32)
        parts = *absmax_arguments(weight), some_B if B is None else B.contiguous(), bias
        # Any pointer does for what is not there: nothing is read of it.
        pointers.append((words, *(words if part is None else part for part in parts)))
        rows.append(weight.shape[0])
        ranks.append(0 if B is None else B.shape[1])
    missing = LARGEST_GROUP - len(weights)
    pointers += pointers[:1] * missing
    none = [0] * missing
    return [*(p for each in pointers for p in each), *rows, *none, *ranks, *none, *terms.scalings, *(1.0,) * missing]


@triton.jit
def chosen_weight(tile, first, second, third, ROWS: tl.constexpr, WEIGHTS: tl.constexpr):
    """The weight to which a tile of ROWS rows belongs, its number there, its weight's first output and first rank.

    Each weight has tiles of its own; the outputs of all stand side by side, and so do the ranks.
    """
    weight, number, out_first, rank_first = first, tile, 0, 0
    if WEIGHTS > 1:
        tiles = tl.cdiv(first[7], ROWS)
        if tile >= tiles:
            weight, number, out_first, rank_first = second, tile - tiles, first[7], first[8]
    if WEIGHTS > 2:
        tiles += tl.cdiv(second[7], ROWS)
        if tile >= tiles:
            weight, number = third, tile - tiles
            out_first, rank_first = first[7] + second[7], first[8] + second[8]
    return weight, number, out_first, rank_first
