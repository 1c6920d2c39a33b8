"""RMSNorm as a module: the formula, the fused residual add, and who gets a gradient."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd import lora_few
from slothcore.kernels import nf4_eager
from slothcore.layers import norm as norm_module
from slothcore.layers.linear import Linear, project_together
from slothcore.layers.norm import RMSNorm, norm_add_norm
from tests.numerics import relative_error

T, H = 5, 12


def formula(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


@pytest.fixture(params=[(0.0, True), (1.0, False)], ids=["llama", "gemma"])
def norm(request: pytest.FixtureRequest) -> RMSNorm:
    offset, cast = request.param
    module = RMSNorm(H, eps=1e-3, weight_offset=offset, cast_before_weight=cast, dtype=torch.float64)
    torch.nn.init.normal_(module.weight)
    return module


def test_formula(norm: RMSNorm) -> None:
    x = torch.randn(T, H, dtype=torch.float64)
    torch.testing.assert_close(norm(x).y, formula(x, norm.weight, norm.eps, norm.weight_offset))


def test_residual_is_added_first_and_handed_on(norm: RMSNorm) -> None:
    branch = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    to_y, to_h = torch.randn(2, T, H, dtype=torch.float64)
    y, h, *_ = norm(branch, residual)
    assert torch.equal(h, branch + residual)
    torch.testing.assert_close(y, formula(h, norm.weight, norm.eps, norm.weight_offset))
    actual = torch.autograd.grad((y * to_y).sum() + (h * to_h).sum(), (branch, residual, norm.weight))

    h = branch + residual
    y = formula(h, norm.weight, norm.eps, norm.weight_offset)
    expected = torch.autograd.grad((y * to_y).sum() + (h * to_h).sum(), (branch, residual, norm.weight))
    for gradient, reference in zip(actual, expected, strict=True):
        # The weight gradient is summed in float32.
        assert relative_error(gradient, reference) < 1e-6


def test_the_norms_of_a_sandwich(norm: RMSNorm) -> None:
    """One operation for three: the branch's norm, the add, the next norm."""
    pre = RMSNorm(
        H,
        eps=norm.eps,
        weight_offset=norm.weight_offset,
        cast_before_weight=norm.cast_before_weight,
        dtype=torch.float64,
    )
    torch.nn.init.normal_(pre.weight)
    branch, residual = torch.randn(2, T, H, dtype=torch.float64, requires_grad=True)
    inputs = branch, residual, norm.weight, pre.weight
    to_y, to_h = torch.randn(2, T, H, dtype=torch.float64)
    y, h, *_ = norm_add_norm(branch, residual, post=norm, pre=pre)
    actual = torch.autograd.grad((y * to_y).sum() + (h * to_h).sum(), inputs)
    expected_y, expected_h, *_ = pre(norm(branch).y, residual)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(h, expected_h)
    expected = torch.autograd.grad((expected_y * to_y).sum() + (expected_h * to_h).sum(), inputs)
    for gradient, reference in zip(actual, expected, strict=True):
        assert relative_error(gradient, reference) < 1e-6


def test_a_frozen_weight_gets_no_gradient(norm: RMSNorm) -> None:
    norm.weight.requires_grad_(False)
    x = torch.randn(T, H, dtype=torch.float64, requires_grad=True)
    norm(x).y.sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None


def test_rounding_order_is_a_choice() -> None:
    """In bfloat16 the two orders differ, and each equals its own definition to the bit."""
    x = torch.randn(200, 64).bfloat16()
    early = RMSNorm(64, eps=1e-6, cast_before_weight=True, dtype=torch.bfloat16)
    late = RMSNorm(64, eps=1e-6, cast_before_weight=False, dtype=torch.bfloat16)
    weight = torch.randn(64).bfloat16()
    for module in (early, late):
        module.weight.data.copy_(weight)
    wide = x.float()
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(early(x).y, weight * unit.bfloat16())
    assert torch.equal(late(x).y, (weight.float() * unit).bfloat16())
    assert not torch.equal(early(x).y, late(x).y)


def test_with_few_rows_the_readers_get_the_input_of_their_lora_terms(monkeypatch) -> None:
    width = 1088  # neither too narrow for it nor a power of two
    readers = [Linear(width, 24, dtype=torch.float32) for _ in range(2)]
    for reader in readers:
        reader.set_nf4(nf4_eager.nf4_quantize(torch.randn(24, width)))
        reader.attach_lora(torch.randn(4, width), torch.randn(24, 4), scaling=0.5)
    norm = RMSNorm(width, eps=1e-3, dtype=torch.float32)
    torch.nn.init.normal_(norm.weight)
    x, residual = torch.randn(2, T, width)
    with torch.no_grad():
        assert norm(x, residual, read_by=readers).lora_input is None, "a CPU takes the launches apart"
        monkeypatch.setattr(norm_module, "is_decoding", lambda x: True)
        assert norm(x, residual, read_by=readers).lora_input is None
        expected = project_together(norm(x, residual).y, readers)
        monkeypatch.setattr(lora_few, "takes", lambda x, projections: True)
        normed = norm(x, residual, read_by=readers)
        assert normed.lora_input is not None
        assert normed.lora_input.u.shape == (T, 8)
        assert torch.equal(normed.h, x + residual)
        assert relative_error(project_together(normed, readers), expected) < 1e-6
