"""DoRA's Functions: hand-derived gradients, PEFT's formulas beside them, and what is kept for backward."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from slothcore.autograd.dora_projection import Scales, row_norms
from slothcore.autograd.lora import Projection, lora_fused, lora_linear, lora_mlp
from slothcore.autograd.lora_group import Group, joined_factors
from slothcore.layers.norm import RMSNorm
from tests.autograd.dora_reference import (
    dora_projection,
    fused,
    leaves,
    mlp,
    peft_fused,
    peft_linear,
    peft_mlp,
    widened,
)
from tests.autograd.lora_reference import projection
from tests.autograd.test_lora_memory import saved_shapes
from tests.numerics import relative_error

ACTIVATIONS = ["silu", "gelu_pytorch_tanh"]


def check_gradients(function: Callable[..., Tensor], x: Tensor, projections: Sequence[Projection]) -> None:
    """gradcheck over all that trains, with the same dropout masks in each evaluation."""

    def seeded(*_: Tensor) -> Tensor:
        torch.manual_seed(3)
        return function(x, projections)

    assert gradcheck(seeded, leaves(x, projections))


GROUPS = {
    "one": lambda: [dora_projection(5, 6, 2, known=True, scaling=0.5)],
    "two, biases": lambda: [
        dora_projection(5, 6, 3, known=True, bias="trainable"),
        dora_projection(4, 6, 2, known=True, bias="frozen", scaling=2.0),
    ],
    "beside LoRA and neither": lambda: [
        dora_projection(5, 6, 2, known=True, bias="trainable"),
        projection(3, 6),
        projection(4, 6, 9, scaling=0.3),
    ],
    "dropout": lambda: [dora_projection(5, 6, 2, known=True, dropout=0.4, scaling=0.7)],
    "dropout in two, biases": lambda: [
        dora_projection(5, 6, 2, known=True, dropout=0.4),
        dora_projection(3, 6, 3, known=True, bias="trainable", scaling=2.0),
        dora_projection(4, 6, 2, known=True, dropout=0.2),
    ],
    "dropout beside none": lambda: [dora_projection(5, 6, 2, known=True, dropout=0.4), projection(3, 6)],
}


@pytest.mark.parametrize("x_trains", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_gradcheck_of_fused_projections(group: str, x_trains: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64).requires_grad_(x_trains)
    check_gradients(fused, x, GROUPS[group]())


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [("lora_A",), ("lora_B",), ("magnitude",), ("lora_A", "lora_B")])
def test_gradcheck_with_something_frozen(frozen: tuple[str, ...], dropout: float) -> None:
    p = dora_projection(5, 6, 8, known=True, dropout=dropout)
    for name in frozen:
        getattr(p, name).requires_grad_(False)
    x = torch.randn(3, 6, dtype=torch.float64)
    check_gradients(fused, x, [p])
    check_gradients(fused, x.clone().requires_grad_(), [p])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("keep_gate_up", [True, False])
@pytest.mark.parametrize("gate_up", ["two", "one"])
@pytest.mark.parametrize(
    "variant", ["plain", "biases", "biases and dropout", "dropout in gate", "down only", "x frozen"]
)
def test_gradcheck_of_mlp(variant: str, gate_up: str, keep_gate_up: bool, activation: str) -> None:
    bias = {"bias": "trainable"} if "biases" in variant else {}
    dropouts = {"biases and dropout": (0.3, 0.3, 0.3), "dropout in gate": (0.3, 0.0, 0.0)}.get(variant, (0, 0, 0))
    shapes = ((5, 4), (5, 4), (4, 5))
    if gate_up == "one":
        shapes, dropouts = ((10, 4), (4, 5)), (dropouts[0], dropouts[2])
    projections = [
        dora_projection(*shape, 2, known=True, scaling=0.5, dropout=p, **bias)
        for shape, p in zip(shapes, dropouts, strict=True)
    ]
    if variant == "down only":
        projections[:-1] = [projection(*shape, 2) for shape in shapes[:-1]]
    x = torch.randn(3, 4, dtype=torch.float64).requires_grad_(variant != "x frozen")
    check_gradients(lambda x, ps: mlp(x, ps, activation, keep_gate_up=keep_gate_up), x, projections)


def check_against_peft(
    ours: Callable[..., Tensor], peft: Callable[..., Tensor], x: Tensor, projections: Sequence[Projection]
) -> None:
    """Output and every gradient are as near to PEFT's in float64 as PEFT's in the same dtype.

    By the norm of the difference: the largest one is a matter of luck between formulas that round in other places.
    """
    wide_x, wide = x.detach().double().requires_grad_(), [widened(p, x.dtype) for p in projections]
    results = []
    for function, inputs in ((peft, (wide_x, wide)), (peft, (x, projections)), (ours, (x, projections))):
        torch.manual_seed(5)  # of the masks
        y = function(*inputs)
        torch.manual_seed(6)
        dy = torch.randn(y.shape, device=y.device).to(x.dtype).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, leaves(*inputs), dy)])
    for i, (exact, eager, actual) in enumerate(zip(*results, strict=True)):
        assert actual.dtype == eager.dtype
        budget = 2 * relative_error(eager, exact) + 8 * torch.finfo(eager.dtype).eps
        assert relative_error(actual, exact) <= budget, f"result {i} of shape {tuple(exact.shape)}"


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_projections_are_peft_s(dtype: torch.dtype, bits: int, dropout: float) -> None:
    """With norms that come from the factors."""
    kind = {"dtype": dtype, "dropout": dropout}
    quantised = {**kind, "bits": bits} if dtype != torch.float64 else kind
    projections = [
        dora_projection(96, 64, 8, scaling=2.0, bias="trainable", **quantised),
        dora_projection(32, 64, 4, scaling=0.5, **quantised),
        projection(32, 64, 8, bias="frozen", **quantised),
    ]
    check_against_peft(fused, peft_fused, torch.randn(33, 64).to(dtype).requires_grad_(), projections)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_is_peft_s(dtype: torch.dtype, bits: int, activation: str, dropout: float) -> None:
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": bits, "scaling": 2.0, "dropout": dropout}
    projections = [*(dora_projection(96, 64, 8, **kind) for _ in range(2)), dora_projection(64, 96, 8, **kind)]
    for keep in (True, False):
        check_against_peft(
            lambda x, ps, keep=keep: mlp(x, ps, activation, inplace=True, keep_gate_up=keep),
            lambda x, ps: peft_mlp(x, ps[:-1], ps[-1], activation=activation),
            torch.randn(33, 64).to(dtype).requires_grad_(),
            projections,
        )


def test_with_the_norms_for_magnitudes_it_is_lora() -> None:
    """To the last bit, and with dropout too: so DoRA begins."""
    for dtype in (torch.float32, torch.bfloat16):
        for dropout in (0.0, 0.3):
            p = projection(24, 32, 8, dtype=dtype, scaling=0.5, dropout=dropout)
            p = replace(p, lora_B=torch.zeros_like(p.lora_B).requires_grad_())
            norms = row_norms(p.weight, p.lora_A, p.lora_B, scaling=0.5, dtype=dtype)
            x = torch.randn(7, 32).to(dtype)
            torch.manual_seed(1)
            expected = lora_linear(x, p)
            torch.manual_seed(1)
            assert torch.equal(lora_linear(x, replace(p, magnitude=norms)), expected)


def test_norms_are_of_the_factors_that_multiply() -> None:
    """Rounded to the compute dtype, and without the 1 / (1 - p) that the factors of a group with dropout have."""
    p = dora_projection(24, 32, 5, dtype=torch.bfloat16, factor_dtype=torch.float32, scaling=0.7, dropout=0.5)
    group, x = Group.of((p,)), torch.randn(3, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        scales = Scales.of(group, *joined_factors(group, (p.lora_A,), (p.lora_B,), x), (p.magnitude,), (None,), x)
    exact = torch.linalg.norm(p.weight.double() + 0.7 * p.lora_B.double() @ p.lora_A.double(), dim=1)
    assert torch.allclose(scales.norms.double(), exact, rtol=3e-3)
    assert torch.allclose(scales.scales, p.magnitude / scales.norms)
    assert torch.allclose(row_norms(p.weight, p.lora_A, p.lora_B, scaling=0.7).double(), exact, rtol=1e-6)


def test_what_made_x_is_kept_in_its_place() -> None:
    """From the output of a norm, as a decoder layer has it; the gradients are those without that knowledge."""
    norm = RMSNorm(64, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    for dropout in (0.0, 0.3):
        groups = [dora_projection(48, 64, 8, dtype=torch.float32, dropout=dropout) for _ in range(2)]
        down = dora_projection(64, 48, 8, dtype=torch.float32, dropout=dropout)
        x = torch.randn(9, 64, requires_grad=True)
        for function in (
            lambda x: lora_fused(x, groups),  # noqa: B023 - called in this turn of the loop
            lambda x: lora_mlp(x, groups, down, activation="silu", inplace=False),  # noqa: B023
        ):
            grads = []
            for normed in (norm(x), norm(x).y):
                torch.manual_seed(2)
                y = function(normed)
                inputs = leaves(x, [*groups, down])
                grads.append(torch.autograd.grad(y.square().sum(), inputs, allow_unused=True))
            for with_norm, plain in zip(*grads, strict=True):
                assert (with_norm is None) == (plain is None)
                assert plain is None or torch.allclose(with_norm, plain, rtol=1e-4, atol=1e-4)


def test_kept_are_what_is_scaled_and_two_numbers_a_row() -> None:
    kind = {"dtype": torch.float32, "bits": 4}
    pair = [dora_projection(32, 64, 8, **kind), dora_projection(16, 64, 8, **kind)]
    x = torch.randn(7, 64, requires_grad=True)
    lora = [(7, 64), (7, 16), (16, 64), (48, 16)]
    assert saved_shapes(lambda: fused(x, pair)) == [*lora, (7, 48), (48,), (48,)]
    assert saved_shapes(lambda: fused(x, [replace(p, dropout=0.5) for p in pair])) == [*lora, (48,), (48,)]
    frozen = [replace(p, magnitude=p.magnitude.detach()) for p in pair]
    assert saved_shapes(lambda: fused(x, frozen)) == [*lora, (48,)]
    gate_up, down = [dora_projection(96, 64, 8, **kind) for _ in range(2)], dora_projection(64, 96, 8, **kind)
    kept = [(7, 64), (7, 16), (7, 8), (7, 192), (16, 64), (192, 16), (8, 96), (64, 8), (7, 64)]
    rows = [(192,), (64,), (192,), (64,)]
    assert saved_shapes(lambda: mlp(x, [*gate_up, down])) == [*kept, *rows]
    without = [shape for shape in kept if shape != (7, 192)]
    assert saved_shapes(lambda: mlp(x, [*gate_up, down], keep_gate_up=False)) == [*without, *rows]


def test_a_second_backward_through_an_overwritten_activation_raises() -> None:
    projections = [*(dora_projection(5, 4, 2) for _ in range(2)), dora_projection(4, 5, 2)]
    y = mlp(torch.randn(3, 4, dtype=torch.float64), projections, inplace=True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_wrong_magnitudes_are_refused() -> None:
    p = projection(5, 6, 2)
    with pytest.raises(ValueError, match=r"the magnitude of DoRA must be \[5\], got \(4,\)"):
        replace(p, magnitude=torch.ones(4))
    with pytest.raises(ValueError, match=r"the norms of DoRA must be \[5\], got \(1,\)"):
        replace(p, magnitude=torch.ones(5), norms=torch.ones(1))
    with pytest.raises(ValueError, match="goes with lora_A and lora_B"):
        replace(p, lora_A=None, lora_B=None, magnitude=torch.ones(5))


def test_the_layer_of_peft_with_our_mask() -> None:
    """PEFT's own code, not a copy of its formulas: one layer with dropout, its mask put in the place of a draw."""
    peft = pytest.importorskip("peft")

    class Masked(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * mask / (1 - 0.4)

    base = torch.nn.Sequential(torch.nn.Linear(12, 10))
    base.requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True, lora_dropout=0.4)
    layer = peft.get_peft_model(base, config).base_model.model[0]
    layer.lora_dropout["default"] = Masked()
    p = replace(
        dora_projection(10, 12, 4, dtype=torch.float32, scaling=1.5, dropout=0.4, bias="frozen"),
        weight=layer.base_layer.weight,
        bias=layer.base_layer.bias,
    )
    theirs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    theirs.append(layer.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        for parameter, value in zip(theirs, (p.lora_A, p.lora_B, p.magnitude), strict=True):
            parameter.copy_(value)
    inputs = [torch.randn(5, 12, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    # The mask is what zeroes the LoRA term's view of ones.
    torch.manual_seed(8)
    seen = lora_linear(torch.ones(5, 12), replace(
        p, weight=torch.zeros(12, 12), bias=None, magnitude=None, scaling=1.0,
        lora_A=torch.eye(12), lora_B=torch.eye(12),
    ))  # fmt: skip
    mask = (seen > 0).float()
    assert 0 < mask.mean() < 1
    torch.manual_seed(8)
    ours, expected = lora_linear(inputs[0], p), layer.train()(inputs[1])
    assert torch.allclose(ours, expected, atol=1e-5)
    dy = torch.randn_like(ours)
    grads = torch.autograd.grad(ours, [inputs[0], p.lora_A, p.lora_B, p.magnitude], dy)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, [inputs[1], *theirs], dy), strict=True):
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm()
    assert torch.allclose(peft_linear(inputs[0], p, mask), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 100, 1500, 8192])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("nan_filled_empty")
