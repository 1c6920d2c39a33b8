"""The rotation's backward against numerical differentiation, and what in-place work may and may not touch."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd.rope import apply_rope
from tests.numerics import assert_as_accurate_as_eager, gradients

HEADS, NUM_HEADS, HEAD_DIM = 4, 3, 6
ROTARY_DIMS = pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 4], ids=["whole", "partial"])
INPLACE = pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])


def make_angles(num_tokens: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(num_tokens, rotary_dim // 2, dtype=dtype) * 6
    return angles.cos(), angles.sin()


@INPLACE
@ROTARY_DIMS
@pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
def test_gradcheck(inplace: bool, rotary_dim: int, flat: bool) -> None:
    qkv = torch.randn(5, HEADS, HEAD_DIM, dtype=torch.float64)
    qkv = (qkv.flatten(1) if flat else qkv).requires_grad_()
    cos, sin = make_angles(5, rotary_dim, torch.float64)

    def function(qkv: Tensor) -> Tensor:
        # The clone is the tensor to overwrite; the product keeps gradcheck's own gradient out of reach.
        return apply_rope(qkv.clone(), cos, sin, num_heads=NUM_HEADS, head_dim=HEAD_DIM, inplace=inplace) * 1.5

    assert torch.autograd.gradcheck(function, (qkv,))


def test_gradcheck_of_views() -> None:
    """A view is overwritten within its base, and a transposed input is copied."""
    cos, sin = make_angles(5, HEAD_DIM, torch.float64)
    qkv = torch.randn(5, HEADS * HEAD_DIM, dtype=torch.float64, requires_grad=True)

    def through_a_view(qkv: Tensor) -> Tensor:
        base = qkv.clone()
        apply_rope(base.view(5, HEADS, HEAD_DIM), cos, sin, num_heads=NUM_HEADS, inplace=True)
        return base * 1.5

    assert torch.autograd.gradcheck(through_a_view, (qkv,))
    transposed = torch.randn(HEAD_DIM, HEADS, 5, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin, num_heads=NUM_HEADS), (transposed,))


@ROTARY_DIMS
def test_flat_and_inplace_give_the_same_values(rotary_dim: int) -> None:
    qkv = torch.randn(5, HEADS, HEAD_DIM)
    cos, sin = make_angles(5, rotary_dim)
    before = qkv.clone()
    expected = apply_rope(qkv, cos, sin, num_heads=NUM_HEADS)
    assert torch.equal(qkv, before)
    flat = apply_rope(qkv.flatten(1), cos, sin, num_heads=NUM_HEADS, head_dim=HEAD_DIM)
    assert torch.equal(flat, expected.flatten(1))
    result = apply_rope(qkv, cos, sin, num_heads=NUM_HEADS, inplace=True)
    assert result is qkv
    assert torch.equal(result, expected)


def test_a_flat_projection_needs_its_head_dim() -> None:
    with pytest.raises(AssertionError, match="does not tell head_dim"):
        apply_rope(torch.zeros(5, 24), *make_angles(5, HEAD_DIM), num_heads=NUM_HEADS)


@INPLACE
def test_incoming_gradient_is_overwritten_only_if_allowed(inplace: bool) -> None:
    cos, sin = make_angles(5, HEAD_DIM)
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    grad = torch.randn_like(qkv)
    before = grad.clone()
    out = apply_rope(qkv.clone(), cos, sin, num_heads=NUM_HEADS, inplace=inplace)
    out.backward(grad)
    assert torch.equal(grad, before) != inplace


def test_an_expanded_gradient_is_never_overwritten() -> None:
    cos, sin = make_angles(5, HEAD_DIM)
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    apply_rope(qkv.clone(), cos, sin, num_heads=NUM_HEADS, inplace=True).sum().backward()
    apart = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    apply_rope(apart, cos, sin, num_heads=NUM_HEADS).backward(torch.ones_like(apart))
    assert torch.equal(qkv.grad, apart.grad)


def test_overwriting_what_another_operation_saved_raises() -> None:
    cos, sin = make_angles(5, HEAD_DIM)
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True) * 1.0
    square = qkv.square()
    apply_rope(qkv, cos, sin, num_heads=NUM_HEADS, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@INPLACE
@pytest.mark.parametrize("shape", [(0, HEADS, HEAD_DIM), (0, HEADS * HEAD_DIM)], ids=["heads", "flat"])
def test_no_tokens(shape: tuple[int, ...], inplace: bool) -> None:
    cos, sin = make_angles(0, HEAD_DIM)
    qkv = torch.zeros(shape, requires_grad=True)
    rotated = apply_rope(qkv.clone(), cos, sin, num_heads=NUM_HEADS, head_dim=HEAD_DIM, inplace=inplace)
    assert rotated.shape == shape
    rotated.sum().backward()
    assert qkv.grad.shape == shape


def test_only_the_angles_are_saved() -> None:
    saved: list[Tensor] = []
    cos, sin = make_angles(5, HEAD_DIM)
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply_rope(qkv, cos, sin, num_heads=NUM_HEADS)
    assert [t.shape for t in saved] == [cos.shape, sin.shape]


@pytest.mark.gpu
@INPLACE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_gpu(inplace: bool, dtype: torch.dtype) -> None:
    cos, sin = make_angles(257, 128)
    qkv, grad = torch.randn(257, 48 * 128).to(dtype), torch.randn(257, 48 * 128).to(dtype)

    def function(qkv: Tensor) -> Tensor:
        angles = (cos.to(qkv.device), sin.to(qkv.device))
        return apply_rope(qkv.clone(), *angles, num_heads=40, head_dim=128, inplace=inplace)

    (fused,) = gradients(function, qkv.cuda(), grad_output=grad.cuda())
    (eager,) = gradients(function, qkv, grad_output=grad.clone())
    (exact,) = gradients(function, qkv.double(), grad_output=grad.double())
    assert_as_accurate_as_eager(fused, eager.to(fused.device), exact)


@pytest.mark.gpu
def test_overwriting_what_another_operation_saved_raises_on_the_gpu() -> None:
    """torch cannot see a Triton kernel write; the version counter must move all the same."""
    cos, sin = (t.cuda() for t in make_angles(5, 64))
    qkv = torch.randn(5, 4, 64, device="cuda", requires_grad=True) * 1.0
    square = qkv.square()
    apply_rope(qkv, cos, sin, num_heads=3, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
