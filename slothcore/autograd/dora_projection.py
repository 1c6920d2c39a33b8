"""What DoRA adds to linear maps over one input: the columns' scales, and dropout as PEFT has it, as plain functions.

The Functions in `dora.py`, where the equations stand, are compositions of these and of those in `lora_projection.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slothcore.autograd.lora_group import Dtypes, Group, Projection, dense_blocks, dropout_masks, joined_factors
from slothcore.autograd.lora_projection import input_grad, project
from slothcore.kernels import dora_norms, dora_norms_eager, dora_scale, dora_scale_eager, lora_gemm, lora_gemm_eager
from slothcore.kernels.lora_factors_eager import Factors
from slothcore.kernels.nf4_tensor import Nf4Tensor


class Scales(NamedTuple):
    """What the outputs of a group are divided by, and multiplied with.

    Attributes:
        norms: n [sum N] float32, or float64; 1 for a projection without a magnitude.
        scales: c = m / n, likewise.
    """

    norms: Tensor
    scales: Tensor

    @staticmethod
    def of(
        group: Group, A: Tensor | None, B: Tensor | None, magnitudes: Factors, known: Factors, like: Tensor
    ) -> "Scales":
        """The scales of a group whose factors are as they are now.

        Args:
            A, B: as `joined_factors` makes them; None without LoRA.
            magnitudes: m_i [N_i] of each projection, or None.
            known: n_i [N_i] of each projection, or None where it is to be computed.
            like: the input, whose dtype tells whether the scales are float64.
        """
        layout, wide = group.layout, torch.promote_types(like.dtype, torch.float32)
        norms, scales = like.new_empty(2, layout.outputs.stop, dtype=wide)
        ops = dora_norms if like.is_cuda else dora_norms_eager
        for i, (rows, columns) in enumerate(zip(layout.rows, layout.columns, strict=True)):
            magnitude, norm = magnitudes[i], known[i]
            if magnitude is None:
                norms[rows].fill_(1.0)
                scales[rows].fill_(1.0)
            elif norm is not None:
                norms[rows].copy_(norm)
                torch.div(magnitude.to(wide), norms[rows], out=scales[rows])
            else:
                assert A is not None
                assert B is not None
                ops.row_norms(
                    group.weights[i],
                    A[columns],
                    B[rows, columns],
                    factor=1.0 - group.dropouts[i],  # which the scaling that is in B has been divided by
                    magnitude=magnitude,
                    out=(norms[rows], scales[rows]),
                )
        return Scales(norms, scales)


@torch.no_grad()
def row_norms(
    weight: Tensor | Nf4Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float, dtype: torch.dtype | None = None
) -> Tensor:
    """n [N] of one weight with its factors, to the last bit what a pass without dropout divides by.

    Args:
        dtype: the compute dtype of that pass, to which factors are rounded; None: they are not.
    """
    group = Group.of((Projection(weight, lora_A, lora_B, scaling),))
    like = lora_A.new_empty(0, dtype=dtype or torch.promote_types(lora_A.dtype, torch.float32))
    A, B = joined_factors(group, (lora_A,), (lora_B,), like)
    assert A is not None
    assert B is not None
    columns = group.layout.columns[0]
    ops = dora_norms if like.is_cuda else dora_norms_eager
    norms, _ = ops.row_norms(weight, A[columns], B[:, columns])
    return norms


def scaled_project(
    x: Tensor, u: Tensor | None, group: Group, B: Tensor | None, bias: Tensor | None, scales: Tensor
) -> tuple[Tensor, Tensor | None]:
    """All projections of x with their scales, side by side.

    Args:
        x, u, B, bias: as `project` takes them.
        scales: c [sum N].
    Returns: y [T, sum N]; and z [T, sum N], or None with dropout, where `dropped_project` makes its like again.
    """
    if group.seed is None:
        z = project(x, u, group, B, None)
        ops = dora_scale if x.is_cuda else dora_scale_eager
        return ops.scale_columns(z, scales, bias), z
    y = project(x, u, group, B, bias)
    return y.addcmul_(dropped_project(x, u, group, B), (scales - 1.0).to(y.dtype)), None


def dropped_project(x: Tensor, u: Tensor | None, group: Group, B: Tensor | None) -> Tensor:
    """z_i = x_i W_i^T + u_i B_i^T [T, sum N], where x_i is x under the mask of projection i."""
    gemm = lora_gemm if x.is_cuda else lora_gemm_eager
    z = x.new_empty(x.shape[0], group.layout.outputs.stop)
    for weight, rows, columns, kept, mask in _dropped_maps(group, x):
        has_lora = u is not None and B is not None and columns.start < columns.stop
        gemm.linear_add(
            x if mask is None else (x * mask).div_(kept),
            weight,
            lora_x=u[:, columns] if u is not None and has_lora else None,
            lora_B=B[rows, columns] if B is not None and has_lora else None,
            out=z[:, rows],
        )
    return z


def scaled_input_grad(
    dy: Tensor, dz: Tensor, v: Tensor | None, group: Group, A: Tensor | None, scales: Tensor, in_features: int
) -> Tensor:
    """dx [T, K] from dy [T, sum N], dz = c * dy and v = dz B [T, sum r]."""
    if group.seed is None:
        return input_grad(dz, v, group, A)
    assert v is not None
    assert A is not None
    gemm = lora_gemm if dy.is_cuda else lora_gemm_eager
    dx = dy.new_zeros(dy.shape[0], in_features)
    for weight, rows, columns, kept, mask in _dropped_maps(group, dx):
        has_lora = columns.start < columns.stop
        lora = (v[:, columns], A[columns]) if has_lora else (None, None)
        if mask is None:
            dx += gemm.linear_input_grad(dz[:, rows], weight, lora_dy=lora[0], lora_A=lora[1])
            continue
        dx.addmm_(dy[:, rows], weight)
        dropped = dy[:, rows] * ((scales[rows] - 1.0) / kept).to(dy.dtype)
        dx.addcmul_(gemm.linear_input_grad(dropped, weight, lora_dy=lora[0], lora_A=lora[1]), mask)
    return dx


def scale_and_sum(
    dy: Tensor, scales: Tensor, z: Tensor | None, *, grad: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dz = c * dy, or None unless `grad`; and the sums of dy * z over tokens [sum N], or None without z."""
    ops = dora_scale if dy.is_cuda else dora_scale_eager
    return ops.scale_columns_backward(dy, scales, z, grad=grad)


