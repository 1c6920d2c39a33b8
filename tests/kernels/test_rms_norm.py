"""Widths that are no power of two, one row, and rows that do not fill a tile are where a row kernel goes wrong."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import launch, rms_norm, rms_norm_eager
from tests.numerics import assert_as_accurate_as_eager, widened

LLAMA = {"weight_offset": 0.0, "cast_before_weight": True}
GEMMA = {"weight_offset": 1.0, "cast_before_weight": False}
LLAMA_WITH_OFFSET = {"weight_offset": 0.5, "cast_before_weight": True}
RULES = pytest.mark.parametrize("rule", [LLAMA, GEMMA, LLAMA_WITH_OFFSET], ids=["llama", "gemma", "offset"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
ODD_SHAPES = pytest.mark.parametrize(("num_tokens", "width"), [(1, 64), (7, 37), (33, 80), (3, 2100)])
EPS = 1e-5


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Rows of very different size, so that an error in one row's scale cannot hide behind another's."""
    row_scale = torch.logspace(-2, 1, num_tokens)[:, None]
    tensors = {
        "x": row_scale * torch.randn(num_tokens, width),
        "residual": row_scale * torch.randn(num_tokens, width),
        "weight": 1 + 0.3 * torch.randn(width),
        "dy": torch.randn(num_tokens, width),
        "dh": torch.randn(num_tokens, width),
    }
    return {name: t.to(device, dtype) for name, t in tensors.items()}


def forward(ops: ModuleType, t: dict[str, Tensor], rule: dict, *, with_residual: bool) -> dict[str, Tensor]:
    residual = t["residual"] if with_residual else None
    y, rstd, h = ops.rms_norm_forward(t["x"], t["weight"], eps=EPS, residual=residual, **rule)
    return {"y": y, "rstd": rstd, "h": h}


def backward(ops: ModuleType, t: dict[str, Tensor], rule: dict, *, with_dh: bool) -> dict[str, Tensor]:
    """Backward at h = x, with the exact deviations of those rows."""
    rstd = (t["x"].double().square().mean(-1) + EPS).rsqrt()
    rstd = rstd if t["x"].dtype == torch.float64 else rstd.float()
    dh = t["dh"] if with_dh else None
    dx, dw = ops.rms_norm_backward(t["dy"], t["x"], t["weight"], rstd, dh=dh, weight_grad=True, **rule)
    return {"dx": dx, "dw": dw}


def check_against_eager(t: dict[str, Tensor], rule: dict, *, fused_stream: bool) -> None:
    exact_inputs = dict(zip(t, widened(*t.values()), strict=True))
    for run, option in ((forward, "with_residual"), (backward, "with_dh")):
        fused = run(rms_norm, t, rule, **{option: fused_stream})
        eager = run(rms_norm_eager, t, rule, **{option: fused_stream})
        exact = run(rms_norm_eager, exact_inputs, rule, **{option: fused_stream})
        for name in fused:
            assert fused[name].dtype == eager[name].dtype
            assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@ODD_SHAPES
