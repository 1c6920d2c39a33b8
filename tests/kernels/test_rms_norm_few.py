"""RMSNorm of few rows with the inputs of the LoRA terms behind it: the bits of the two operations apart."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import nf4_few, rms_norm, rms_norm_few, rms_norm_few_eager
from tests.kernels.test_rms_norm import DTYPES, EPS, GEMMA, LLAMA, RULES, make_inputs
from tests.numerics import assert_as_accurate_as_eager, widened

RANKS = {"one factor": (5,), "one without": (3, 0, 6), "three": (1, 2, 8)}


def factors(ranks: tuple[int, ...], width: int, dtype: torch.dtype, device: str) -> list[Tensor | None]:
    return [torch.randn(r, width).to(device, dtype) * 0.1 if r else None for r in ranks]


def rounded(lora_A: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """In float64, as the operation sees them."""
    return [None if A is None else A.to(dtype).double() for A in lora_A]


def check(t: dict[str, Tensor], lora_A: list[Tensor | None], rule: dict, *, with_residual: bool) -> None:
    x, weight, residual = t["x"], t["weight"], t["residual"] if with_residual else None
    together = rms_norm_few.rms_norm_input(x, weight, lora_A, eps=EPS, residual=residual, **rule)
    apart = rms_norm.rms_norm_forward(x, weight, eps=EPS, residual=residual, **rule)
    u = nf4_few.lora_input(apart[0], lora_A)
    for name, one, other in zip(("y", "rstd", "h", "u"), together, (*apart, u), strict=True):
        assert torch.equal(one, other), name
    eager = rms_norm_few_eager.rms_norm_input(x, weight, lora_A, eps=EPS, residual=residual, **rule)
    x, weight, residual = widened(x, weight, residual)
    exact = rms_norm_few_eager.rms_norm_input(
        x, weight, rounded(lora_A, t["x"].dtype), eps=EPS, residual=residual, **rule
    )
    for name, *results in zip(("y", "rstd", "h", "u"), together, eager, exact, strict=True):
        assert_as_accurate_as_eager(*results, what=name)


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_bits_of_norm_and_input_apart(kernel_device, nan_filled_empty, rows, ranks, dtype, rule, with_residual) -> None:
    lora_A = factors(ranks, 1100, torch.float32, kernel_device)
    check(make_inputs(rows, 1100, dtype, kernel_device), lora_A, rule, with_residual=with_residual)


def test_reads_strided_rows(kernel_device, nan_filled_empty) -> None:
    t = make_inputs(5, 1100, torch.float16, kernel_device)
    lora_A = factors((4, 3), 1100, torch.float16, kernel_device)
    wide = {
        name: torch.full((5, 2200), float("nan"), dtype=t[name].dtype).to(kernel_device) for name in ("x", "residual")
    }
    for name, tensor in wide.items():
        tensor[:, 550:1650] = t[name]
    views = {name: tensor[:, 550:1650] for name, tensor in wide.items()}
    expected = rms_norm_few.rms_norm_input(t["x"], t["weight"], lora_A, eps=EPS, residual=t["residual"])
    actual = rms_norm_few.rms_norm_input(views["x"], t["weight"], lora_A, eps=EPS, residual=views["residual"])
    assert all(map(torch.equal, actual, expected))


def test_bits_of_a_row_do_not_depend_on_the_others(kernel_device, nan_filled_empty) -> None:
    """Nor on how many ranks a program has."""
    t = make_inputs(9, 1100, torch.float16, kernel_device)
    lora_A = factors((5, 6), 1100, torch.float16, kernel_device)
    x, residual = t["x"], t["residual"]
    together = rms_norm_few.rms_norm_input(x, t["weight"], lora_A, eps=EPS, residual=residual)
    alone = rms_norm_few.rms_norm_input(x[7:8], t["weight"], lora_A, eps=EPS, residual=residual[7:8])
    assert all(torch.equal(one, all_rows[7:8]) for one, all_rows in zip(alone, together, strict=True))


def test_takes_widths_whose_bits_are_those_of_the_norm() -> None:
    lora_A = [torch.zeros(4, 1), None]
    assert rms_norm_few.takes(torch.zeros(1, 4096), lora_A)
    assert rms_norm_few.takes(torch.zeros(rms_norm_few.MOST_ROWS, rms_norm_few.NARROWEST), lora_A)
    assert not rms_norm_few.takes(torch.zeros(rms_norm_few.MOST_ROWS + 1, 4096), lora_A)
    assert not rms_norm_few.takes(torch.zeros(0, 4096), lora_A)
    assert not rms_norm_few.takes(torch.zeros(1, rms_norm_few.NARROWEST - 1), lora_A)
    assert not rms_norm_few.takes(torch.zeros(1, rms_norm_few.WIDEST + 1), lora_A)
    assert not rms_norm_few.takes(torch.zeros(1, 4096), [None, None])


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("rule", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("width", [1536, 2048, 3584, 4096, 5120, 8192])
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_gpu_bits_of_norm_and_input_apart(nan_filled_empty, rows, width, dtype, rule, with_residual) -> None:
    for factor_dtype in (torch.float32, dtype):
        lora_A = factors((16, 0, 8), width, factor_dtype, "cuda")
        check(make_inputs(rows, width, dtype, "cuda"), lora_A, rule, with_residual=with_residual)
