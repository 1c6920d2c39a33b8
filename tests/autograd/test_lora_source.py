"""Projections of a norm's output that keep the norm's input in its place: gradients, their error, and what is kept."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from slothcore.autograd import lora_projection
from slothcore.autograd.lora import Projection, lora_fused, lora_mlp
from slothcore.autograd.lora_source import Source
from slothcore.autograd.rms_norm import Normed, NormRule, add_rms_norm, rms_norm
from slothcore.autograd.sandwich_norm import post_norm_add_norm
from slothcore.kernels import lora_grads_few, rms_norm_eager
from slothcore.kernels.lora_grads_eager import ColumnScale, grads_apart, transposed_product
from tests.autograd.lora_reference import leaves, plain_fused, plain_mlp, projection, widened_projection
from tests.autograd.test_lora_memory import saved_shapes
from tests.numerics import assert_as_accurate_as_eager, relative_error

LLAMA = {"eps": 1e-5}
GEMMA = {"eps": 1e-6, "weight_offset": 1.0, "cast_before_weight": False}
RULES = pytest.mark.parametrize("rule", [LLAMA, GEMMA], ids=["llama", "gemma"])
TRAINABLE = pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])


def alone(branch: Tensor, residual: Tensor, weight: Tensor, **rule) -> Normed:
    return rms_norm(branch, weight, **rule)


def sandwich(branch: Tensor, residual: Tensor, weight: Tensor, **rule) -> Normed:
    return post_norm_add_norm(branch, residual, torch.linspace(0.5, 1.5, len(weight)).to(weight), weight, **rule)


NORMS = {"alone": alone, "residual": add_rms_norm, "sandwich": sandwich}


def qkv(x: Tensor | Normed, projections: Sequence[Projection]) -> Tensor:
    return lora_fused(x, projections)


def mlp(x: Tensor | Normed, projections: Sequence[Projection]) -> Tensor:
    return lora_mlp(x, projections[:-1], projections[-1], activation="silu", inplace=False)


def mlp_again(x: Tensor | Normed, projections: Sequence[Projection]) -> Tensor:
    return lora_mlp(x, projections[:-1], projections[-1], activation="silu", keep_gate_up=False)


MAPS = {"qkv": qkv, "mlp": mlp, "mlp, gate and up again": mlp_again}


def projections_for(name: str, hidden: int, inner: int, rank: int, **options) -> list[Projection]:
    if name == "qkv":
        return [projection(inner, hidden, r, **options) for r in (rank, 0, rank + 1)]
    return [projection(*shape, rank, **options) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]


@RULES
@TRAINABLE
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MAPS)
def test_gradcheck_of_norm_and_projections(name: str, norm: str, dropout: float, trainable: bool, rule: dict) -> None:
    """Through y into the branch, the residual and the norm's weight; and h goes on to another reader."""
    projections = projections_for(name, 6, 5, 2, dropout=dropout, scaling=0.7, bias="trainable")
    branch, residual = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    stream = [t.clone().requires_grad_() for t in (branch, residual)]
    weight = torch.randn(6, dtype=torch.float64).requires_grad_(trainable)

    def function(branch: Tensor, residual: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(3)
        normed = NORMS[norm](branch, residual, weight, **rule)
        return MAPS[name](normed, projections).sum(1) + (normed.h * residual).sin().sum(1)

    assert gradcheck(function, (*stream, weight, *leaves(branch, projections)))


@RULES
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_are_as_accurate_as_with_the_output_kept(name: str, dtype: torch.dtype, dropout: float, rule) -> None:
    """Only dA of the norm's readers differs; it never saw the rounded x, and is as near to float64."""
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "bits": 4, "scaling": 2.0, "dropout": dropout}
    projections = projections_for(name, 64, 96, 8, **kind)
    row_scale = torch.logspace(-2, 1, 33)[:, None]
    branch, residual = ((row_scale * torch.randn(33, 64)).to(dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.3 * torch.randn(64)).to(dtype)
    inputs = leaves(branch, projections)

    def gradients(pass_on: Callable[[Normed], Tensor | Normed]) -> Sequence[Tensor]:
        torch.manual_seed(3)
        y = MAPS[name](pass_on(add_rms_norm(branch, residual, weight, **rule)), projections)
        return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype))

    kept, from_h = gradients(lambda normed: normed.y), gradients(lambda normed: normed)
    # float16 and dropout make the very x again.
    same_bits = dtype == torch.float16 or dropout > 0
    wide = [widened_projection(p, dtype) for p in projections]
    wide_h = (branch + residual).detach().double().requires_grad_()
    torch.manual_seed(3)
    exact_y = MAPS[name](rms_norm(wide_h, weight.double(), **rule).y, wide)
    direction = torch.linspace(-1, 1, exact_y.numel()).view_as(exact_y).to(dtype).double()
    exact = torch.autograd.grad(exact_y, leaves(wide_h, wide), direction)
    for leaf, old, new, truth in zip(inputs, kept, from_h, exact, strict=True):
        is_A_of_the_norm = leaf is not branch and leaf.shape[1] == 64
        if same_bits or not is_A_of_the_norm:
            assert torch.equal(old, new)
        else:
            assert_as_accurate_as_eager(new, old, truth, what=f"gradient of shape {tuple(leaf.shape)}")