@pytest.mark.parametrize("fused_stream", [False, True], ids=["alone", "residual"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(
    num_tokens: int, width: int, dtype: torch.dtype, rule: dict, fused_stream: bool, kernel_device: str
) -> None:
    check_against_eager(make_inputs(num_tokens, width, dtype, kernel_device), rule, fused_stream=fused_stream)


def check_again(ops: ModuleType, t: dict[str, Tensor], rule: dict) -> None:
    """y has the bits that forward gave it, from h in rows of any stride."""
    y, rstd, h = ops.rms_norm_forward(t["x"], t["weight"], eps=EPS, residual=t["residual"], **rule)
    apart = torch.cat([h, h], dim=1)[:, : h.shape[1]]
    for rows in (h, apart):
        again = ops.rms_norm_again(rows, t["weight"], rstd, **rule)
        assert again.is_contiguous()
        assert torch.equal(again, y)


@RULES
@DTYPES
@ODD_SHAPES
@pytest.mark.parametrize("ops", [rms_norm, rms_norm_eager], ids=["fused", "eager"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_the_output_is_made_again_to_the_bit(
    num_tokens: int, width: int, dtype: torch.dtype, rule: dict, ops: ModuleType, kernel_device: str
) -> None:
    check_again(ops, make_inputs(num_tokens, width, dtype, kernel_device), rule)


@pytest.mark.gpu
@RULES
@DTYPES
def test_the_output_is_made_again_to_the_bit_at_real_sizes(dtype: torch.dtype, rule: dict) -> None:
    check_again(rms_norm, make_inputs(1000, 4096, dtype, "cuda"), rule)


@ODD_SHAPES
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_in_bfloat16(num_tokens: int, width: int, kernel_device: str) -> None:
    """Triton's interpreter rounds bfloat16 toward zero, so only the rule that rounds once can be compared in it."""
    check_against_eager(make_inputs(num_tokens, width, torch.bfloat16, kernel_device), GEMMA, fused_stream=False)


@DTYPES
def test_eager_rounds_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    t = make_inputs(9, 48, dtype, "cpu")
    for reference, rule in ((LlamaRMSNorm(48, eps=EPS), LLAMA), (GemmaRMSNorm(48, eps=EPS), GEMMA)):
        reference.weight.data = t["weight"]
        y, _, h = rms_norm_eager.rms_norm_forward(t["x"], t["weight"], eps=EPS, residual=t["residual"], **rule)
        assert torch.equal(h, t["x"] + t["residual"])
        assert torch.equal(y, reference(h))


@RULES
def test_rounds_where_eager_does(rule: dict, kernel_device: str) -> None:
    """A rounding left out or moved would change a third of the results' last digit, and dw by a 16-bit error."""
    t = make_inputs(64, 80, torch.float16, kernel_device)
    fused, eager = (forward(ops, t, rule, with_residual=True) for ops in (rms_norm, rms_norm_eager))
    assert torch.equal(fused["h"], eager["h"])
    assert (fused["y"] == eager["y"]).float().mean() > 0.99
    fused, eager = (backward(ops, t, rule, with_dh=True) for ops in (rms_norm, rms_norm_eager))
    assert (fused["dx"] == eager["dx"]).float().mean() > 0.99
    torch.testing.assert_close(fused["dw"], eager["dw"], rtol=1e-5, atol=1e-5)


def test_strides_do_not_matter(kernel_device: str) -> None:
    """Row slices keep their stride, an expanded row has none; a strided last dimension is copied."""
    t = make_inputs(7, 37, torch.float32, kernel_device)
    t["dh"] = t["dh"][:1].expand(7, 37)
    strided = {
        "x": torch.cat([t["dy"], t["x"], t["dy"]], dim=1)[:, 37:74],
        "residual": t["residual"].T.contiguous().T,
        "weight": torch.stack([t["weight"], t["weight"]], dim=1)[:, 0],
        "dy": t["dy"].repeat_interleave(2, dim=0)[::2],
        "dh": t["dh"],
    }
    contiguous = {name: value.contiguous() for name, value in t.items()}
    for run in (
        lambda inputs: forward(rms_norm, inputs, LLAMA, with_residual=True),
        lambda inputs: backward(rms_norm, inputs, LLAMA, with_dh=True),
    ):
        expected = run(contiguous)
        for name, actual in run(strided).items():
            # Another alignment may sum a row in another order; a wrong address would be off by the values themselves.
            torch.testing.assert_close(actual, expected[name], rtol=2e-6, atol=2e-6)


def test_without_a_residual_h_is_the_input_itself(kernel_device: str) -> None:
    x = torch.randn(4, 6, device=kernel_device)
    for ops in (rms_norm, rms_norm_eager):
        assert ops.rms_norm_forward(x, x[0], eps=EPS)[2] is x


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("num_tokens", [1, 200, 256, 1601])
def test_weight_gradient_over_several_tiles_a_program(
    num_tokens: int, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three programs share the tiles of 64 rows, evenly or not."""
    monkeypatch.setattr(rms_norm, "REDUCTION_PROGRAMS", 3)
    t = make_inputs(num_tokens, 24, torch.float32, kernel_device)
    check_against_eager(t, LLAMA, fused_stream=True)
    first, second = (backward(rms_norm, t, LLAMA, with_dh=True) for _ in range(2))
    assert torch.equal(first["dw"], second["dw"])


def test_frozen_weight_gets_no_gradient_work(kernel_device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial sums of dw are all that backward allocates in float32 beside a 16-bit dx."""
    t = make_inputs(5, 16, torch.float16, kernel_device)
    rstd = torch.ones(5, device=kernel_device)
    allocated = []
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *args, **kw: allocated.append(kw.get("dtype")) or new_empty(*args, **kw)
    )
    expected_dx, dw = rms_norm.rms_norm_backward(t["dy"], t["x"], t["weight"], rstd, weight_grad=True)
    assert dw is not None
    assert torch.float32 in allocated
    allocated.clear()
    for ops in (rms_norm, rms_norm_eager):
        dx, dw = ops.rms_norm_backward(t["dy"], t["x"], t["weight"], rstd)
        assert dw is None
        torch.testing.assert_close(dx, expected_dx)
    assert torch.float32 not in allocated


def test_no_tokens(kernel_device: str) -> None:
    x = torch.empty(0, 8, device=kernel_device)
    weight = torch.ones(8, device=kernel_device)
    y, rstd, _ = rms_norm.rms_norm_forward(x, weight, eps=EPS)
    dx, dw = rms_norm.rms_norm_backward(y, x, weight, rstd, weight_grad=True)
    assert y.shape == dx.shape == (0, 8)
    assert torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.parametrize("width", [1, 37, 128, 896, 2048, 3072, 4096, 5120, 8192, 16384])
def test_tiles_cover_a_row(width: int) -> None:
    tile = launch.whole_row_tile(width)
    assert tile.columns // 2 < width <= tile.columns
    # A block may have 1024 threads; a thread should hold at least one 16-byte load and not spill.
    assert 1 <= tile.warps <= 32
    assert 8 <= tile.rows * tile.columns / (32 * tile.warps) <= 16


@pytest.mark.gpu
@RULES
@DTYPES
@pytest.mark.parametrize(("num_tokens", "width"), [(8192, 4096), (1, 4096), (33, 5120), (65, 16384), (40000, 128)])
@pytest.mark.parametrize("fused_stream", [False, True], ids=["alone", "residual"])
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_at_real_sizes(
    num_tokens: int, width: int, dtype: torch.dtype, rule: dict, fused_stream: bool
) -> None:
    check_against_eager(make_inputs(num_tokens, width, dtype, "cuda"), rule, fused_stream=fused_stream)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """The last of four rows starts at element 3 * 2^30."""
    t = make_inputs(4, 64, torch.float16, "cuda")
    far = torch.empty(3 * 2**30 + 64, dtype=torch.float16, device="cuda").as_strided((4, 64), (2**30, 1))
    far.copy_(t["x"])
    strided = t | {"x": far}
    for expected, actual in (
        (forward(rms_norm, t, LLAMA, with_residual=True), forward(rms_norm, strided, LLAMA, with_residual=True)),
        (backward(rms_norm, t, LLAMA, with_dh=True), backward(rms_norm, strided, LLAMA, with_dh=True)),
    ):
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
