"""A few rows of which nothing needs a gradient: the same results as with one, from fewer launches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.autograd import lora_few
from slothcore.autograd.lora import Projection, lora_fused, lora_mlp
from slothcore.autograd.rms_norm import NormRule, add_rms_norm
from slothcore.kernels import nf4_eager, rms_norm_few
from tests.numerics import assert_as_accurate_as_eager

IN, OUT = 128, 48


def nf4_projection(
    out_features: int = OUT, rank: int | None = 4, *, dtype: torch.dtype, device: str, in_features: int = IN,
    bias: bool = False,
) -> Projection:  # fmt: skip
    weight = nf4_eager.nf4_quantize(torch.randn(out_features, in_features, device=device) * 0.1)
    like = {"dtype": torch.float32, "device": device}
    return Projection(
        weight,
        lora_A=None if rank is None else torch.randn(rank, in_features, **like) * 0.1,
        lora_B=None if rank is None else torch.randn(out_features, rank, **like) * 0.1,
        scaling=1.5,
        bias=torch.randn(out_features, device=device, dtype=dtype) if bias else None,
    )


def widened(projection: Projection) -> Projection:
    """The same map in float64, for a weight as it is decoded in float32."""
    factors = {name: getattr(projection, name) for name in ("lora_A", "lora_B", "bias")}
    return replace(projection, **{name: None if t is None else t.double() for name, t in factors.items()})


def on_cpu(x: Tensor, projections: list[Projection]) -> bool:
    """`takes`, which wants a GPU, without that question."""
    return not x.requires_grad and len(projections) <= 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ranks", [(4,), (4, None, 7), (None, None)], ids=str)
def test_fused_as_accurate_as_the_function(monkeypatch, ranks, bias) -> None:
    projections = [
        nf4_projection(OUT + i, r, dtype=torch.float32, device="cpu", bias=bias) for i, r in enumerate(ranks)
    ]
    x = torch.randn(3, IN)
    eager, exact = lora_fused(x, projections), lora_fused(x.double(), [widened(p) for p in projections])
    monkeypatch.setattr(lora_few, "takes", on_cpu)
    monkeypatch.setattr("slothcore.autograd.lora._LoraFused", None)
    assert_as_accurate_as_eager(lora_fused(x, projections), eager, exact)


@pytest.mark.parametrize("fused_gate_up", [False, True])
def test_mlp_as_accurate_as_the_function(monkeypatch, fused_gate_up) -> None:
    sizes = (128,) if fused_gate_up else (64, 64)
    gate_up = [nf4_projection(n, dtype=torch.float32, device="cpu") for n in sizes]
    down = nf4_projection(40, dtype=torch.float32, device="cpu", in_features=64)
    x = torch.randn(3, IN)
    eager = lora_mlp(x, gate_up, down, activation="silu")
    exact = lora_mlp(x.double(), [widened(p) for p in gate_up], widened(down), activation="silu")
    monkeypatch.setattr(lora_few, "takes", on_cpu)
    monkeypatch.setattr("slothcore.autograd.lora._LoraMlp", None)
    assert_as_accurate_as_eager(lora_mlp(x, gate_up, down, activation="silu"), eager, exact)


@pytest.mark.parametrize("ranks", [(4,), (4, None, 7), (None,)], ids=str)
def test_a_norm_brings_the_input_of_the_terms(monkeypatch, ranks) -> None:
    """The same results, and u is not made again; for other projections it is."""
    width = rms_norm_few.NARROWEST // 64 * 64 + 64
    projections = [nf4_projection(OUT, r, dtype=torch.float32, device="cpu", in_features=width) for r in ranks]
    others = [replace(p, lora_A=None if p.lora_A is None else p.lora_A + 1) for p in projections]
    x, residual, weight = torch.randn(3, width), torch.randn(3, width), torch.randn(width)
    rule = NormRule(1e-5, 0.0, True)
    plain = add_rms_norm(x, residual, weight, **rule._asdict())
    monkeypatch.setattr(lora_few, "takes", on_cpu)
    normed = lora_few.normed(x, residual, weight, rule, projections)
    if ranks == (None,):
        assert normed is None
        return
    assert normed is not None
    assert torch.equal(normed.y, plain.y)
    assert torch.equal(normed.h, plain.h)
    expected, expected_of_others = lora_fused(plain, projections), lora_fused(plain, others)
    assert torch.equal(lora_fused(normed, others), expected_of_others)
    monkeypatch.setattr(lora_few.nf4_few_eager, "lora_input", None)
    assert torch.equal(lora_fused(normed, projections), expected)


def test_the_mlp_takes_what_the_norm_brings(monkeypatch) -> None:
    width = rms_norm_few.NARROWEST // 64 * 64 + 64
    gate_up = [nf4_projection(64, dtype=torch.float32, device="cpu", in_features=width) for _ in range(2)]
    down = nf4_projection(40, dtype=torch.float32, device="cpu", in_features=64)
    x, weight, rule = torch.randn(3, width), torch.randn(width), NormRule(1e-5, 0.0, True)
    monkeypatch.setattr(lora_few, "takes", on_cpu)
    normed = lora_few.normed(x, None, weight, rule, gate_up)
    expected = lora_mlp(normed.y, gate_up, down, activation="silu")
    made = []
    lora_input = lora_few.nf4_few_eager.lora_input
    monkeypatch.setattr(lora_few.nf4_few_eager, "lora_input", lambda x, A: made.append(x) or lora_input(x, A))
    assert torch.equal(lora_mlp(normed, gate_up, down, activation="silu"), expected)
    assert [x.shape[1] for x in made] == [64], "only down's input is made"


def test_nothing_is_taken_without_a_gpu() -> None:
    assert not lora_few.takes(torch.randn(1, IN), [nf4_projection(dtype=torch.float32, device="cpu")])


@pytest.mark.gpu
def test_takes_few_rows_that_need_no_gradient() -> None:
    dtype = torch.bfloat16
    x = torch.randn(4, IN, device="cuda", dtype=dtype)
    plain = nf4_projection(dtype=dtype, device="cuda")
    assert lora_few.takes(x, [plain])
    assert lora_few.takes(x, [plain, replace(plain, lora_A=None, lora_B=None)])
    assert lora_few.takes(x.repeat(16, 1), [plain])
    assert not lora_few.takes(x.repeat(17, 1), [plain])
    copied = replace(plain, weight=replace(plain.weight, decoded=nf4_eager.nf4_dequantize(plain.weight, dtype=dtype)))
    assert lora_few.takes(x.repeat(4, 1), [copied])
    assert not lora_few.takes(x.repeat(5, 1), [copied])
    assert not lora_few.takes(x, [replace(plain, dropout=0.1)])
    assert not lora_few.takes(x, [replace(plain, weight=torch.randn(OUT, IN, device="cuda", dtype=dtype))])
    assert not lora_few.takes(x, [replace(plain, magnitude=torch.ones(OUT, device="cuda"))])
    trained = replace(plain, lora_B=torch.nn.Parameter(plain.lora_B.clone()))
    assert not lora_few.takes(x, [trained])
    assert not lora_few.takes(x.clone().requires_grad_(), [plain])
    with torch.no_grad():
        assert lora_few.takes(x, [trained])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("bias", [False, True])
def test_gpu_results_are_those_of_the_function(nan_filled_empty, monkeypatch, rows, bias) -> None:
    dtype = torch.bfloat16
    group = [nf4_projection(n, 16, dtype=dtype, device="cuda", in_features=1024, bias=bias) for n in (512, 512)]
    down = nf4_projection(256, 16, dtype=dtype, device="cuda", in_features=512, bias=bias)
    x = torch.randn(rows, 1024, device="cuda", dtype=dtype)
    assert lora_few.takes(x, group)

    def results() -> tuple[Tensor, Tensor]:
        return lora_fused(x, group), lora_mlp(x, group, down, activation="silu")

    few = results()
    monkeypatch.setattr(lora_few, "takes", lambda x, projections: False)
    eager = results()
    monkeypatch.undo()

    def rounded(p: Projection) -> Projection:
        """As the bfloat16 pass sees it: weight, A and scaling * B rounded."""
        dense = nf4_eager.nf4_dequantize(p.weight, dtype=dtype).double()
        A, B = p.lora_A.to(dtype).double(), (p.lora_B * p.scaling).to(dtype).double()
        return Projection(dense, A, B, bias=None if p.bias is None else p.bias.double())

    exact_x, exact_group = x.double(), [rounded(p) for p in group]
    exact = (
        lora_fused(exact_x, exact_group),
        lora_mlp(exact_x, exact_group, rounded(down), activation="silu"),
    )
    for ours, reference, answer in zip(few, eager, exact, strict=True):
        assert_as_accurate_as_eager(ours, reference, answer)
