"""Widths that are no power of two, several shares of the rows, and strided inputs."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from slothcore.kernels import dora_scale, dora_scale_eager
from slothcore.kernels.dora_scale import StripTile
from tests.numerics import assert_as_accurate_as_eager, widened

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
OPS = pytest.mark.parametrize("ops", [dora_scale, dora_scale_eager], ids=["fused", "eager"])


def make_inputs(num_tokens: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, z, the scales and a bias; dy and z are windows into wider tensors."""
    dy, z = (torch.randn(num_tokens, width + 3).to(device, dtype)[:, 1 : width + 1] for _ in range(2))
    return dy, z, (torch.rand(width) + 0.5).to(device), torch.randn(width).to(device, dtype)


def run(ops: ModuleType, dy: Tensor, z: Tensor, scale: Tensor, bias: Tensor) -> dict[str, Tensor]:
    dz, dc = ops.scale_columns_backward(dy, scale, z)
    y, plain = ops.scale_columns(z, scale, bias), ops.scale_columns(z, scale)
    return {"y": y, "y without a bias": plain, "dz": dz, "dc": dc}


def check(*inputs: Tensor) -> None:
    fused, eager, exact = (
        run(dora_scale, *inputs),
        run(dora_scale_eager, *inputs),
        run(dora_scale_eager, *widened(*inputs)),
    )
    for name in fused:
        assert fused[name].dtype == (torch.float32 if name == "dc" else inputs[0].dtype)
        assert_as_accurate_as_eager(fused[name], eager[name], exact[name], what=name)


@DTYPES
@pytest.mark.parametrize("size", [(1, 64), (7, 37), (33, 300), (70, 2100)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(size: tuple[int, int], dtype: torch.dtype, kernel_device: str) -> None:
    check(*make_inputs(*size, dtype, kernel_device))


@OPS
@pytest.mark.usefixtures("nan_filled_empty")
def test_what_is_not_wanted_is_not_made(ops: ModuleType, kernel_device: str) -> None:
    dy, z, scale, _ = make_inputs(9, 20, torch.float32, kernel_device)
    dz, dc = ops.scale_columns_backward(dy, scale, z)
    only_dz = ops.scale_columns_backward(dy, scale, None)
    only_dc = ops.scale_columns_backward(dy, scale, z, grad=False)
    assert only_dz[1] is None
    assert only_dc[0] is None
    assert torch.equal(only_dz[0], dz)
    assert torch.equal(only_dc[1], dc)


@pytest.mark.usefixtures("nan_filled_empty")
def test_sums_over_every_number_of_shares(kernel_device: str) -> None:
    """Rows that fill the last share, leave it half empty, and leave none for it."""
    for num_tokens in (1, 16, 17, 64, 65):
        dy, z, scale, _ = make_inputs(num_tokens, 10, torch.float32, kernel_device)
        tile = StripTile(rows=4, columns=16, warps=1)
        _, dc = dora_scale.scale_columns_backward(dy, scale, z, _tile=tile)
        assert torch.allclose(dc, (dy * z).sum(0), atol=1e-5)
    assert dora_scale.shares_of(1, 1, 16) == 1
    assert dora_scale.shares_of(8192, 112, 16) == 4
    assert dora_scale.shares_of(8192, 10_000, 16) == 1


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("size", [(1, 4096), (517, 6144), (8192, 4096)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_real_sizes_on_a_gpu(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(*make_inputs(*size, dtype, "cuda"))
