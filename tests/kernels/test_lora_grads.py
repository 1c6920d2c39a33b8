"""Gradients of LoRA factors: v and dB from one read of dy, and the joined gradients taken apart."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slothcore.kernels import lora_grads, lora_grads_eager
from slothcore.kernels.lora_factors_eager import padded_rank
from slothcore.kernels.lora_grads import Tile, one_pass_pays, takes_one_pass
from slothcore.kernels.lora_grads_eager import ColumnScale
from tests.numerics import assert_as_accurate_as_eager, widened

OPS = pytest.mark.parametrize("ops", [lora_grads, lora_grads_eager], ids=["fused", "eager"])

# Small enough that a program walks over several tiles of rows, the last of them partial.
SMALL_TILE = Tile(rows=16, columns=32, warps=4, stages=2)


def block_diagonal(out_features: Sequence[int], rank: int) -> Tensor:
    """B of projections of one rank, float32."""
    return torch.block_diag(*(torch.randn(n, rank) / rank**0.5 for n in out_features))


def operands(
    tokens: int, out_features: Sequence[int], rank: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, B and u."""
    dy = torch.randn(tokens, sum(out_features))
    u = torch.randn(tokens, len(out_features) * rank)
    return dy.to(device, dtype), block_diagonal(out_features, rank).to(device, dtype), u.to(device, dtype)


def check_one_pass(operands: Sequence[Tensor], out_features: Sequence[int], rank: int, **options: Tile) -> None:
    """v and each diagonal block of dB beside two products, and the same bits once more."""
    layout = {"out_features": out_features, "ranks": [rank] * len(out_features)}
    v, dB = lora_grads.v_and_dB(*operands, **layout, **options)
    assert v.dtype == operands[0].dtype
    assert dB.dtype == torch.float32
    eager_v, eager_dB = lora_grads_eager.v_and_dB(*operands, **layout)
    exact_v, exact_dB = lora_grads_eager.v_and_dB(*widened(*operands), **layout)
    assert_as_accurate_as_eager(v, eager_v, exact_v, what="v")
    again_v, again_dB = lora_grads.v_and_dB(*operands, **layout, **options)
    assert torch.equal(v, again_v)
    row = 0
    for i, rows in enumerate(out_features):
        block = slice(row, row + rows), slice(i * rank, (i + 1) * rank)
        assert_as_accurate_as_eager(dB[block], eager_dB[block], exact_dB[block], what=f"dB of projection {i}")
        assert torch.equal(dB[block], again_dB[block])
        row += rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs for real: see the gpu tests")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "out_features", "rank"),
    [(1, (32,), 16), (7, (32, 96), 8), (33, (64, 64), 16), (70, (96, 32, 64), 32)],
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_one_pass_in_interpreter(tokens: int, out_features: Sequence[int], rank: int, dtype: torch.dtype) -> None:
    dy, B, u = operands(tokens, out_features, rank, dtype, "cpu")
    check_one_pass((dy, B, u), out_features, rank, _tile=SMALL_TILE)
    wide = torch.full((tokens, dy.shape[1] + 16), float("nan"), dtype=dtype)
    wide[:, 8:-8] = dy
    check_one_pass((wide[:, 8:-8], B, u), out_features, rank, _tile=SMALL_TILE)


def test_one_pass_is_taken_only_where_it_wins() -> None:
    assert one_pass_pays(8192, 28672)
    assert one_pass_pays(4096, 24576)
    assert not one_pass_pays(4095, 28672), "the launches cost more"
    assert not one_pass_pays(8192, 6144), "q, k and v of an 8B model: 24 programs"
    assert one_pass_pays(8192, 16384)
    assert not one_pass_pays(65536, 16128), "63 programs"


@pytest.mark.gpu
def test_one_pass_is_not_taken_for_what_it_cannot_do() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the pass is for Hopper")
    out, kind = (12288, 12288), {"dtype": torch.bfloat16, "device": "cuda"}
    dy, B, u = torch.zeros(4096, 24576, **kind), torch.zeros(24576, 32, **kind), torch.zeros(4096, 32, **kind)
    layout = {"out_features": out, "ranks": (16, 16)}
    assert takes_one_pass(dy, B, u, **layout)
    assert not takes_one_pass(dy, B, u, out_features=out, ranks=(16, 8))
    assert not takes_one_pass(dy, B, u, out_features=out, ranks=(64, 64))
    assert not takes_one_pass(dy, B, u, out_features=(12160, 12416), ranks=(16, 16)), "a strip with both in it"
    assert not takes_one_pass(dy.float(), B.float(), u.float(), **layout)
    assert not takes_one_pass(dy[:1].expand(4096, -1), B, u, **layout), "the gradient of a sum over tokens"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 16, 32])
