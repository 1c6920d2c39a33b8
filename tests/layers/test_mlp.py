"""The gated feed-forward block as a module."""

import pytest
import torch
import torch.nn.functional as F

from slothcore.layers.mlp import GatedMlp
from tests.numerics import relative_error

ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("fused", [False, True], ids=["two", "one"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_formula_and_gradients(activation: str, bias: bool, frozen: bool, fused: bool) -> None:
    mlp = GatedMlp(8, 20, activation=activation, bias=bias, fused=fused, dtype=torch.float64)
    assert [name for name, _ in mlp.named_children()] == [
        *(["gate_up_proj"] if fused else ["gate_proj", "up_proj"]),
        "down_proj",
    ]
    for weight in mlp.parameters():
        torch.nn.init.normal_(weight)
        weight.requires_grad_(not frozen)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(5, 8, dtype=torch.float64)

    *gate_up, _ = mlp.children()
    gate, up = torch.cat([F.linear(x, m.weight, m.bias) for m in gate_up], dim=-1).chunk(2, dim=-1)
    expected = F.linear(ACTIVATIONS[activation](gate) * up, mlp.down_proj.weight, mlp.down_proj.bias)
    actual = mlp(x)
    torch.testing.assert_close(actual, expected)

    wanted = [x, *(weight for weight in mlp.parameters() if weight.requires_grad)]
    assert len(wanted) == 1 + (0 if frozen else (2 if fused else 3) * (2 if bias else 1))
    gradients = torch.autograd.grad(actual, wanted, direction)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, wanted, direction), strict=True):
        assert relative_error(gradient, reference) < 1e-10
