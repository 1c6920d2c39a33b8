"""LoRA Functions: what they keep for backward, what they do not compute, and what recomputation gives."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from slothcore.autograd.lora import lora_linear, lora_mlp
from tests.autograd.lora_reference import fused, leaves, mlp, projection


def saved_shapes(function: Callable[[], Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what the graph of `function()` keeps, in order."""
    shapes = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return shapes


class ProducedShapes(TorchDispatchMode):
    """Shapes of every matrix product inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_nothing_is_kept_for_a_frozen_factor(frozen: str) -> None:
    p = projection(5, 6, 8)
    getattr(p, frozen).requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    # The gradient of A needs x and B, that of B only u.
    kept = [(3, 6), (5, 8)] if frozen == "lora_B" else [(3, 8)]
    assert saved_shapes(lambda: fused(x, [p])) == kept


def test_fused_keeps_only_its_input_and_the_small_products() -> None:
    projections = [projection(32, 64, 8, dtype=torch.float32, bits=4), projection(16, 64, 4, dtype=torch.float32)]
    x = torch.randn(7, 64, requires_grad=True)
    joined_A, joined_B = (16, 64), (48, 16)
    kept = [(7, 64), (7, 16), joined_A, joined_B]
    assert saved_shapes(lambda: fused(x, projections)) == kept
    assert saved_shapes(lambda: fused(x, [replace(p, dropout=0.5) for p in projections])) == kept
    assert saved_shapes(lambda: fused(x.detach(), projections)) == [(7, 64), (7, 16), joined_B]


def test_mlp_keeps_only_its_input_gate_up_and_the_small_products() -> None:
    kind = {"dtype": torch.float32, "bits": 4}
    projections = [projection(96, 64, 8, **kind), projection(96, 64, 8, **kind), projection(64, 96, 8, **kind)]
    factors = [(16, 64), (192, 16), (8, 96), (64, 8)]
    x = torch.randn(7, 64, requires_grad=True)
    assert saved_shapes(lambda: mlp(x, projections)) == [(7, 64), (7, 16), (7, 8), (7, 192), *factors]
    without = [replace(p, lora_A=None, lora_B=None) for p in projections]
    assert saved_shapes(lambda: mlp(x, without)) == [(7, 192)]


DOWN_FACTORS = [(8, 96), (64, 8)]


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        (("gate.lora_A", "up.lora_A"), [(7, 16), (7, 8), (7, 192), *DOWN_FACTORS]),
        (("gate.lora_B", "up.lora_B"), [(7, 64), (7, 8), (7, 192), (192, 16), *DOWN_FACTORS]),
        (("down.lora_B",), [(7, 64), (7, 16), (7, 192), (192, 16), *DOWN_FACTORS]),
    ],
)
def test_mlp_keeps_nothing_for_frozen_factors(frozen: tuple[str, ...], kept: list[tuple[int, ...]]) -> None:
    projections = [projection(96, 64, 8), projection(96, 64, 8), projection(64, 96, 8)]
    for name in frozen:
        which, factor = name.split(".")
        getattr(projections[("gate", "up", "down").index(which)], factor).requires_grad_(False)
    x = torch.randn(7, 64, dtype=torch.float64)
    assert saved_shapes(lambda: mlp(x, projections)) == kept


def test_gate_and_up_are_not_kept_where_they_are_multiplied_again() -> None:
    kind = {"dtype": torch.float32, "bits": 4, "bias": "frozen"}
    projections = [projection(96, 64, 8, **kind), projection(96, 64, 8, **kind), projection(64, 96, 8, **kind)]
    factors, bias = [(16, 64), (192, 16)], (192,)
    x = torch.randn(7, 64, requires_grad=True)

    def again() -> Tensor:
        return lora_mlp(x, projections[:-1], projections[-1], activation="silu", keep_gate_up=False)

    assert saved_shapes(again) == [(7, 64), (7, 16), (7, 8), *factors, bias, *DOWN_FACTORS]
    for p in projections[:-1]:
        p.lora_A.requires_grad_(False)
        p.lora_B.requires_grad_(False)
    assert saved_shapes(again) == [(7, 64), (7, 16), (7, 8), *factors, bias, *DOWN_FACTORS], "they make gate and up"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("gate_up", ["two", "one"])
def test_multiplying_gate_and_up_again_changes_no_bit(gate_up: str, dropout: float, dtype: torch.dtype) -> None:
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": 4, "dropout": dropout, "bias": "trainable"}
    first = [projection(192, 64, 8, **kind)] if gate_up == "one" else [projection(96, 64, 8, **kind) for _ in range(2)]
    projections = [*first, projection(64, 96, 8, **kind)]
    x = torch.randn(33, 64).to(dtype).requires_grad_()
    inputs, dy = leaves(x, projections), torch.randn(33, 64).to(dtype)
    results = []
    for keep in (True, False):
        torch.manual_seed(3)
        y = lora_mlp(x, first, projections[-1], activation="silu", keep_gate_up=keep)
        results.append((y, *torch.autograd.grad(y, inputs, dy, retain_graph=not keep)))
    assert all(map(torch.equal, *results))
    # What backward overwrites is its own: it may run once more.
    assert all(map(torch.equal, torch.autograd.grad(y, inputs, dy), results[0][1:]))


def test_the_way_down_is_not_multiplied_again() -> None:
    kind = {"dtype": torch.float32, "bits": 4}
    projections = [projection(96, 64, 8, **kind), projection(96, 64, 8, **kind), projection(64, 96, 8, **kind)]
    x = torch.randn(7, 64, requires_grad=True)
    y = lora_mlp(x, projections[:-1], projections[-1], activation="silu", keep_gate_up=False)
    with ProducedShapes() as products:
        y.sum().backward()
    # Each with its LoRA term: gate and up again, dh, and dx, which has the shape of y.
    assert [products.shapes.count((7, width)) for width in (192, 96, 64)] == [2, 2, 2]


def test_nothing_is_kept_without_grad_mode() -> None:
    projections = [projection(96, 64, 8), projection(96, 64, 8), projection(64, 96, 8)]
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    for function in (lambda: mlp(x, projections), lambda: fused(x, projections[:2])):
        expected = function()
        with torch.no_grad():
            assert saved_shapes(function) == []
            y = function()
        assert y.grad_fn is None
        assert torch.equal(y, expected)


def test_no_weight_gradient_is_computed() -> None:
    projections = [projection(96, 64, 8), projection(96, 64, 8), projection(64, 96, 8)]
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)
    y = mlp(x, projections)
    with ProducedShapes() as products:
        y.sum().backward()
    assert (8, 96) in products.shapes, "the gradient of down's lora_A must have been seen"
    assert not {(96, 64), (192, 64), (64, 96)} & set(products.shapes)
    assert all(p.weight.grad is None for p in projections)


def test_no_input_gradient_is_computed_for_a_frozen_input() -> None:
    x = torch.randn(7, 64, dtype=torch.float64)
    y = fused(x, [projection(96, 64, 8), projection(32, 64, 8)])
    with ProducedShapes() as products:
        y.sum().backward()
    assert sorted(products.shapes) == [(7, 16), (16, 64), (128, 16)]


def test_no_gradient_is_computed_for_a_frozen_factor() -> None:
    projections = [projection(96, 64, 8), projection(96, 64, 8), projection(64, 96, 8)]
    projections[2].lora_A.requires_grad_(False)
    x = torch.randn(7, 64, dtype=torch.float64)
    y = mlp(x, projections)
    with ProducedShapes() as products:
        y.sum().backward()
    assert (64, 8) in products.shapes, "the gradient of down's lora_B must have been seen"
    assert (8, 96) not in products.shapes


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mlp_overwrites_what_it_kept_and_then_refuses_a_second_backward(device: str) -> None:
    kind = {"dtype": torch.float32, "device": device}
    projections = [projection(96, 64, 8, **kind), projection(96, 64, 8, **kind), projection(64, 96, 8, **kind)]
    x = torch.randn(7, 64, device=device, requires_grad=True)
    inputs = leaves(x, projections)
    kept, overwritten = mlp(x, projections), lora_mlp(x, projections[:-1], projections[-1], activation="silu")
    dy = torch.randn_like(kept)
    expected = torch.autograd.grad(kept, inputs, dy, retain_graph=True)
    actual = torch.autograd.grad(overwritten, inputs, dy, retain_graph=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert all(map(torch.equal, torch.autograd.grad(kept, inputs, dy), expected))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(overwritten, inputs, dy)


def test_checkpoint_recomputes_the_same_dropout() -> None:
    kind = {"dtype": torch.float32, "bits": 4, "dropout": 0.3}
    projections = [projection(96, 64, 8, **kind), projection(96, 64, 8, **kind), projection(64, 96, 8, **kind)]
    x = torch.randn(7, 64, requires_grad=True)
    inputs = leaves(x, projections)

    def block(x: Tensor) -> Tensor:
        return lora_mlp(
            x + lora_linear(x, replace(projections[2], weight=torch.ones(64, 64), lora_A=None, lora_B=None)),
            projections[:-1],
            projections[-1],
            activation="silu",
        )

    torch.manual_seed(1)
    expected = torch.autograd.grad(block(x).square().sum(), inputs)
    torch.manual_seed(1)
    actual = torch.autograd.grad(checkpoint(block, x, use_reentrant=False).square().sum(), inputs)
    assert all(map(torch.equal, actual, expected))
