"""Products of few rows with a large weight, against torch."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import dense_few, dense_few_eager
from tests.numerics import assert_as_accurate_as_eager


def operands(rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features) * 0.1
    return x.to(device, dtype), weight.to(device, dtype)


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("shape", [(300, 256), (130, 384), (7, 128)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_as_accurate_as_torch(rows: int, shape: tuple[int, int], kernel_device) -> None:
    x, weight = operands(rows, *shape, torch.float16, kernel_device)
    exact = x.double() @ weight.double().T
    assert_as_accurate_as_eager(dense_few.linear(x, weight), dense_few_eager.linear(x, weight), exact)


@pytest.mark.usefixtures("nan_filled_empty")
def test_reads_strided_rows_whose_bits_do_not_depend_on_the_others(kernel_device) -> None:
    x, weight = operands(5, 140, 256, torch.float16, kernel_device)
    wide = torch.full((5, 512), float("nan"), dtype=torch.float16, device=kernel_device)
    wide[:, 128:384] = x
    together = dense_few.linear(x, weight)
    assert torch.equal(dense_few.linear(wide[:, 128:384], weight), together)
    assert torch.equal(dense_few.linear(x[1:3], weight), together[1:3])


def test_takes_large_weights_and_few_rows(monkeypatch) -> None:
    """Everything but the kind of GPU."""
    monkeypatch.setattr(dense_few, "begins_early", lambda x: True)
    x, weight = torch.empty(16, 256, dtype=torch.float16), torch.empty(dense_few.FEWEST_OUTPUTS, 256).half()
    assert dense_few.takes(x, weight)
    assert dense_few.takes(x[:1], weight)
    assert not dense_few.takes(x[:0], weight)
    assert not dense_few.takes(x.repeat(2, 1), weight)
    assert not dense_few.takes(x, weight[1:])
    assert not dense_few.takes(x.bfloat16(), weight)
    assert not dense_few.takes(x.float(), weight.float())
    assert not dense_few.takes(x[:, :192], weight[:, :192].contiguous())
    assert not dense_few.takes(x, weight.T.contiguous().T)
    monkeypatch.undo()
    assert not dense_few.takes(x, weight), "a CPU has its own way"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("shape", [(128256, 4096), (151936, 3584), (32771, 2048), (40000, 8192)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_gpu_as_accurate_as_torch(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = operands(rows, *shape, dtype, "cuda")
    assert dense_few.takes(x, weight)
    exact = x.double() @ weight.double().T
    assert_as_accurate_as_eager(dense_few.linear(x, weight), dense_few_eager.linear(x, weight), exact)