def test_on_a_gpu(dtype: torch.dtype, bits: int, tokens: int) -> None:
    """Real sizes: q/k/v, and the MLP with its activation kept and made again."""
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": bits, "scaling": 2.0, "device": "cuda"}
    x = torch.randn(tokens, 2048, device="cuda").to(dtype).requires_grad_()
    qkv = [dora_projection(2048, 2048, 16, **kind), *(dora_projection(512, 2048, 16, **kind) for _ in range(2))]
    check_against_peft(fused, peft_fused, x, qkv)
    gate_up = [dora_projection(8192, 2048, 16, **kind) for _ in range(2)]
    projections = [*gate_up, dora_projection(2048, 8192, 16, **kind)]
    for keep in (True, False):
        check_against_peft(
            lambda x, ps, keep=keep: mlp(x, ps, inplace=True, keep_gate_up=keep),
            lambda x, ps: peft_mlp(x, ps[:-1], ps[-1], activation="silu"),
            x,
            projections,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
def test_dropout_on_a_gpu(bits: int) -> None:
    kind = {"dtype": torch.bfloat16, "bits": bits, "scaling": 2.0, "dropout": 0.25, "device": "cuda"}
    x = torch.randn(700, 2048, device="cuda").bfloat16().requires_grad_()
    check_against_peft(fused, peft_fused, x, [dora_projection(n, 2048, 16, **kind) for n in (2048, 512, 512)])
