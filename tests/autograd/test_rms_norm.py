"""The hand-derived backward against numerical differentiation, and what must not be computed or kept."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd.rms_norm import add_rms_norm, rms_norm
from slothcore.kernels import rms_norm_eager
from tests.numerics import assert_as_accurate_as_eager, gradients, relative_error

RULES = pytest.mark.parametrize(
    "rule",
    [
        {"eps": 1e-5},
        {"eps": 1e-6, "weight_offset": 1.0, "cast_before_weight": False},
        {"eps": 0.1, "weight_offset": -0.5},
    ],
    ids=["llama", "gemma", "offset"],
)
TRAINABLE = pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])


def float64(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@RULES
@TRAINABLE
def test_gradcheck(rule: dict, trainable: bool) -> None:
    x, weight = float64(3, 7), float64(7, requires_grad=trainable)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, **rule).y, (x, weight))


@RULES
@TRAINABLE
def test_gradcheck_with_residual(rule: dict, trainable: bool) -> None:
    x, residual, weight = float64(3, 7), float64(3, 7), float64(7, requires_grad=trainable)
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, **rule)[:2], (x, residual, weight))


def test_gradcheck_of_non_contiguous_inputs() -> None:
    x, residual = float64(7, 3).T, float64(3, 9)[:, 1:8]
    assert torch.autograd.gradcheck(lambda x, r, w: add_rms_norm(x, r, w, eps=1e-5)[:2], (x, residual, float64(7)))


@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_an_unused_output_adds_nothing(used: str) -> None:
    x, residual, weight = float64(3, 7), float64(3, 7), float64(7)
    y, h, *_ = add_rms_norm(x, residual, weight, eps=1e-5)
    plain_h = x + residual
    plain_y = plain_h * (plain_h.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    pick = {"y": lambda y, h: y.sin(), "h": lambda y, h: h.sin(), "both": lambda y, h: y.sin() + h.cos()}[used]
    inputs = (x, residual, weight)
    actual = torch.autograd.grad(pick(y, h).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(pick(plain_y, plain_h).sum(), inputs, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or relative_error(a, e) < 1e-12


@TRAINABLE
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_weight_gradient_is_formed_only_when_wanted(
    with_residual: bool, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = rms_norm_eager.rms_norm_backward

    def spy(*args, **kwargs):
        asked.append(kwargs["weight_grad"])
        return original(*args, **kwargs)

    monkeypatch.setattr(rms_norm_eager, "rms_norm_backward", spy)
    x, residual = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7, requires_grad=True)
    weight = torch.randn(7, dtype=torch.bfloat16, requires_grad=trainable)
    if with_residual:
        sum(add_rms_norm(x, residual, weight, eps=1e-5)[:2]).sum().backward()
    else:
        rms_norm(x, weight, eps=1e-5).y.sum().backward()
    assert asked == [trainable]
    assert (weight.grad is not None) == trainable
    assert weight.grad is None or weight.grad.dtype == torch.bfloat16
    assert x.grad is not None


def test_fused_addition_keeps_its_output_and_not_its_inputs() -> None:
    saved: list[Tensor] = []
    x, residual = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = add_rms_norm(x, residual, torch.ones(8), eps=1e-5).h
    assert sorted(t.numel() for t in saved) == [5, 8, 40]
    assert any(t.data_ptr() == h.data_ptr() for t in saved)


def test_overwriting_what_backward_needs_raises() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    y, h, *_ = add_rms_norm(x, x.detach(), torch.ones(8), eps=1e-5)
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.gpu
@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_gpu(rule: dict, dtype: torch.dtype) -> None:
    def stream(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, h, *_ = add_rms_norm(x, residual, weight, **rule)
        return rms_norm(y, weight, **rule).y + h

    inputs = [torch.randn(257, 3072).to(dtype), torch.randn(257, 3072).to(dtype), torch.randn(3072).to(dtype)]
    grad = torch.randn(257, 3072).to(dtype)
    fused = gradients(stream, *(t.cuda() for t in inputs), grad_output=grad.cuda())
    eager = gradients(stream, *inputs, grad_output=grad)
    exact = gradients(stream, *(t.double() for t in inputs), grad_output=grad.double())
    for name, f, e, x in zip(("x", "residual", "weight"), fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(f, e.to(f.device), x, what=name)
