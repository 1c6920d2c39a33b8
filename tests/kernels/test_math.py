"""Elementary functions of `kernels/math.py` against float64, launched through a small kernel."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from slothcore.kernels.math import exponential, tanh


@triton.jit
def apply_kernel(x_ptr, y_ptr, elements, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < elements, other=0.0)
    if FUNCTION == "tanh":
        y = tanh(x)
    elif FUNCTION == "exp":
        y = exponential(x, True)
    else:
        y = exponential(x, False)
    tl.store(y_ptr + place, y, mask=place < elements)


def apply(function: str, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    apply_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), FUNCTION=function, BLOCK=1024)
    return y


def worst_relative_error(function: str, x: Tensor, exact: Callable[[Tensor], Tensor]) -> float:
    """In units of float32's rounding."""
    wide = exact(x.double())
    return float(((apply(function, x).double() - wide) / wide).abs().max()) / torch.finfo(torch.float32).eps


def test_tanh_keeps_its_digits_everywhere(kernel_device: str) -> None:
    """From where tanh(x) = x, over the end of the series at 0.6, to where it is one: relative, so near zero too."""
    small = torch.logspace(-30, -2, 2000)
    x = torch.cat([small, torch.linspace(0.01, 12, 20_000)]).to(kernel_device)
    assert worst_relative_error("tanh", torch.cat([x, -x]), torch.tanh) < 6


@pytest.mark.parametrize(("x", "expected"), [(0.0, 0.0), (100.0, 1.0), (-1e30, -1.0), (float("inf"), 1.0)])
def test_tanh_at_the_ends(x: float, expected: float, kernel_device: str) -> None:
    assert apply("tanh", torch.tensor([x], device=kernel_device)).item() == expected


@pytest.mark.parametrize("function", ["tanh", "exp", "exp2"])
def test_nan_stays_nan(function: str, kernel_device: str) -> None:
    assert apply(function, torch.tensor([float("nan")], device=kernel_device)).isnan().all()


@pytest.mark.gpu
def test_exponential_of_large_negative_scores() -> None:
    """Rounding x log2(e) alone would be off by 40 roundings at -80. The interpreter's fma rounds between."""
    x = torch.linspace(-80, 0, 20_000, device="cuda")
    assert worst_relative_error("exp", x, torch.exp) < 6
    assert worst_relative_error("exp2", x, torch.exp2) < 6
