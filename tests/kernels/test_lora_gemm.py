"""The matrix product with its LoRA term: every path against the eager twin and float64."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import lora_gemm, lora_gemm_eager
from slothcore.kernels.lora_gemm import HOPPER_TILE, Tile, choose_tile
from tests.numerics import assert_as_accurate_as_eager, widened

# Small enough that an interpreted program walks over several tiles and steps, with a partial one at each edge.
SMALL_TILE = Tile(rows=32, columns=32, inner=16, warps=4, stages=2)

H100 = {"capability_major": 9, "multiprocessors": 132}


def operands(rows: int, out: int, inner: int, rank: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """x, dy, W, and for each direction the LoRA pair, all with results of unit size."""

    def normal(*shape: int, summands: int = 1) -> Tensor:
        return (torch.randn(*shape, device=device) / summands**0.5).to(dtype)

    return {
        "x": normal(rows, inner),
        "dy": normal(rows, out),
        "weight": normal(out, inner, summands=inner),
        "lora_x": normal(rows, rank),
        "lora_B": normal(out, rank, summands=rank),
        "lora_A": normal(rank, inner, summands=rank),
        "bias": normal(out),
    }


def check_forward(t: dict[str, Tensor], path: Tile | str | None, *, lora: bool, bias: bool) -> None:
    """Writes into columns of a wider tensor, whose other columns must keep their NaN."""
    x, weight, u, B, b = t["x"], t["weight"], *(t[k] if lora else None for k in ("lora_x", "lora_B")), t["bias"]
    b = b if bias else None
    out = weight.shape[0]
    wide = torch.full((x.shape[0], out + 16), float("nan"), dtype=x.dtype, device=x.device)
    y = lora_gemm.linear_add(x, weight, lora_x=u, lora_B=B, bias=b, out=wide[:, 8:-8], _path=path)
    assert y.data_ptr() == wide[:, 8:].data_ptr()
    assert wide[:, :8].isnan().all()
    assert wide[:, -8:].isnan().all()
    eager = lora_gemm_eager.linear_add(x, weight, lora_x=u, lora_B=B, bias=b)
    x, weight, u, B, b = widened(x, weight, u, B, b)
    exact = lora_gemm_eager.linear_add(x, weight, lora_x=u, lora_B=B, bias=b)
    assert_as_accurate_as_eager(y, eager, exact, what="y")


def check_input_grad(t: dict[str, Tensor], path: Tile | str | None, *, lora: bool) -> None:
    dy, weight, v, A = t["dy"], t["weight"], *(t[k] if lora else None for k in ("lora_x", "lora_A"))
    dx = lora_gemm.linear_input_grad(dy, weight, lora_dy=v, lora_A=A, _path=path)
    eager = lora_gemm_eager.linear_input_grad(dy, weight, lora_dy=v, lora_A=A)
    dy, weight, v, A = widened(dy, weight, v, A)
    exact = lora_gemm_eager.linear_input_grad(dy, weight, lora_dy=v, lora_A=A)
    assert_as_accurate_as_eager(dx, eager, exact, what="dx")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_eager_is_the_written_equation(dtype: torch.dtype) -> None:
    t = operands(7, 10, 12, 4, dtype, "cpu")
    x, dy, weight, u, B, A, b = widened(*(t[k] for k in ("x", "dy", "weight", "lora_x", "lora_B", "lora_A", "bias")))
    y = lora_gemm_eager.linear_add(t["x"], t["weight"], lora_x=t["lora_x"], lora_B=t["lora_B"], bias=t["bias"])
    dx = lora_gemm_eager.linear_input_grad(t["dy"], t["weight"], lora_dy=t["lora_x"], lora_A=t["lora_A"])
    for actual, expected in ((y, x @ weight.T + u @ B.T + b), (dx, dy @ weight + u @ A)):
        assert actual.dtype == dtype
        # Two roundings of each element and those inside the sums.
        tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
        assert (actual.double() - expected).abs().max() <= tolerance


def test_eager_writes_into_columns() -> None:
    t = operands(5, 6, 8, 4, torch.float32, "cpu")
    wide = torch.zeros(5, 10)
    lora_gemm_eager.linear_add(t["x"], t["weight"], bias=t["bias"], out=wide[:, 2:8])
    torch.testing.assert_close(wide[:, 2:8], t["x"] @ t["weight"].T + t["bias"])
    assert not wide[:, :2].any()
    assert not wide[:, 8:].any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs for real: see the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "out", "inner", "rank"),
    [
        (1, 8, 16, 8),  # one partial tile, one step
        (33, 72, 40, 8),  # a last row alone in its tile; a partial step
        (70, 136, 64, 24),  # more tiles than programs; the LoRA term takes two steps, the second partial
    ],
)
def test_kernel_in_interpreter(nan_filled_empty, rows: int, out: int, inner: int, rank: int, dtype) -> None:
    t = operands(rows, out, inner, rank, dtype, "cpu")
    check_forward(t, SMALL_TILE, lora=True, bias=True)
    check_forward(t, SMALL_TILE, lora=False, bias=False)
    check_input_grad(t, SMALL_TILE, lora=True)
    check_input_grad(t, SMALL_TILE, lora=False)


def test_rule_takes_the_kernel_only_where_it_wins() -> None:
    bf16 = torch.bfloat16
    assert choose_tile(8192, 4096, dtype=bf16, **H100) == HOPPER_TILE
    assert choose_tile(513, 28672, dtype=torch.float16, **H100) == HOPPER_TILE
    assert choose_tile(512, 28672, dtype=torch.float16, **H100) is None, "the host would be late"
    assert choose_tile(1024, 2048, dtype=bf16, **H100) is None, "half of the multiprocessors would idle"
    assert choose_tile(8192, 4096, dtype=torch.float32, **H100) is None
    for other in (7, 8, 10, 12):
        assert choose_tile(8192, 4096, dtype=bf16, capability_major=other, multiprocessors=108) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "out", "inner", "rank"),
    [
        (1, 512, 256, 16),
        (33, 1024, 4096, 16),
        (513, 6144, 4096, 48),
        (2049, 4096, 14336, 8),
        (4095, 1000, 1048, 72),  # partial tiles in every dimension; the LoRA term takes two steps
    ],
)
@pytest.mark.parametrize("path", [HOPPER_TILE, HOPPER_TILE._replace(stages=4), "matmul", None])
def test_every_path_on_gpu(rows: int, out: int, inner: int, rank: int, dtype: torch.dtype, path) -> None:
    if isinstance(path, Tile) and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for Hopper")
    t = operands(rows, out, inner, rank, dtype, "cuda")
    check_forward(t, path, lora=True, bias=True)
    check_forward(t, path, lora=False, bias=False)
    check_input_grad(t, path, lora=True)
    check_input_grad(t, path, lora=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_that_the_copy_engine_cannot_read(dtype: torch.dtype) -> None:
    """Odd widths, unaligned starts and transposed operands must take the other path by themselves."""
    t = operands(2048, 4099, 4093, 5, dtype, "cuda")
    check_forward(t, None, lora=True, bias=True)
    check_input_grad(t, None, lora=True)
    t = operands(2048, 8192, 4096, 16, dtype, "cuda")
    t["weight"] = t["weight"].t().contiguous().t()
    t["lora_x"] = torch.cat([t["lora_x"], t["lora_x"]], dim=1)[:, 3:19]
    check_forward(t, None, lora=True, bias=False)
    check_input_grad(t, None, lora=True)
