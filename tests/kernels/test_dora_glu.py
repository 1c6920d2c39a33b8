"""Widths that are no power of two, several shares of the rows, gates that saturate, and every output left out."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import dora_glu, dora_glu_eager, glu_eager
from slothcore.kernels.glu_eager import Activation
from tests.numerics import assert_as_accurate_as_eager, widened

# The interpreter cuts bfloat16 off instead of rounding it, which sums over tokens would show.
INTERPRETED = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
OPS = pytest.mark.parametrize("ops", [dora_glu, dora_glu_eager], ids=["fused", "eager"])
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> Inputs:
    """dh, z, the scales and biases."""
    dh, z = torch.randn(num_tokens, width), 2 * torch.randn(num_tokens, 2 * width)
    scale, bias = torch.rand(2 * width) + 0.5, torch.randn(2 * width)
    return dh.to(device, dtype), z.to(device, dtype), scale.to(device), bias.to(device, dtype)


def run(ops: ModuleType, dh: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None, activation: Activation) -> dict:
    dz, h, dc, db = ops.dora_glu_backward(dh, z, scale, bias, activation=activation, bias_grad=True)
    forward = ops.dora_glu_forward(z, scale, bias, activation=activation)
    return {"h": forward, "dz": dz, "h again": h, "dc": dc, "db": db}


def check(dh: Tensor, z: Tensor, scale: Tensor, bias: Tensor, activation: Activation) -> None:
    for b in (bias, None):
        inputs = dh, z, scale, b
        fused, eager = (run(ops, *inputs, activation) for ops in (dora_glu, dora_glu_eager))
        exact = run(dora_glu_eager, *widened(*inputs), activation)
        for name in fused:
            assert fused[name].dtype == (torch.float32 if name in ("dc", "db") else z.dtype)
            assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)
        assert torch.equal(fused["h"], fused["h again"])


@ACTIVATIONS
@INTERPRETED
@pytest.mark.parametrize("size", [(1, 64), (7, 37), (33, 300), (3, 2100)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(size: tuple[int, int], dtype: torch.dtype, activation: Activation, kernel_device: str) -> None:
    check(*make_inputs(*size, dtype, kernel_device), activation)


@ACTIVATIONS
def test_eager_is_the_activation_of_scaled_columns(activation: Activation) -> None:
    """And its gradients are autograd's."""
    dh, z, scale, bias = (t.double() for t in make_inputs(9, 12, torch.float32, "cpu"))
    leaves = [t.requires_grad_() for t in (z, scale, bias)]
    h = glu_eager.glu_forward(z * scale + bias, activation=activation)
    expected = torch.autograd.grad(h, leaves, dh)
    with torch.no_grad():
        actual = run(dora_glu_eager, dh, z, scale, bias, activation)
    assert torch.equal(actual["h"], h)
    for name, gradient in zip(("dz", "dc", "db"), expected, strict=True):
        assert torch.allclose(actual[name], gradient, rtol=1e-12)


@OPS
@DTYPES
@pytest.mark.usefixtures("nan_filled_empty")
def test_in_place_and_without_what_is_not_wanted(ops: ModuleType, dtype: torch.dtype, kernel_device: str) -> None:
    dh, z, scale, bias = make_inputs(21, 40, dtype, kernel_device)
    dz, _, _, _ = ops.dora_glu_backward(dh, z, scale, bias, activation="silu")
    wider = torch.cat([z, z], dim=1)
    window = wider[:, :80]
    choices = {"inplace": True, "output": False, "scale_grad": False}
    result, h, dc, db = ops.dora_glu_backward(dh, window, scale, bias, activation="silu", **choices)
    assert result is window
    assert torch.equal(window, dz)
    assert torch.equal(wider[:, 80:], z)
    assert (h, dc, db) == (None, None, None)


@pytest.mark.gpu
@ACTIVATIONS
@DTYPES
@pytest.mark.parametrize("size", [(1, 14336), (517, 8192), (2048, 14336)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_real_sizes_on_a_gpu(size: tuple[int, int], dtype: torch.dtype, activation: Activation) -> None:
    check(*make_inputs(*size, dtype, "cuda"), activation)
