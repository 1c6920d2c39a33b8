"""The gated unit's backward against numerical differentiation, and the second backward that must not pass silently."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.autograd.glu import glu
from slothcore.kernels import glu_eager
from slothcore.kernels.glu_eager import Activation
from tests.numerics import assert_as_accurate_as_eager, gradients

ACTIVATIONS = pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])


@ACTIVATIONS
def test_gradcheck(activation: Activation) -> None:
    gate_up = (3 * torch.randn(4, 10, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: glu(x, activation=activation), (gate_up,))


@ACTIVATIONS
def test_gradcheck_of_non_contiguous_inputs(activation: Activation) -> None:
    for gate_up in (torch.randn(10, 4, dtype=torch.float64).T, torch.randn(4, 13, dtype=torch.float64)[:, 2:12]):
        assert torch.autograd.gradcheck(lambda x: glu(x, activation=activation), (gate_up.requires_grad_(),))


@ACTIVATIONS
def test_inplace_gives_the_same_gradient_in_the_saved_tensor(activation: Activation) -> None:
    leaf, dy = torch.randn(4, 10, requires_grad=True), torch.randn(4, 5)
    (expected,) = torch.autograd.grad(glu(leaf, activation=activation), leaf, dy)
    gate_up = leaf.clone()
    (actual,) = torch.autograd.grad(glu(gate_up, activation=activation, inplace=True), leaf, dy)
    assert torch.equal(actual, expected)
    assert torch.equal(gate_up, expected), "gate_up was not overwritten"


def test_without_inplace_nothing_is_overwritten_and_backward_repeats() -> None:
    gate_up, dy = torch.randn(4, 10, requires_grad=True), torch.randn(4, 5)
    before = gate_up.detach().clone()
    y = glu(gate_up, activation="silu")
    first, second = (torch.autograd.grad(y, gate_up, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gate_up, before)


def check_second_backward_raises(device: str) -> None:
    y = glu(torch.randn(4, 10, device=device, requires_grad=True).clone(), activation="silu", inplace=True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_backward_after_inplace_raises() -> None:
    check_second_backward_raises("cpu")


def test_second_backward_raises_even_if_torch_did_not_see_the_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton kernel writes behind torch's back; a write through `.data` does the same here."""
    original = glu_eager.glu_backward

    def unseen(dy: Tensor, gate_up: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        return original(dy, gate_up.data, **options)

    monkeypatch.setattr(glu_eager, "glu_backward", unseen)
    check_second_backward_raises("cpu")


def test_only_gate_up_is_saved() -> None:
    saved: list[Tensor] = []
    gate_up = torch.randn(4, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        glu(gate_up, activation="silu")
    assert [t.data_ptr() for t in saved] == [gate_up.data_ptr()]


@pytest.mark.gpu
@ACTIVATIONS
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_gpu(activation: Activation, inplace: bool, dtype: torch.dtype) -> None:
    def function(gate_up: Tensor) -> Tensor:
        return glu(gate_up.clone(), activation=activation, inplace=inplace)

    gate_up, dy = torch.randn(257, 2 * 4864).to(dtype), torch.randn(257, 4864).to(dtype)
    (fused,) = gradients(function, gate_up.cuda(), grad_output=dy.cuda())
    (eager,) = gradients(function, gate_up, grad_output=dy)
    (exact,) = gradients(function, gate_up.double(), grad_output=dy.double())
    assert_as_accurate_as_eager(fused, eager.to(fused.device), exact)


@pytest.mark.gpu
def test_second_backward_after_inplace_raises_on_the_gpu() -> None:
    check_second_backward_raises("cuda")