@pytest.mark.parametrize(
    ("rule", "share"), [(NormRule(1e-5, 0.0, True), 0.9), (NormRule(1e-6, 1.0, False), 1.1)], ids=["llama", "gemma"]
)
def test_dA_from_h_is_the_closer_one(rule: NormRule, share: float) -> None:
    """For exact v: Llama rounds x twice and r v is rounded once; Gemma rounds each once, and the errors are equal."""
    h, v = torch.randn(2048, 256).bfloat16(), torch.randn(2048, 16).bfloat16()
    weight = (1 + 0.3 * torch.randn(256)).bfloat16()
    y, rstd, _ = rms_norm_eager.rms_norm_forward(h, weight, **rule._asdict())
    exact_y, _, _ = rms_norm_eager.rms_norm_forward(h.double(), weight.double(), **rule._asdict())
    exact = v.double().t() @ exact_y
    dA, scale = Source(h, rstd, weight, rule).times(v)
    assert scale == ColumnScale(weight, rule.weight_offset)
    (ours,), _ = grads_apart(dA, None, out_features=[4], ranks=[16], scalings=[1.0], scale=scale)
    assert (ours - exact).norm() <= share * (transposed_product(v, y) - exact).norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs for real: see the gpu test")
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", None])
@pytest.mark.parametrize("source", ["x", "norm"])
@pytest.mark.parametrize("name", MAPS)
def test_one_launch_gives_the_same_gradients(
    name: str, source: str, frozen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What few tokens take on a GPU, in Triton's interpreter; once for each group whose gradients are wanted."""
    projections = projections_for(name, 64, 96, 8, dtype=torch.float32, scaling=0.7, bias="trainable")
    if frozen:
        getattr(projections[0], frozen).requires_grad_(False)
        getattr(projections[-1], frozen).requires_grad_(False)
    branch, weight = torch.randn(33, 64, requires_grad=True), torch.randn(64)
    inputs = leaves(branch, projections)

    def gradients() -> Sequence[Tensor]:
        normed = rms_norm(branch, weight, **GEMMA)
        y = MAPS[name](normed if source == "norm" else normed.y, projections)
        return torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view_as(y))

    expected, launches = gradients(), []
    original = lora_grads_few.factor_grads
    monkeypatch.setattr(lora_projection, "in_one_launch", lambda h, dy, group: True)
    monkeypatch.setattr(
        lora_grads_few, "factor_grads", lambda *args, **kw: launches.append(args) or original(*args, **kw)
    )
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= 1e-6
    assert len(launches) == (1 if name == "qkv" else 2)


def test_float16_makes_the_input_again() -> None:
    """r v would be 6e4 * 8: beyond float16, whose dA must be as finite as it was."""
    h, weight, v = torch.full((4, 8), 2.0**-16).half(), torch.ones(8).half(), torch.full((4, 2), 8.0).half()
    rule = NormRule(1e-12, 0.0, True)
    y, rstd, _ = rms_norm_eager.rms_norm_forward(h, weight, **rule._asdict())
    assert not (v * rstd.half()[:, None]).isfinite().all()
    dA, scale = Source(h, rstd, weight, rule).times(v)
    assert scale is None
    assert torch.equal(dA, transposed_product(v, y))