@pytest.mark.parametrize(
    ("tokens", "out_features"), [(4096, (14336, 14336)), (4100, (28672,)), (513, (4096, 1024, 1024))]
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_one_pass_at_real_sizes(tokens: int, out_features: Sequence[int], rank: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the pass is for Hopper")
    check_one_pass(operands(tokens, out_features, rank, dtype, "cuda"), out_features, rank)


# (out_features, ranks)
GROUPS = {
    "one": ((40,), (16,)),
    "one, padded": ((33,), (5,)),
    "two": ((40, 24), (16, 16)),
    "three of different ranks": ((7, 65, 1), (3, 16, 9)),
    "three, one missing": ((40, 24, 24), (16, 0, 4)),
    "three, only the last": ((5, 6, 7), (0, 0, 1)),
    "four": ((40, 24, 8, 8), (16, 0, 4, 8)),
}
WIDTH = 70


def check_apart(ops, group: tuple[Sequence[int], Sequence[int]], dtype: torch.dtype, device: str, width: int) -> None:
    """Every element has the bits of one product; what stands beside the blocks is never seen."""
    out_features, ranks = group
    scalings = [2.0, 0.3, 1.0, 0.7][: len(ranks)]
    padded = sum(map(padded_rank, ranks))
    every_A = torch.randn(padded, width, dtype=dtype, device=device)
    every_B = torch.full((sum(out_features), padded), float("nan"), dtype=dtype, device=device)
    row = column = 0
    for rows, rank in zip(out_features, ranks, strict=True):
        every_B[row : row + rows, column : column + rank].normal_()
        row, column = row + rows, column + padded_rank(rank)
    scale = ColumnScale(torch.randn(width, dtype=torch.float16, device=device), 1.0)
    layout = {"out_features": out_features, "ranks": ranks, "scalings": scalings}
    factor = scale.weight.to(dtype) + scale.offset
    for dA, dB, s in (
        (every_A, every_B, scale), (every_A, every_B, None), (every_A, None, scale), (None, every_B, None)
    ):  # fmt: skip
        got_A, got_B = ops.grads_apart(None if dA is None else dA.clone(), dB, scale=s, **layout)
        row = column = 0
        for i, (rows, rank) in enumerate(zip(out_features, ranks, strict=True)):
            here = slice(column, column + rank)
            for got, joined, expected in (
                (got_A[i], dA, every_A[here] if s is None else every_A[here] * factor),
                (got_B[i], dB, every_B[row : row + rows, here] * scalings[i]),
            ):
                if joined is None or rank == 0:
                    assert got is None
                else:
                    assert got.dtype == dtype
                    assert got.is_contiguous()
                    assert torch.equal(got, expected)
            row, column = row + rows, column + padded_rank(rank)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.usefixtures("nan_filled_empty")
def test_gradients_are_taken_apart(ops, group: str, dtype: torch.dtype, kernel_device: str) -> None:
    check_apart(ops, GROUPS[group], dtype, kernel_device, WIDTH)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "group", [((4096, 1024, 1024), (16, 16, 16)), ((14336, 14336), (64, 64)), ((28672,), (16,))], ids=str
)
def test_gradients_are_taken_apart_at_real_sizes(group: tuple[Sequence[int], Sequence[int]]) -> None:
    check_apart(lora_grads, group, torch.float32, "cuda", 4096)


def test_products_of_16_bit_factors_keep_their_float32_sums(kernel_device: str) -> None:
    left, right = torch.randn(300, 8, device=kernel_device), torch.randn(300, 16, device=kernel_device)
    assert lora_grads_eager.transposed_product(left.double(), right.double()).dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        narrow = left.to(dtype), right.to(dtype)
        product = lora_grads_eager.transposed_product(*narrow)
        assert product.dtype == torch.float32
        exact = narrow[0].double().t() @ narrow[1].double()
        assert (product - exact).norm() <= 1e-6 * exact.norm()
