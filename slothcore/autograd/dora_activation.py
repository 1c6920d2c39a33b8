"""DoRA's gated MLP between its projections, there and back, as plain functions; the equations stand in `dora.py`.

Without dropout the scales of gate and up lie inside the activation's kernels, with it beside them: what the scales
multiply there is not what gate and up give.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from slothcore.autograd.dora_projection import apart, scale_and_sum, scaled_project
from slothcore.autograd.lora_group import Group
from slothcore.autograd.lora_projection import bias_grads, project
from slothcore.kernels import dora_glu, dora_glu_eager, glu, glu_eager
from slothcore.kernels.glu_eager import Activation


def gate_and_up(
    x: Tensor, u: Tensor | None, first: Group, B: Tensor | None, b: Tensor | None, scales: Tensor
) -> Tensor:
    """z [T, 2 I] of gate and up; with dropout their outputs [g | u]."""
    return project(x, u, first, B, None) if first.seed is None else scaled_project(x, u, first, B, b, scales)[0]


def activated(inner: Tensor, scales: Tensor, b: Tensor | None, first: Group, activation: Activation) -> Tensor:
    """h [T, I] of what `gate_and_up` gives."""
    if first.seed is None:
        ops = dora_glu if inner.is_cuda else dora_glu_eager
        return ops.dora_glu_forward(inner, scales, b, activation=activation)
    plain = glu if inner.is_cuda else glu_eager
    return plain.glu_forward(inner, activation=activation)


class InnerGrads(NamedTuple):
    """What comes back through the activation.

    Attributes:
        dy: the gradient of [g | u]; without dropout, where nothing is made of it, dz in its place.
        dz: c * dy.
        h: the activation's output again, if it was wanted.
        sums: those of dy * z over tokens, if the magnitudes' gradients were wanted.
        every_db: the gradient of each bias, if it was wanted.
    """

    dy: Tensor
    dz: Tensor
    h: Tensor | None
    sums: Tensor | None
    every_db: list[Tensor | None]


def inner_grads(
    dh: Tensor,
    inner: Tensor,
    scales: Tensor,
    b: Tensor | None,
    first: Group,
    activation: Activation,
    *,
    z_again: Callable[[], Tensor],
    inplace: bool,
    output: bool,
    of_magnitudes: bool,
    of_biases: Sequence[bool],
) -> InnerGrads:
    """From the gradient of h to those of gate and up.

    Args:
        inner: what `gate_and_up` gave; overwritten if `inplace`.
        z_again: multiplies z' again, which with dropout is not kept.
        output, of_magnitudes, of_biases: what is wanted beside dy and dz.
    """
    if first.seed is None:
        ops = dora_glu if dh.is_cuda else dora_glu_eager
        choices = {"inplace": inplace, "output": output, "scale_grad": of_magnitudes, "bias_grad": any(of_biases)}
        dz, h, sums, sums_b = ops.dora_glu_backward(dh, inner, scales, b, activation=activation, **choices)
        return InnerGrads(dz, dz, h, sums, apart(sums_b, first, first.bias_dtypes, of_biases))
    plain = glu if dh.is_cuda else glu_eager
    dy, h = plain.glu_backward(dh, inner, activation=activation, inplace=inplace, output=output)
    dz, _ = scale_and_sum(dy, scales, None)
    assert dz is not None
    sums = scale_and_sum(dy, scales, z_again(), grad=False)[1] if of_magnitudes else None
    return InnerGrads(dy, dz, h, sums, bias_grads(dy, first, of_biases))
