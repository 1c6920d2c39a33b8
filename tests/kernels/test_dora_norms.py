"""Odd sizes, ranks that take several steps, rows that begin inside a block of NF4, and rows that vanish."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import dora_norms, dora_norms_eager, nf4, nf4_eager
from slothcore.kernels.dora_norms import Tile
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
OPS = pytest.mark.parametrize("ops", [dora_norms, dora_norms_eager], ids=["fused", "eager"])
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def make_operands(rows: int, columns: int, rank: int, dtype: torch.dtype, device: str) -> Operands:
    """W, A, B and m; B A is as large as W."""
    shapes = (rows, columns), (rank, columns), (rows, rank), (rows,)
    weight, A, B, magnitude = (torch.randn(shape) for shape in shapes)
    B /= rank**0.5
    return weight.to(device, dtype), A.to(device, dtype), B.to(device, dtype), (magnitude.abs() + 0.5).to(device)


def quantised(weight: Tensor, *, double_quant: bool = True) -> Nf4Tensor:
    return (nf4 if weight.is_cuda else nf4_eager).nf4_quantize(weight, double_quant=double_quant)


def check(weight: Tensor | Nf4Tensor, A: Tensor, B: Tensor, m: Tensor, *, tile: Tile | None = None) -> None:
    """Norms and scales are as near to float64 as eager's; `weight` is decoded for float64 as it is for all."""
    norm, scale = dora_norms.row_norms(weight, A, B, factor=0.75, magnitude=m, _tile=tile)
    eager_norm, eager_scale = dora_norms_eager.row_norms(weight, A, B, factor=0.75, magnitude=m)
    wide = weight if isinstance(weight, Nf4Tensor) else weight.double()
    exact_norm, exact_scale = dora_norms_eager.row_norms(wide, A.double(), B.double(), factor=0.75, magnitude=m)
    assert norm.dtype == scale.dtype == torch.float32
    assert_as_accurate_as_eager(norm, eager_norm, exact_norm, what="norms")
    assert_as_accurate_as_eager(scale, eager_scale, exact_scale, what="scales")


@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 1), (7, 37, 3), (33, 200, 16), (17, 130, 70)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_dense_weights(size: tuple[int, int, int], dtype: torch.dtype, kernel_device: str) -> None:
    check(*make_operands(*size, dtype, kernel_device))


@DTYPES
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("size", [(1, 64, 1), (7, 37, 3), (33, 192, 16), (17, 96, 40)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_nf4_weights(size: tuple[int, int, int], double_quant: bool, dtype: torch.dtype, kernel_device: str) -> None:
    weight, *others = make_operands(*size, dtype, kernel_device)
    check(quantised(weight, double_quant=double_quant), *others)


@DTYPES
@pytest.mark.usefixtures("nan_filled_empty")
def test_the_tall_tile_gives_the_same(dtype: torch.dtype, kernel_device: str) -> None:
    weight, *others = make_operands(45, 320, 8, dtype, kernel_device)
    tile = dora_norms.choose_tile(4096, 16, itemsize=2)
    others_rows = [
        dora_norms.choose_tile(*sizes, itemsize=b).rows for *sizes, b in ((1024, 16, 2), (4096, 64, 2), (4096, 16, 4))
    ]
    assert all(tile.rows > rows for rows in others_rows)
    check(weight, *others, tile=tile)
    check(quantised(weight), *others, tile=tile)


@OPS
def test_factors_may_be_parts_of_joined_ones_and_results_too(ops, kernel_device: str) -> None:
    """As a group has them: columns of a wider B, rows of a longer A, a part of the vectors of all."""
    weight, A, B, m = make_operands(9, 40, 16, torch.float32, kernel_device)
    expected = ops.row_norms(weight, A[3:8].contiguous(), B[:, 3:8].contiguous(), magnitude=m)
    norms, scales = torch.full((2, 20), 7.0, device=kernel_device)
    ops.row_norms(weight, A[3:8], B[:, 3:8], magnitude=m, out=(norms[5:14], scales[5:14]))
    for actual, part in zip((norms, scales), expected, strict=True):
        assert torch.equal(actual[5:14], part)
        assert (actual[:5] == 7).all()
        assert (actual[14:] == 7).all()


@OPS
def test_without_magnitudes_there_are_norms_alone(ops, kernel_device: str) -> None:
    weight, A, B, _ = make_operands(9, 40, 8, torch.float32, kernel_device)
    norms, scales = ops.row_norms(weight, A, B)
    assert scales is None
    assert torch.allclose(norms, torch.linalg.norm(weight + B @ A, dim=1))


@OPS
def test_a_sum_that_cancels_keeps_its_digits(ops, kernel_device: str) -> None:
    """B A is -W but for a millionth; the expansion of the square would leave nothing of it in float32."""
    _, A, B, _ = make_operands(8, 64, 8, torch.float32, kernel_device)
    weight = -(B.double() @ A.double()) * (1 - 1e-3)
    norms, _ = ops.row_norms(weight.float(), A, B)
    exact = torch.linalg.norm(weight.float().double() + B.double() @ A.double(), dim=1)
    assert ((norms - exact) / exact).abs().max() < 1e-3


@OPS
def test_a_row_of_zeros_has_a_scale(ops, kernel_device: str) -> None:
    weight, A, B, _ = make_operands(3, 64, 8, torch.float32, kernel_device)
    weight[1], B[1] = 0.0, 0.0
    norms, _ = ops.row_norms(weight, A, B)
    magnitude = norms.clone()
    magnitude[1] = 0.0
    _, scales = ops.row_norms(weight, A, B, magnitude=magnitude)
    assert scales.tolist() == [1.0, 0.0, 1.0]
    assert ops.row_norms(weight, A, B, magnitude=norms)[1].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(1024, 4096, 16), (14336, 4096, 16), (4096, 14336, 64), (4096, 11008, 256)], ids=str)
@pytest.mark.usefixtures("nan_filled_empty")
def test_real_sizes_on_a_gpu(size: tuple[int, int, int], dtype: torch.dtype, bits: int) -> None:
    weight, *others = make_operands(*size, dtype, "cuda")
    check(quantised(weight) if bits == 4 else weight, *others)
