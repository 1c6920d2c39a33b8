"""Matrix products of rows sorted by expert in plain torch; the twin of `grouped_gemm.py`, where the equations stand.

One product for each expert that has rows, which means waiting for `offsets` where they lie on a GPU. float64 is taken
too. Each matrix product rounds once to the dtype, as in a model built of nn.Linear.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from slothcore.kernels.nf4_eager import nf4_dequantize
from slothcore.kernels.nf4_experts import Nf4Experts


def grouped_linear(
    x: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    *,
    lora_x: Tensor | None = None,
    lora_B: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return x W_e^T + lora_x lora_B_e^T for the rows of every expert e.

    Args:
        x: [M, K], sorted by expert.
        weight: [E, N, K], dense of x.dtype or NF4.
        offsets: [E + 1] int32, where each expert's rows begin; the last is M.
        lora_x: [M, R] of x.dtype, or None for no LoRA term.
        lora_B: [E, N, R] of x.dtype with the scaling folded in; given exactly if `lora_x` is.
        out: [M, N] to write into, for example columns of a wider tensor.
    Returns: `out`, or a new tensor [M, N] of x.dtype.
    Raises: ValueError if a shape or dtype does not fit.
    """
    out = check_product(x, weight, offsets, lora_x, lora_B, out, backward=False)
    for expert, rows in _expert_rows(offsets):
        torch.mm(x[rows], _dense(weight, expert, x.dtype).t(), out=out[rows])
        if lora_x is not None and lora_B is not None:
            out[rows].addmm_(lora_x[rows], lora_B[expert].t())
    return out


def grouped_input_grad(
    dy: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    *,
    lora_dy: Tensor | None = None,
    lora_A: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """Return dy W_e + lora_dy lora_A_e for the rows of every expert e, the gradient of `grouped_linear`'s x.

    Args:
        dy: [M, N], sorted by expert.
        weight: [E, N, K], dense of dy.dtype or NF4.
        offsets: [E + 1] int32.
        lora_dy: [M, R] of dy.dtype, or None for no LoRA term.
        lora_A: [E, R, K] of dy.dtype; given exactly if `lora_dy` is.
        add_to: [M, K] to which the result is added in place.
    Returns: `add_to`, or a new tensor [M, K] of dy.dtype.
    Raises: ValueError if a shape or dtype does not fit.
    """
    out = check_product(dy, weight, offsets, lora_dy, lora_A, add_to, backward=True)
    for expert, rows in _expert_rows(offsets):
        product = torch.mm(dy[rows], _dense(weight, expert, dy.dtype))
        if lora_dy is not None and lora_A is not None:
            product.addmm_(lora_dy[rows], lora_A[expert])
        out[rows] = product if add_to is None else out[rows] + product
    return out


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor, *, dtype: torch.dtype, scaling: float = 1.0) -> Tensor:
    """Return scaling * left_e^T right_e of every expert e, summed over its rows in float32 (float64 in itself).

    Args:
        left: [M, P], sorted by expert.
        right: [M, Q] of left.dtype.
        offsets: [E + 1] int32.
        dtype: of the result, to which the scaled sums round once.
    Returns: [E, P, Q]; zero for an expert without rows.
    Raises: ValueError if a shape or dtype does not fit.
    """
    check_outer(left, right, offsets)
    wide = torch.promote_types(left.dtype, torch.float32)
    out = torch.zeros(offsets.numel() - 1, left.shape[1], right.shape[1], dtype=dtype, device=left.device)
    for expert, rows in _expert_rows(offsets):
        out[expert] = torch.mm(left[rows].t().to(wide), right[rows].to(wide)).mul_(scaling)
    return out


def check_product(
    left: Tensor,
    weight: Tensor | Nf4Experts,
    offsets: Tensor,
    lora_left: Tensor | None,
    lora_weight: Tensor | None,
    out: Tensor | None,
    *,
    backward: bool,
) -> Tensor:
    """Where the product goes: `out` if it fits, or a new tensor.

    backward: `left` meets the rows of the weight [N, K], not its columns.
    Raises: ValueError if a shape or dtype does not fit.
    """
    experts, out_features, in_features = weight.shape
    inner, columns = (out_features, in_features) if backward else (in_features, out_features)
    rows = left.shape[0]
    _require("the rows", left, (rows, inner), left.dtype)
    _require("offsets", offsets, (experts + 1,), torch.int32)
    if isinstance(weight, Tensor):
        _require("weight", weight, (experts, out_features, in_features), left.dtype)
    if (lora_left is None) != (lora_weight is None):
        raise ValueError("a LoRA term needs both its operands, got only one of them; pass both or neither")
    if lora_left is not None and lora_weight is not None:
        rank = lora_left.shape[-1]
        _require("the LoRA rows", lora_left, (rows, rank), left.dtype)
        factor = (experts, rank, columns) if backward else (experts, columns, rank)
        _require("the LoRA factor", lora_weight, factor, left.dtype)
    if out is None:
        return torch.empty(rows, columns, dtype=left.dtype, device=left.device)
    _require("the output", out, (rows, columns), left.dtype)
    if out.stride(1) != 1:
        raise ValueError(f"the output must have dense rows, got strides {out.stride()}; pass a slice of columns")
    return out


def check_outer(left: Tensor, right: Tensor, offsets: Tensor) -> None:
    """Raise ValueError unless left [M, P] and right [M, Q] share rows and dtype, and offsets is [E + 1] int32."""
    _require("the right rows", right, (left.shape[0], right.shape[-1]), left.dtype)
    _require("offsets", offsets, (offsets.numel(),), torch.int32)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"grouped product: {name} must be {dtype} of shape {shape}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)}; convert or reshape it first"
        )


def _expert_rows(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and where they are."""
    for expert, (first, end) in enumerate(pairwise(offsets.tolist())):
        if first < end:
            yield expert, slice(first, end)


def _dense(weight: Tensor | Nf4Experts, expert: int, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, Tensor):
        return weight[expert]
    return nf4_dequantize(weight.expert(expert), dtype=dtype)
