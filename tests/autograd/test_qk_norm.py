"""The hand-derived backward against numerical differentiation, and what must not be computed, kept or overwritten."""

import pytest
import torch
from torch import Tensor

from slothcore.autograd.qk_norm import qk_norm_rope
from slothcore.autograd.rms_norm import rms_norm
from slothcore.autograd.rope import apply_rope
from slothcore.kernels import qk_norm_eager
from tests.numerics import assert_as_accurate_as_eager, gradients, relative_error

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 3, 1, 6
HEADS = NUM_HEADS + 2 * NUM_KV_HEADS
OPTIONS = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS}
QWEN = {"eps": 1e-6, "weight_offset": 0.0, "cast_before_weight": True}
GEMMA = {"eps": 1e-6, "weight_offset": 1.0, "cast_before_weight": False}
RULES = pytest.mark.parametrize("rule", [QWEN, GEMMA], ids=["qwen", "gemma"])


def make_angles(num_tokens: int, rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.rand(num_tokens, rotary_dim // 2, dtype=dtype) * 6
    return angles.cos(), angles.sin()


def float64(*shape: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad)


@RULES
@pytest.mark.parametrize("flat", [False, True], ids=["heads", "flat"])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 2], ids=["whole", "partial"])
@pytest.mark.parametrize("trainable", [(True, True), (False, True), (False, False)], ids=["both", "k", "frozen"])
def test_gradcheck(rule: dict, flat: bool, rotary_dim: int, trainable: tuple[bool, bool]) -> None:
    cos, sin = make_angles(3, rotary_dim, torch.float64)
    qkv = float64(3, HEADS * HEAD_DIM) if flat else float64(3, HEADS, HEAD_DIM)
    q_weight, k_weight = (float64(HEAD_DIM, requires_grad=wanted) for wanted in trainable)

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        # The product keeps gradcheck's own gradient from being overwritten.
        return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, **OPTIONS, **rule) * 1.5

    assert torch.autograd.gradcheck(function, (qkv, q_weight, k_weight))


def test_gradcheck_of_non_contiguous_inputs() -> None:
    cos, sin = make_angles(3, HEAD_DIM, torch.float64)
    qkv = float64(HEAD_DIM, HEADS, 3).permute(2, 1, 0)
    weights = float64(HEAD_DIM, 2)

    def function(qkv: Tensor, weights: Tensor) -> Tensor:
        return qk_norm_rope(qkv, weights[:, 0], weights[:, 1], cos, sin, **OPTIONS, **QWEN) * 1.5

    assert torch.autograd.gradcheck(function, (qkv, weights))


@RULES
def test_equals_the_separate_functions(rule: dict) -> None:
    """One rounding less in the gradients, hence float32 here; the values are equal in bfloat16 too."""
    cos, sin = make_angles(7, HEAD_DIM)

    def separate(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        queries, keys, values = qkv.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), dim=1)
        queries = rms_norm(queries.reshape(-1, HEAD_DIM), q_weight, **rule).y.view_as(queries)
        keys = rms_norm(keys.reshape(-1, HEAD_DIM), k_weight, **rule).y.view_as(keys)
        return apply_rope(torch.cat((queries, keys, values), dim=1), cos, sin, num_heads=NUM_HEADS + NUM_KV_HEADS)

    def together(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return qk_norm_rope(qkv, q_weight, k_weight, cos, sin, **OPTIONS, **rule)

    inputs = [torch.randn(7, HEADS, HEAD_DIM), torch.randn(HEAD_DIM), torch.randn(HEAD_DIM)]
    narrow = [t.bfloat16() for t in inputs]
    assert torch.equal(together(*narrow), separate(*narrow))
    grad = torch.randn(7, HEADS, HEAD_DIM)
    expected = gradients(separate, *inputs, grad_output=grad)
    for actual, e in zip(gradients(together, *inputs, grad_output=grad.clone()), expected, strict=True):
        assert relative_error(actual, e) < 1e-6


@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, False)], ids=["both", "q", "frozen"])
def test_weight_gradients_are_formed_only_when_wanted(
    trainable: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = qk_norm_eager.qk_norm_backward_

    def spy(*args, **kwargs):
        asked.append(kwargs["weight_grad"])
        return original(*args, **kwargs)

    monkeypatch.setattr(qk_norm_eager, "qk_norm_backward_", spy)
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    weights = [torch.randn(HEAD_DIM, dtype=torch.bfloat16, requires_grad=wanted) for wanted in trainable]
    qk_norm_rope(qkv, *weights, *make_angles(5, HEAD_DIM), **OPTIONS, **QWEN).sum().backward()
    assert asked == [any(trainable)]
    for weight, wanted in zip(weights, trainable, strict=True):
        assert (weight.grad is not None) == wanted
        assert weight.grad is None or weight.grad.dtype == torch.bfloat16
    assert qkv.grad is not None


def test_nothing_of_the_size_of_the_output_is_kept() -> None:
    saved: list[Tensor] = []
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    q_weight, k_weight, (cos, sin) = torch.ones(HEAD_DIM), torch.ones(HEAD_DIM), make_angles(5, HEAD_DIM)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rope(qkv, q_weight, k_weight, cos, sin, **OPTIONS, **QWEN)
    kept = {t.data_ptr() for t in saved}
    given = {t.data_ptr() for t in (qkv, q_weight, k_weight, cos, sin)}
    assert given < kept
    assert [t.shape for t in saved if t.data_ptr() not in given] == [(5, NUM_HEADS + NUM_KV_HEADS)]


def test_the_input_stays_and_a_contiguous_gradient_is_overwritten() -> None:
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    weights, angles = (torch.ones(HEAD_DIM), torch.ones(HEAD_DIM)), make_angles(5, HEAD_DIM)
    before = qkv.detach().clone()
    out = qk_norm_rope(qkv, *weights, *angles, **OPTIONS, **QWEN)
    assert torch.equal(qkv, before)
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, qkv, grad)
    assert dx.data_ptr() == grad.data_ptr()


