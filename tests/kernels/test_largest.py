"""The index of the largest number of a row: ties, infinities, NaN, rows of every length."""

import pytest
import torch

from slothcore.kernels import largest, largest_eager

BOTH = pytest.mark.parametrize("ops", [largest, largest_eager], ids=["fused", "eager"])


@pytest.mark.parametrize("columns", [1, 37, 64, 1000])
@pytest.mark.usefixtures("nan_filled_empty")
def test_is_that_of_torch(columns: int, kernel_device, monkeypatch) -> None:
    """Of few different numbers, so that most rows have ties; by steps of fewer columns than a row has."""
    monkeypatch.setattr(largest, "COLUMNS", 64)
    for dtype in (torch.float32, torch.float16):
        x = torch.randint(-3, 4, (9, columns)).to(kernel_device, dtype)
        x[0] = -float("inf")
        x[1, columns // 2] = float("inf")
        assert torch.equal(largest.largest(x), largest_eager.largest(x))
        wide = torch.cat([x + 10, x, x + 10], dim=1)
        assert torch.equal(largest.largest(wide[:, columns : 2 * columns]), largest_eager.largest(x))


@BOTH
def test_a_nan_is_found(ops, kernel_device) -> None:
    x = torch.zeros(2, 100, device=kernel_device)
    x[1, 70] = float("nan")
    assert ops.largest(x).tolist() == [0, 70]
    assert ops.largest(x[:0]).shape == (0,)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [128256, 151936, 262208, 999])
@pytest.mark.usefixtures("nan_filled_empty")
def test_gpu_is_that_of_torch(columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(16, columns, device="cuda", dtype=dtype)
    assert torch.equal(largest.largest(x), x.argmax(-1))
