"""LoRA Functions: hand-derived gradients, their error beside plain torch's, and dropout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from slothcore.autograd.lora import Projection, lora_fused, lora_linear, lora_mlp
from slothcore.autograd.lora_group import Group, dense_blocks
from slothcore.autograd.lora_projection import decodes_in_kernel
from slothcore.kernels import nf4_eager
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.autograd.lora_reference import (
    dense_weight,
    fused,
    leaves,
    mlp,
    plain_fused,
    plain_mlp,
    projection,
    widened_projection,
)
from tests.numerics import assert_as_accurate_as_eager

ACTIVATIONS = ["silu", "gelu_pytorch_tanh"]


def check_gradients(function: Callable[..., Tensor], x: Tensor, projections: Sequence[Projection]) -> None:
    """gradcheck over x and every factor, with the same dropout masks in each evaluation."""
    inputs = leaves(x, projections)

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(x, projections)

    assert gradcheck(seeded, inputs)


def check_against_plain(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, projections: Sequence[Projection]
) -> None:
    """Output and every gradient are as near to float64 as those of plain torch in the same dtype."""
    wide_x = x.detach().double().requires_grad_(x.requires_grad)
    wide = [widened_projection(p, x.dtype) for p in projections]
    exact = plain(wide_x, wide)
    dy = torch.randn_like(exact).to(x.dtype)
    exact_grads = torch.autograd.grad(exact, leaves(wide_x, wide), dy.double())
    inputs = leaves(x, projections)
    eager, ours = plain(x, projections), fused(x, projections)
    assert_as_accurate_as_eager(ours, eager, exact, what="y")
    eager_grads = torch.autograd.grad(eager, inputs, dy)
    grads = torch.autograd.grad(ours, inputs, dy)
    for i, (leaf, ours, eager, exact) in enumerate(zip(inputs, grads, eager_grads, exact_grads, strict=True)):
        assert ours.dtype == leaf.dtype
        assert_as_accurate_as_eager(ours, eager, exact, what=f"gradient {i} of shape {tuple(leaf.shape)}")


GROUPS = {
    "one": lambda: [projection(5, 6, 2, scaling=0.5)],
    "one without LoRA": lambda: [projection(5, 6)],
    "two, biases": lambda: [projection(5, 6, 3, bias="trainable"), projection(4, 6, 2, bias="frozen", scaling=2.0)],
    "three, one without LoRA": lambda: [
        projection(5, 6, 2, bias="trainable"),
        projection(3, 6),
        projection(4, 6, 9, scaling=0.3),
    ],
    "dropout": lambda: [projection(5, 6, 2, dropout=0.4, scaling=0.7)],
    "three, dropout in two": lambda: [
        projection(5, 6, 2, dropout=0.4),
        projection(3, 6, 3, bias="trainable", scaling=2.0),
        projection(4, 6, 2, dropout=0.2),
    ],
    "three, dropout beside none": lambda: [projection(5, 6, 2, dropout=0.4), projection(3, 6), projection(4, 6, 8)],
}


@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_gradcheck_of_fused_projections(group: str, x_trains: bool) -> None:
    projections = GROUPS[group]()
    x = torch.randn(3, 6, dtype=torch.float64).requires_grad_(x_trains)
    if leaves(x, projections):
        check_gradients(fused, x, projections)
    else:
        assert not fused(x, projections).requires_grad


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_gradcheck_with_a_frozen_factor(frozen: str) -> None:
    p = projection(5, 6, 8)
    getattr(p, frozen).requires_grad_(False)
    check_gradients(fused, torch.randn(3, 6, dtype=torch.float64), [p])


def test_gradcheck_of_one_linear() -> None:
    p = projection(5, 6, 2, scaling=0.5, bias="trainable")
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    check_gradients(lambda x, ps: lora_linear(x, ps[0]), x, [p])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("gate_up", ["two", "one"])
@pytest.mark.parametrize("variant", ["plain", "biases and dropout", "down only", "gate only", "none"])
def test_gradcheck_of_mlp(variant: str, gate_up: str, x_trains: bool, activation: str) -> None:
    options = {"bias": "trainable", "dropout": 0.3, "scaling": 0.5} if variant == "biases and dropout" else {}
    ranks = {"down only": (0, 0, 2), "gate only": (2, 0, 0), "none": (0, 0, 0)}.get(variant, (2, 3, 2))
    shapes = ((5, 4), (5, 4), (4, 5))
    if gate_up == "one":
        shapes, ranks = ((10, 4), (4, 5)), (ranks[0], ranks[2])
    projections = [projection(*shape, r, **options) for shape, r in zip(shapes, ranks, strict=True)]
    x = torch.randn(3, 4, dtype=torch.float64).requires_grad_(x_trains)
    if leaves(x, projections):
        check_gradients(lambda x, ps: mlp(x, ps, activation), x, projections)
    else:
        assert not mlp(x, projections).requires_grad


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_as_accurate_as_plain_torch(dtype: torch.dtype, factor_dtype: torch.dtype, bits: int) -> None:
    kind = {"dtype": dtype, "factor_dtype": factor_dtype, "bits": bits}
    projections = [
        projection(96, 64, 8, scaling=2.0, bias="trainable", **kind),
        projection(32, 64, 4, scaling=0.5, **kind),
        projection(32, 64, bias="frozen", **kind),
    ]
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    check_against_plain(fused, plain_fused, x, projections)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate_up", ["two", "one"])
def test_mlp_is_as_accurate_as_plain_torch(gate_up: str, dtype: torch.dtype, activation: str, bits: int) -> None:
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": bits, "scaling": 2.0}
    first = [projection(192, 64, 8, **kind)] if gate_up == "one" else [projection(96, 64, 8, **kind) for _ in range(2)]
    projections = [*first, projection(64, 96, 8, **kind)]
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    check_against_plain(
        lambda x, ps: lora_mlp(x, ps[:-1], ps[-1], activation=activation),
        lambda x, ps: plain_mlp(x, ps[:-1], ps[-1], activation=activation),
        x,
        projections,
    )


def test_mixed_dense_and_nf4_bases() -> None:
    kind = {"dtype": torch.float32, "scaling": 0.5}
    projections = [projection(32, 64, 8, bits=4, **kind), projection(16, 64, 8, **kind)]
    check_against_plain(fused, plain_fused, torch.randn(7, 64).requires_grad_(), projections)


def with_copies(projections: Sequence[Projection], dtype: torch.dtype, where: str) -> list[Projection]:
    """The same projections, their NF4 weights (or the last one's) with decoded copies."""
    dense = [dense_weight(p.weight, dtype) for p in projections]
    if where == "together":
        dense = list(torch.cat(dense).split([len(d) for d in dense]))
    copies = [None] * (len(dense) - 1) + dense[-1:] if where == "of the last" else dense
    weights = [replace(p.weight, decoded=copy) for p, copy in zip(projections, copies, strict=True)]
    return [replace(p, weight=weight) for p, weight in zip(projections, weights, strict=True)]


@pytest.mark.parametrize("where", ["together", "apart", "of the last", "in another dtype"])
def test_decoded_copies_are_used_where_they_lie(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not change; what has a copy in the dtype of x is not decoded again, neither way."""
    kind = {"dtype": torch.float32, "bits": 4}
    qkv = [projection(32, 64, 8, **kind), projection(16, 64, 8, **kind), projection(16, 64, **kind)]
    dtype = torch.bfloat16 if where == "in another dtype" else torch.float32
    copied = with_copies(qkv, dtype, where)
    x, decoded = torch.randn(7, 64, requires_grad=True), []
    original = nf4_eager.nf4_dequantize

    def results(projections: Sequence[Projection]) -> list[Tensor]:
        y = fused(x, projections)
        return [y, *torch.autograd.grad(y.square().sum(), leaves(x, projections))]

    def counting(weight: Nf4Tensor, **kwargs: Any) -> Tensor:
        decoded.append(weight)
        return original(weight, **kwargs)

    expected = results(qkv)
    monkeypatch.setattr(nf4_eager, "nf4_dequantize", counting)
    for ours, theirs in zip(results(copied), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(decoded) == {"of the last": 2 * 2, "in another dtype": 2 * 3}.get(where, 0)


def test_copies_that_lie_together_are_one_matrix() -> None:
    kind = {"dtype": torch.float32, "bits": 4}
    copied = with_copies([projection(32, 64, 8, **kind), projection(16, 64, 8, **kind)], torch.float32, "together")
    ((matrix, rows),) = dense_blocks(Group.of(copied), torch.empty(7, 64))
    assert rows == slice(0, 48)
    assert matrix.data_ptr() == copied[0].weight.decoded.data_ptr()


@pytest.mark.gpu
def test_a_copy_is_read_where_it_is_cheaper_than_decoding() -> None:
    kind = {"dtype": torch.bfloat16, "bits": 4, "device": "cuda"}
    qkv = [projection(256, 512, 8, **kind), projection(128, 512, 8, **kind)]
    copied = with_copies(qkv, torch.bfloat16, "together")
    for rows, with_copy, without in ((1, True, True), (16, True, True), (17, False, True), (257, False, False)):
        x = torch.empty(rows, 512, dtype=torch.bfloat16, device="cuda")
        assert decodes_in_kernel(x, Group.of(copied)) == with_copy
        assert decodes_in_kernel(x, Group.of(qkv)) == without


def test_no_rows() -> None:
    projections = [projection(5, 6, 2), projection(4, 6, 2)]
    x = torch.randn(0, 6, dtype=torch.float64, requires_grad=True)
    y = fused(x, projections)
    assert y.shape == (0, 9)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 6)
    assert projections[0].lora_A is not None
    assert not projections[0].lora_A.grad.any()


def test_dropout_hides_elements_from_each_projection_on_its_own() -> None:
    """With W = 0 and A = B = I the output is the masked input itself."""
    width, rate = 16, 0.25
    eye = torch.eye(width, dtype=torch.float64)
    p = Projection(weight=torch.zeros_like(eye), lora_A=eye, lora_B=eye, dropout=rate)
    x = torch.ones(4000, width, dtype=torch.float64)
    torch.manual_seed(5)
    y = lora_fused(x, [p, replace(p, dropout=0.0), p])
    first, whole, second = y.split(width, dim=1)
    assert torch.equal(whole, x)
    for dropped in (first, second):
        # Each element is 0 or 1 / (1 - p); six standard deviations of the share of zeros.
        assert set(dropped.unique().tolist()) == {0.0, 1 / (1 - rate)}
        deviation = (rate * (1 - rate) / x.numel()) ** 0.5
        assert abs((dropped == 0).double().mean().item() - rate) < 6 * deviation
    assert not torch.equal(first, second)
    assert not torch.equal(lora_fused(x, [p]), lora_fused(x, [p])), "each call draws new masks"
    torch.manual_seed(5)
    assert torch.equal(lora_fused(x, [p, replace(p, dropout=0.0), p]), y)


@pytest.mark.parametrize("x_is", ["transposed", "expanded", "strided"])
def test_dropout_masks_do_not_depend_on_strides(x_is: str) -> None:
    """x may lie in memory in another order than its gradient, which the backward pass masks."""
    layouts = {
        "transposed": lambda: torch.randn(6, 7, dtype=torch.float64).T,
        "expanded": lambda: torch.randn(1, 6, dtype=torch.float64).expand(7, 6),
        "strided": lambda: torch.randn(7, 9, dtype=torch.float64)[:, 2:8],
    }
    x, p = layouts[x_is]().requires_grad_(), projection(5, 6, 2, dropout=0.4, scaling=0.7)
    inputs = leaves(x, [p])
    torch.manual_seed(3)
    actual = torch.autograd.grad(lora_linear(x, p).sin().sum(), inputs)
    torch.manual_seed(3)
    expected = torch.autograd.grad(lora_linear(x.contiguous(), p).sin().sum(), inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_dropout_ignores_the_default_device() -> None:
    p, x = projection(5, 6, 2, dropout=0.4), torch.randn(7, 6, dtype=torch.float64)
    torch.manual_seed(3)
    expected = lora_linear(x, p)
    torch.manual_seed(3)
    with torch.device("meta"):
        assert torch.equal(lora_linear(x, p), expected)


def test_autocast_to_the_dtype_of_x_changes_nothing_and_to_another_is_refused() -> None:
    kind = {"dtype": torch.bfloat16, "factor_dtype": torch.float32, "bits": 4}
    p, x = projection(96, 64, 8, scaling=0.5, **kind), torch.randn(7, 64).bfloat16()
    expected = lora_linear(x, p)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_linear(x, p), expected)
        with pytest.raises(ValueError, match="leave autocast out"):
            lora_linear(x.float(), p)


def test_errors_name_rule_and_value() -> None:
    p = projection(5, 6, 2)
    x = torch.randn(3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="x has 7 features"):
        lora_linear(torch.randn(3, 7, dtype=torch.float64), p)
    with pytest.raises(ValueError, match=r"\[tokens, in_features\]"):
        lora_linear(x[None], p)
    with pytest.raises(ValueError, match="cast x"):
        lora_linear(x.float(), p)
    with pytest.raises(ValueError, match="cast x"):
        lora_mlp(x, (p, p), projection(6, 5, dtype=torch.float32), activation="silu")
    with pytest.raises(ValueError, match="dropout must be"):
        replace(p, dropout=1.0)
    with pytest.raises(ValueError, match="both lora_A and lora_B"):
        replace(p, lora_B=None)
    with pytest.raises(ValueError, match=r"\[r, in\] and \[out, r\], got \(2, 6\) and \(5, 3\)"):
        replace(p, lora_B=torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"got \(2, 5\)"):
        replace(p, lora_A=torch.randn(2, 5))
    with pytest.raises(ValueError, match="gate and up"):
        lora_mlp(x, (p, p), projection(6, 4), activation="silu")
    with pytest.raises(ValueError, match="gate and up"):
        lora_mlp(x, (p, projection(7, 6)), projection(6, 6), activation="silu")
    with pytest.raises(ValueError, match="gate and up"):
        lora_mlp(x, (p,), projection(6, 5), activation="silu")


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 513, 2048])
def test_functions_on_gpu(tokens: int, factor_dtype: torch.dtype, bits: int) -> None:
    hidden, intermediate = 2048, 5632
    kind = {"dtype": torch.bfloat16, "factor_dtype": factor_dtype, "bits": bits, "device": "cuda"}
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    qkv = [
        projection(2048, hidden, 16, scaling=2.0, bias="trainable", **kind),
        projection(256, hidden, 16, **kind),
        projection(256, hidden, bias="frozen", **kind),
    ]
    check_against_plain(fused, plain_fused, x, qkv)
    linears = [
        projection(intermediate, hidden, 16, **kind),
        projection(intermediate, hidden, 12, scaling=0.5, **kind),
        projection(hidden, intermediate, 16, scaling=2.0, **kind),
    ]
    check_against_plain(
        lambda x, ps: lora_mlp(x, ps[:-1], ps[-1], activation="silu"),
        lambda x, ps: plain_mlp(x, ps[:-1], ps[-1], activation="silu"),
        x,
        linears,
    )
    fused_gate_up = [projection(2 * intermediate, hidden, 16, **kind), linears[-1]]
    check_against_plain(
        lambda x, ps: lora_mlp(x, ps[:-1], ps[-1], activation="gelu_pytorch_tanh"),
        lambda x, ps: plain_mlp(x, ps[:-1], ps[-1], activation="gelu_pytorch_tanh"),
        x,
        fused_gate_up,
    )


@pytest.mark.gpu
def test_dropout_masks_agree_between_forward_and_backward_on_gpu() -> None:
    """y is linear in x for fixed masks, so x . dx must equal y . dy; a mask drawn anew would break that."""
    p = projection(256, 512, 16, device="cuda", dtype=torch.float32, dropout=0.5, scaling=4.0)
    p = replace(p, weight=torch.zeros_like(p.weight))
    x = torch.randn(300, 512, device="cuda", requires_grad=True)
    y = lora_linear(x, p)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    left, right = (x.double() * dx.double()).sum(), (y.double() * dy.double()).sum()
    assert abs(left - right) <= 1e-4 * (x.norm() * dx.norm())
