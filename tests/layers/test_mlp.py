"""The gated feed-forward block as a module."""

import pytest
import torch
import torch.nn.functional as F

from slothcore.layers.mlp import GatedMlp
from tests.numerics import relative_error

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_formula_and_gradients(activation: str, bias: bool, frozen: bool) -> None:
    mlp = GatedMlp(8, 20, activation=activation, bias=bias, dtype=torch.float64)
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
        weight.requires_grad_(not frozen)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 8, dtype=torch.float64)

    gate, up = (F.linear(x, m.weight, m.bias) for m in (mlp.gate_proj, mlp.up_proj))
    expected = F.linear(ACTIVATIONS[activation](gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    actual = mlp(x)
    torch.testing.assert_close(actual, expected)

    wanted = [x, *(weight for weight in mlp.parameters() if weight.requires_grad)]
    assert len(wanted) == (1 if frozen else 7 if bias else 4)
    gradients = torch.autograd.grad(actual, wanted, direction)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, wanted, direction), strict=True):
        assert relative_error(gradient, reference) < 1e-10