def test_an_expanded_gradient_is_never_overwritten() -> None:
    cos, sin = make_angles(5, HEAD_DIM)
    weights = (torch.ones(HEAD_DIM), torch.ones(HEAD_DIM))
    qkv = torch.randn(5, HEADS, HEAD_DIM, requires_grad=True)
    expanded = torch.ones(()).expand_as(qkv)
    (actual,) = torch.autograd.grad(qk_norm_rope(qkv, *weights, cos, sin, **OPTIONS, **QWEN), qkv, expanded)
    whole = torch.ones_like(qkv)
    (expected,) = torch.autograd.grad(qk_norm_rope(qkv, *weights, cos, sin, **OPTIONS, **QWEN), qkv, whole)
    assert torch.equal(expanded, torch.ones_like(qkv))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", [(0, HEADS, HEAD_DIM), (0, HEADS * HEAD_DIM)], ids=["heads", "flat"])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    qkv, weight = torch.zeros(shape, requires_grad=True), torch.ones(HEAD_DIM, requires_grad=True)
    out = qk_norm_rope(qkv, weight, weight, *make_angles(0, HEAD_DIM), **OPTIONS, **QWEN)
    assert out.shape == shape
    out.sum().backward()
    assert qkv.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(HEAD_DIM))


@pytest.mark.gpu
@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_on_the_gpu(rule: dict, dtype: torch.dtype) -> None:
    cos, sin = make_angles(257, 128)

    def function(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        angles = (cos.to(qkv.device), sin.to(qkv.device))
        return qk_norm_rope(qkv, q_weight, k_weight, *angles, num_heads=32, num_kv_heads=8, **rule)

    inputs = [torch.randn(257, 48 * 128).to(dtype), torch.randn(128).to(dtype), torch.randn(128).to(dtype)]
    grad = torch.randn(257, 48 * 128).to(dtype)
    fused = gradients(function, *(t.cuda() for t in inputs), grad_output=grad.cuda())
    eager = gradients(function, *inputs, grad_output=grad.clone())
    exact = gradients(function, *(t.double() for t in inputs), grad_output=grad.double())
    for name, f, e, x in zip(("qkv", "q_weight", "k_weight"), fused, eager, exact, strict=True):
        assert_as_accurate_as_eager(f, e.to(f.device), x, what=name)
    out = function(*(t.cuda() for t in inputs))
    assert_as_accurate_as_eager(
        out, function(*inputs).to(out.device), function(*(t.double() for t in inputs)), what="y"
    )


@pytest.mark.gpu
def test_no_tokens_on_the_gpu() -> None:
    qkv = torch.zeros(0, HEADS, HEAD_DIM, device="cuda", requires_grad=True)
    weight = torch.ones(HEAD_DIM, device="cuda", requires_grad=True)
    cos, sin = (t.cuda() for t in make_angles(0, HEAD_DIM))
    qk_norm_rope(qkv, weight, weight, cos, sin, **OPTIONS, **QWEN).sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(weight.grad, torch.zeros_like(weight))
