"""A backward pass that cannot be differentiated gives its gradient, and refuses the second one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.autograd.first_order import once_differentiable


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        assert not torch.is_grad_enabled()
        return 3 * x**2 * dy


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_first_derivative_is_given(create_graph: bool) -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    (dx,) = torch.autograd.grad(Cube.apply(x).sum(), x, create_graph=create_graph)
    assert dx.tolist() == [12.0, 27.0]


def test_the_second_derivative_is_refused() -> None:
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    # Squared, so that the gradient which reaches the Function depends on x.
    (dx,) = torch.autograd.grad(Cube.apply(x).square().sum(), x, create_graph=True)
    assert dx.tolist() == [192.0, 1458.0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