@pytest.mark.parametrize("norm", ["residual", "sandwich"])
@pytest.mark.parametrize("name", MAPS)
def test_the_output_of_the_norm_is_not_kept(name: str, norm: str) -> None:
    """Beside what the norm keeps for itself the projections keep nothing of its size that is not the same memory."""
    projections = projections_for(name, 64, 96, 8, dtype=torch.float32)
    branch, residual = torch.randn(2, 33, 64, requires_grad=True).unbind()
    weight = torch.randn(64)
    kept: dict[int, Tensor] = {}
    made: list[Normed] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.append(NORMS[norm](branch, residual, weight, **LLAMA))
        MAPS[name](made[0], projections).sum()
    assert made[0].y.data_ptr() not in kept
    assert made[0].h.data_ptr() in kept
    tokens_by_hidden = [t for t in kept.values() if t.shape == (33, 64)]
    assert len(tokens_by_hidden) == (2 if norm == "sandwich" else 1)


def test_nothing_of_the_norm_is_kept_for_frozen_factors() -> None:
    p = projection(5, 6, 8)
    p.lora_A.requires_grad_(False)
    normed = rms_norm(torch.randn(3, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64), **LLAMA)
    assert saved_shapes(lambda: lora_fused(normed, [p])) == [(3, 8)]
    p.lora_A.requires_grad_(True)
    p.lora_B.requires_grad_(False)
    assert saved_shapes(lambda: lora_fused(normed, [p])) == [(3, 6), (3,), (6,), (5, 8)]


@pytest.mark.parametrize("overwritten", ["h", "weight"])
def test_overwriting_what_the_input_is_made_of_raises(overwritten: str) -> None:
    weight = torch.ones(6, dtype=torch.float64)
    normed = rms_norm(torch.randn(3, 6, dtype=torch.float64), weight, **LLAMA)
    y = lora_fused(normed, [projection(5, 6, 2)])
    getattr(normed, overwritten).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def plain_norm(
    x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0, cast_before_weight: bool = True
) -> Tensor:
    """The norm as transformers write it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = normed.to(x.dtype).to(wide.dtype) if cast_before_weight else normed
    return (normed * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


@pytest.mark.gpu
@RULES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [33, 600, 1500, 4096])
@pytest.mark.parametrize("name", MAPS)
def test_gradients_on_gpu(name: str, tokens: int, dtype: torch.dtype, rule: dict) -> None:
    """Up to 600 tokens dA and dB come from one launch, at 4096 v and dB from one pass, and dA of down from another."""
    hidden, inner = 1024, 12288
    kind = {"dtype": dtype, "factor_dtype": torch.float32, "device": "cuda", "scaling": 2.0}
    shapes = [(inner, hidden), (inner, hidden), *([] if name == "qkv" else [(hidden, inner)])]
    projections = [projection(*shape, 16, **kind) for shape in shapes]
    x = torch.randn(tokens, hidden, device="cuda").to(dtype).requires_grad_()
    weight = (1 + 0.3 * torch.randn(hidden, device="cuda")).to(dtype)
    wide_x, wide = x.detach().double().requires_grad_(), [widened_projection(p, dtype) for p in projections]

    def plain(x: Tensor, weight: Tensor, projections: Sequence[Projection]) -> Tensor:
        y = plain_norm(x, weight, **rule)
        if name == "qkv":
            return plain_fused(y, projections)
        return plain_mlp(y, projections[:-1], projections[-1], activation="silu")

    exact = plain(wide_x, weight.double(), wide)
    dy = torch.randn_like(exact).to(dtype)
    exact_grads = torch.autograd.grad(exact, leaves(wide_x, wide), dy.double())
    inputs = leaves(x, projections)
    eager_grads = torch.autograd.grad(plain(x, weight, projections), inputs, dy)
    ours = [torch.autograd.grad(MAPS[name](rms_norm(x, weight, **rule), projections), inputs, dy) for _ in range(2)]
    for leaf, first, again, eager, truth in zip(inputs, *ours, eager_grads, exact_grads, strict=True):
        assert_as_accurate_as_eager(first, eager, truth, what=f"gradient of shape {tuple(leaf.shape)}")
        assert torch.equal(first, again)
