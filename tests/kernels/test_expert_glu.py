"""The gated unit scaled by router weights, against plain torch and its autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from slothcore.kernels import expert_glu, expert_glu_eager
from tests.numerics import assert_as_accurate_as_eager, gradients, widened

ACTIVATIONS = ["silu", "gelu_pytorch_tanh"]
SHAPES = [(1, 40), (7, 33), (3, 2100)]


def plain(gate_up: Tensor, weights: Tensor, order: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return weights[order, None] * activated * up


def operands(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ds, gate_up, weights and order."""
    ds, gate_up = torch.randn(rows, width), torch.randn(rows, 2 * width) * 3
    weights, order = torch.rand(rows), torch.randperm(rows)
    return ds.to(device, dtype), gate_up.to(device, dtype), weights.to(device, dtype), order.to(device)


def check(ops, ds: Tensor, gate_up: Tensor, weights: Tensor, order: Tensor, activation: str) -> None:
    """Forward and backward within twice the error of the eager twin."""

    def results(ops, ds, gate_up, weights) -> dict[str, Tensor]:
        d_gate_up, d_weights, s = ops.expert_glu_backward(ds, gate_up, weights, order, activation=activation)
        forward = ops.expert_glu_forward(gate_up, weights, order, activation=activation)
        return {"forward": forward, "d_gate_up": d_gate_up, "d_weights": d_weights, "s": s}

    ours, eager = results(ops, ds, gate_up, weights), results(expert_glu_eager, ds, gate_up, weights)
    exact = results(expert_glu_eager, *widened(ds, gate_up, weights))
    for name, value in ours.items():
        assert value.dtype == ds.dtype
        assert_as_accurate_as_eager(value, eager[name], exact[name], what=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_as_accurate_as_eager(kernel_device, nan_filled_empty, shape, dtype, activation) -> None:
    check(expert_glu, *operands(*shape, dtype, kernel_device), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eager_is_the_gradient_of_plain_torch(activation) -> None:
    ds, gate_up, weights, order = operands(7, 33, torch.float64, "cpu")
    expected = gradients(lambda g, w: plain(g, w, order, activation), gate_up, weights, grad_output=ds)
    d_gate_up, d_weights, s = expert_glu_eager.expert_glu_backward(ds, gate_up, weights, order, activation=activation)
    assert (d_gate_up - expected[0]).abs().max() < 1e-13
    assert (d_weights - expected[1]).abs().max() < 1e-13
    assert (s - plain(gate_up, weights, order, activation)).abs().max() < 1e-13
    assert torch.equal(s, expert_glu_eager.expert_glu_forward(gate_up, weights, order, activation=activation))


@pytest.mark.parametrize("ops", [expert_glu, expert_glu_eager], ids=["kernel", "eager"])
def test_overwriting_and_strides_change_nothing(kernel_device, nan_filled_empty, ops) -> None:
    ds, gate_up, weights, order = operands(7, 33, torch.float32, kernel_device)
    expected = ops.expert_glu_backward(ds, gate_up, weights, order, activation="silu")
    wide = torch.zeros(7, 100, device=kernel_device)
    wide[:, 5:71] = gate_up
    strided = wide[:, 5:71]
    forward = ops.expert_glu_forward(strided, weights, order, activation="silu")
    assert torch.equal(forward, ops.expert_glu_forward(gate_up, weights, order, activation="silu"))
    spread_ds = torch.stack([ds, ds], dim=1)[:, 0]
    result = ops.expert_glu_backward(spread_ds, strided, weights, order, activation="silu", inplace=True)
    assert result[0].data_ptr() == strided.data_ptr()
    for ours, plain_result in zip(result, expected, strict=True):
        assert torch.equal(ours, plain_result)
    assert (wide[:, :5] == 0).all()
    assert (wide[:, 71:] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(130, 14336), (512, 768)])
def test_gpu_kernel_as_accurate_as_eager(nan_filled_empty, rows, width, dtype) -> None:
    check(expert_glu, *operands(rows, width, dtype, "cuda"), "silu")
