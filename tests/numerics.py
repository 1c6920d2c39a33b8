"""Comparisons without a tolerance to loosen: the yardstick is always another computation's own error."""

from collections.abc import Callable

import torch
from torch import Tensor


def assert_as_accurate_as_eager(
    fused: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0, what: str = "result"
) -> None:
    """Fail if `fused` is further from the float64 answer than `factor` times eager's own error.

    One rounding of the largest value is allowed beside it, because eager's error may be zero by luck.
    NaN in `fused` fails too.

    Args:
        fused: what the kernel gave, in the working dtype.
        eager: what the eager twin gave in the same dtype from the same inputs.
        exact: what the eager twin gave in float64 from the same inputs, widened.
    """
    assert fused.shape == exact.shape, f"{what}: shape {tuple(fused.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact = exact.to(fused.device, torch.float64)
    rounding = torch.finfo(fused.dtype).eps * exact.abs().max()
    budget = factor * (eager.to(exact) - exact).abs().max() + rounding
    error = (fused.to(exact) - exact).abs().max()
    assert error <= budget, f"{what}: max error {error:.2e} exceeds {budget:.2e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; zero against zero is zero."""
    expected = expected.detach().to("cpu", torch.float64)
    difference = (actual.detach().to("cpu", torch.float64) - expected).norm()
    if difference == 0:
        return 0.0
    return float(difference / expected.norm())


def widened(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same values in float64, for the exact answer; integer tensors stay as they are."""
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def gradients(function: Callable[..., Tensor], *inputs: Tensor, grad_output: Tensor) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` against `grad_output`, for every input that requires one."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    function(*leaves).backward(grad_output)
    return [t.grad for t in leaves]