def magnitude_grads(
    sums: Tensor | None, norms: Tensor | None, group: Group, dtypes: Dtypes, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """dm_i = sum_T(dy_i * z_i) / n_i, each in its magnitude's dtype; None where it is not `wanted`."""
    return apart(None if sums is None or norms is None else sums / norms, group, dtypes, wanted)


def apart(joined: Tensor | None, group: Group, dtypes: Dtypes, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The part of each projection of a vector [sum N], in its own dtype; None where it is not `wanted`."""
    if joined is None:
        assert not any(wanted), "the sums of a gradient that is wanted are missing"
        return [None] * len(wanted)
    return [
        joined[rows].to(dtype) if need and dtype is not None else None
        for need, dtype, rows in zip(wanted, dtypes, group.layout.rows, strict=True)
    ]


def _dropped_maps(group: Group, like: Tensor) -> Iterator[tuple[Tensor, slice, slice, float, Tensor | None]]:
    """Each projection: its weight as a dense matrix, outputs, ranks, share of x that it sees, and mask."""
    layout, blocks = group.layout, dense_blocks(group, like)
    weights = [weight for weight, _ in blocks]
    if len(weights) < len(layout.rows):
        weights = [weights[0][rows] for rows in layout.rows]
    kept = (1.0 - p for p in group.dropouts)
    yield from zip(weights, layout.rows, layout.columns, kept, dropout_masks(group, like), strict=True)
