"""Widths that are no power of two, one row, and rows that do not fill a tile are where a row kernel goes wrong."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import sandwich_norm, sandwich_norm_eager
from tests.numerics import assert_as_accurate_as_eager, widened

GEMMA = {"weight_offset": 1.0, "cast_before_weight": False}
LLAMA = {"weight_offset": 0.0, "cast_before_weight": True}
RULES = pytest.mark.parametrize("rule", [GEMMA, LLAMA], ids=["gemma", "llama"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ODD_SHAPES = pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (7, 37), (33, 80), (3, 2100)])
EPS = 1e-5


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Rows of very different size; what the post norm gives has the size of one, and so meets a small or large row."""
    row_scale = torch.logspace(-1, 1, num_tokens, device=device)[:, None]
    tensors = {
        "branch": row_scale * torch.randn(num_tokens, width, device=device),
        "residual": row_scale.flip(0) * torch.randn(num_tokens, width, device=device),
        "post_weight": 1 + 0.3 * torch.randn(width, device=device),
        "pre_weight": 1 + 0.3 * torch.randn(width, device=device),
        "dy": torch.randn(num_tokens, width, device=device),
        "dh": torch.randn(num_tokens, width, device=device),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def forward(ops: ModuleType, t: dict[str, Tensor], rule: dict) -> dict[str, Tensor]:
    names = ("branch", "residual", "post_weight", "pre_weight")
    results = ops.sandwich_norm_forward(*(t[name] for name in names), eps=EPS, **rule)
    return dict(zip(("y", "h", "post_rstd", "pre_rstd"), results, strict=True))


def backward(ops: ModuleType, t: dict[str, Tensor], rule: dict, *, with_dh: bool = True) -> dict[str, Tensor]:
    """Backward where the sum h is the given residual, with the exact deviations of those rows.

    The branch's gradient has the size of its r, so it is measured in units of that.
    """
    post_rstd, pre_rstd = ((t[name].double().square().mean(-1) + EPS).rsqrt() for name in ("branch", "residual"))
    if t["branch"].dtype != torch.float64:
        post_rstd, pre_rstd = post_rstd.float(), pre_rstd.float()
    d_branch, d_residual, dw = ops.sandwich_norm_backward(
        t["dy"],
        t["dh"] if with_dh else None,
        t["branch"],
        t["residual"],
        t["post_weight"],
        t["pre_weight"],
        post_rstd,
        pre_rstd,
        weight_grad=True,
        **rule,
    )
    d_branch = d_branch.to(post_rstd.dtype) / post_rstd[:, None]
    return {"d_branch": d_branch, "d_residual": d_residual, "post_dw": dw[0], "pre_dw": dw[1]}


def check_against_eager(t: dict[str, Tensor], rule: dict, *, with_dh: bool = True) -> None:
    exact_inputs = dict(zip(t, widened(*t.values()), strict=True))
    for run, options in ((forward, {}), (backward, {"with_dh": with_dh})):
        fused, eager, exact = (
            run(ops, inputs, rule, **options)
            for ops, inputs in (
                (sandwich_norm, t),
                (sandwich_norm_eager, t),
                (sandwich_norm_eager, exact_inputs),
            )
        )
        for name in fused:
            assert fused[name].dtype == eager[name].dtype
            assert eager[name].isfinite().all(), f"{name}: eager overflows, so that anything would pass"
            assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@ODD_SHAPES
@pytest.mark.parametrize("with_dh", [False, True], ids=["alone", "stream"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(
    num_tokens: int, width: int, dtype: torch.dtype, rule: dict, with_dh: bool, kernel_device: str
) -> None:
    check_against_eager(make_inputs(num_tokens, width, dtype, kernel_device), rule, with_dh=with_dh)


@DTYPES
def test_eager_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    t = make_inputs(9, 48, dtype, "cpu")
    for norm, rule in ((Gemma3RMSNorm, GEMMA), (LlamaRMSNorm, LLAMA)):
        post, pre = norm(48, eps=EPS), norm(48, eps=EPS)
        post.weight.data, pre.weight.data = t["post_weight"], t["pre_weight"]
        hidden = t["residual"] + post(t["branch"])
        result = forward(sandwich_norm_eager, t, rule)
        assert torch.equal(result["h"], hidden)
        assert torch.equal(result["y"], pre(hidden))


@RULES
def test_rounds_where_eager_does(rule: dict, kernel_device: str) -> None:
    """A rounding left out or moved would change a third of the results' last digit, and dw by a 16-bit error."""
    t = make_inputs(64, 80, torch.float16, kernel_device)
    fused, eager = (forward(ops, t, rule) for ops in (sandwich_norm, sandwich_norm_eager))
    for name in ("h", "y"):
        assert (fused[name] == eager[name]).float().mean() > 0.99, name
    fused, eager = (backward(ops, t, rule) for ops in (sandwich_norm, sandwich_norm_eager))
    assert (fused["d_residual"] == eager["d_residual"]).float().mean() > 0.99
    torch.testing.assert_close(fused["pre_dw"], eager["pre_dw"], rtol=1e-5, atol=1e-5)
    # Eager also rounds the gradient between the norms; without dy it is dh, which is round already.
    t["dy"].zero_()
    fused, eager = (backward(ops, t, rule) for ops in (sandwich_norm, sandwich_norm_eager))
    assert (fused["d_branch"] == eager["d_branch"]).float().mean() > 0.99
    torch.testing.assert_close(fused["post_dw"], eager["post_dw"], rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter(kernel_device: str) -> None:
    """Row slices keep their stride, an expanded row has none; a strided last dimension is copied."""
    t = make_inputs(7, 37, torch.float32, kernel_device)
    t["dh"] = t["dh"][:1].expand(7, 37)
    strided = {
        "branch": torch.cat([t["dy"], t["branch"], t["dy"]], dim=1)[:, 37:74],
        "residual": t["residual"].T.contiguous().T,
        "post_weight": torch.stack([t["post_weight"], t["pre_weight"]], dim=1)[:, 0],
        "pre_weight": torch.stack([t["post_weight"], t["pre_weight"]], dim=1)[:, 1],
        "dy": t["dy"].repeat_interleave(2, dim=0)[::2],
        "dh": t["dh"],
    }
    contiguous = {name: value.contiguous() for name, value in t.items()}
    for run in (forward, backward):
        expected = run(sandwich_norm, contiguous, GEMMA)
        for name, actual in run(sandwich_norm, strided, GEMMA).items():
            # Another alignment may sum a row in another order; a wrong address would be off by the values themselves.
            torch.testing.assert_close(actual, expected[name], rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_tokens", [1, 200, 256, 1601])
def test_weight_gradients_over_several_tiles_a_program(
    num_tokens: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three programs share the tiles of 64 rows, evenly or not."""
    monkeypatch.setattr(sandwich_norm, "REDUCTION_PROGRAMS", 3)
    t = make_inputs(num_tokens, 24, torch.float32, kernel_device)
    check_against_eager(t, LLAMA)
    first, second = (backward(sandwich_norm, t, LLAMA) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("ops", [sandwich_norm, sandwich_norm_eager], ids=["fused", "eager"])
def test_frozen_weights_get_no_gradient(ops: ModuleType, kernel_device: str) -> None:
    t = make_inputs(3, 16, torch.float32, kernel_device)
    weights = (t["post_weight"], t["pre_weight"])
    _, h, post_rstd, pre_rstd = ops.sandwich_norm_forward(t["branch"], t["residual"], *weights, eps=EPS)
    assert ops.sandwich_norm_backward(t["dy"], None, t["branch"], h, *weights, post_rstd, pre_rstd)[2] is None


@pytest.mark.gpu
@DTYPES
@RULES
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 2304), (33, 5376), (8192, 2560), (2048, 3840)])
@pytest.mark.parametrize("with_dh", [False, True], ids=["alone", "stream"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_at_real_sizes(
    num_tokens: int, width: int, dtype: torch.dtype, rule: dict, with_dh: bool
) -> None:
    check_against_eager(make_inputs(num_tokens, width, dtype, "cuda"), rule, with_dh=with_dh)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last of four rows starts at element 3 * 2^30."""
    t = make_inputs(4, 64, torch.float16, "cuda")
    memory = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device="cuda").as_strided((4, 64), (2**30, 1))
    strided = t | {"branch": memory.copy_(t["branch"])}
    for run in (forward, backward):
        expected = run(sandwich_norm, t, GEMMA)
        for name, actual in run(sandwich_norm, strided, GEMMA).items():
            assert torch.equal(actual, expected[name]), name
