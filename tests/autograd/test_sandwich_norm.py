"""The hand-derived backward against numerical differentiation, and what must not be computed or kept."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd.rms_norm import add_rms_norm, rms_norm
from slothcore.autograd.sandwich_norm import post_norm_add_norm
from slothcore.kernels import sandwich_norm_eager
from tests.numerics import assert_as_accurate_as_eager, gradients, relative_error

GEMMA = {"eps": 1e-6, "weight_offset": 1.0, "cast_before_weight": False}
LLAMA = {"eps": 1e-5}
RULES = pytest.mark.parametrize("rule", [GEMMA, LLAMA], ids=["gemma", "llama"])
TRAINABLE = pytest.mark.parametrize(
    "trainable", [(True, True), (True, False), (False, True), (False, False)], ids=["both", "post", "pre", "frozen"]
)


def float64(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@RULES
@TRAINABLE
def test_gradcheck(rule: dict, trainable: tuple[bool, bool]) -> None:
    weights = [float64(7, requires_grad=wanted) for wanted in trainable]
    inputs = (float64(3, 7), float64(3, 7), *weights)
    assert torch.autograd.gradcheck(lambda *inputs: post_norm_add_norm(*inputs, **rule)[:2], inputs)


def test_gradcheck_of_non_contiguous_inputs() -> None:
    inputs = (float64(7, 3).T, float64(3, 9)[:, 1:8], float64(7, 2)[:, 0], float64(7))
    assert torch.autograd.gradcheck(lambda *inputs: post_norm_add_norm(*inputs, **GEMMA)[:2], inputs)


@pytest.mark.parametrize("used", ["y", "h", "both"])
def test_an_unused_output_adds_nothing(used: str) -> None:
    """Against the two functions that it stands for."""
    inputs = (float64(3, 7), float64(3, 7), float64(7), float64(7))
    branch, residual, post_weight, pre_weight = inputs
    plain = add_rms_norm(rms_norm(branch, post_weight, **GEMMA).y, residual, pre_weight, **GEMMA)[:2]
    pick = {"y": lambda y, h: y.sin(), "h": lambda y, h: h.sin(), "both": lambda y, h: y.sin() + h.cos()}[used]
    actual = torch.autograd.grad(pick(*post_norm_add_norm(*inputs, **GEMMA)[:2]).sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(pick(*plain).sum(), inputs, allow_unused=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or relative_error(a, e) < 1e-12


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_those_of_the_separate_functions(rule: dict, dtype: torch.dtype) -> None:
    branch, residual, post_weight, pre_weight = (torch.randn(shape).to(dtype) for shape in ((5, 40), (5, 40), 40, 40))
    y, h, *_ = post_norm_add_norm(branch, residual, post_weight, pre_weight, **rule)
    expected_y, expected_h, *_ = add_rms_norm(rms_norm(branch, post_weight, **rule).y, residual, pre_weight, **rule)
    assert torch.equal(h, expected_h)
    assert torch.equal(y, expected_y)


@TRAINABLE
def test_weight_gradients_are_formed_only_when_wanted(
    trainable: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = sandwich_norm_eager.sandwich_norm_backward

    def spy(*args, **kwargs):
        asked.append(kwargs["weight_grad"])
        return original(*args, **kwargs)

    monkeypatch.setattr(sandwich_norm_eager, "sandwich_norm_backward", spy)
    branch, residual = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    weights = [torch.randn(7, dtype=torch.bfloat16, requires_grad=wanted) for wanted in trainable]
    sum(post_norm_add_norm(branch, residual, *weights, **GEMMA)[:2]).sum().backward()
    assert asked == [any(trainable)]
    for weight, wanted in zip(weights, trainable, strict=True):
        assert (weight.grad is not None) == wanted
        assert weight.grad is None or weight.grad.dtype == torch.bfloat16
    assert branch.grad is not None


def test_keeps_the_branch_and_its_output_and_nothing_between() -> None:
    saved: list[Tensor] = []
    branch, residual = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        h = post_norm_add_norm(branch, residual, torch.ones(8), torch.ones(8), **GEMMA).h
    assert sorted(t.numel() for t in saved) == [5, 5, 8, 8, 40, 40]
    assert {h.data_ptr(), branch.data_ptr()} < {t.data_ptr() for t in saved}


def test_overwriting_what_backward_needs_raises() -> None:
    branch = torch.randn(5, 8, requires_grad=True)
    y, h, *_ = post_norm_add_norm(branch, torch.randn(5, 8), torch.ones(8), torch.ones(8), **GEMMA)
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_tokens() -> None:
    branch, weight = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    sum(post_norm_add_norm(branch, torch.zeros(0, 8), weight, weight, **GEMMA)[:2]).sum().backward()
    assert branch.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.gpu
@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_gpu(rule: dict, dtype: torch.dtype) -> None:
    def stream(*inputs: Tensor) -> Tensor:
        return sum(post_norm_add_norm(*inputs, **rule)[:2])

    shapes = {"branch": (257, 2304), "residual": (257, 2304), "post_weight": (2304,), "pre_weight": (2304,)}
    inputs = [torch.randn(shape).to(dtype) for shape in shapes.values()]
    grad = torch.randn(257, 2304).to(dtype)
    fused = gradients(stream, *(t.cuda() for t in inputs), grad_output=grad.cuda())
    eager = gradients(stream, *inputs, grad_output=grad)
    exact = gradients(stream, *(t.double() for t in inputs), grad_output=grad.double())
    for name, f, e, x in zip(shapes, fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(f, e.to(f.device), x, what=name)
