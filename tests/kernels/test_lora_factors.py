"""The joined LoRA factors: the kernel and the eager twin against the equation, one element at a time."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slothcore.kernels import lora_factors, lora_factors_eager

OPS = pytest.mark.parametrize("ops", [lora_factors, lora_factors_eager], ids=["kernel", "eager"])
WIDTH = 70

# (out_features, rank) of each projection; rank 0 is one without factors.
GROUPS = {
    "one": [(40, 16)],  # one operation of torch at most, or the kernel
    "one, padded": [(33, 5)],
    "two": [(40, 16), (24, 16)],
    "two, the first missing": [(17, 0), (40, 8)],
    "three": [(40, 16), (24, 16), (24, 16)],
    "three of different ranks": [(7, 3), (65, 16), (1, 9)],
    "three, one missing": [(40, 16), (24, 0), (24, 4)],
    "three, only the last": [(5, 0), (6, 0), (7, 1)],
    "four": [(40, 16), (24, 0), (24, 4), (8, 8)],
}


def random_factors(
    group: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], device: str
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """lora_A and lora_B of each projection; their dtypes follow each other round `dtypes`."""
    lora_A: list[Tensor | None] = []
    lora_B: list[Tensor | None] = []
    for i, (rows, rank) in enumerate(group):
        kind = {"device": device, "dtype": dtypes[i % len(dtypes)]}
        lora_A.append(torch.randn(rank, WIDTH, **kind) if rank else None)
        lora_B.append(torch.randn(rows, rank, **kind) if rank else None)
    return lora_A, lora_B


def check(
    ops, group: Sequence[tuple[int, int]], dtypes: Sequence[torch.dtype], dtype: torch.dtype, device: str
) -> None:
    """Every element has the bits of one product, rounded once; everything around the blocks is zero."""
    lora_A, lora_B = random_factors(group, dtypes, device)
    scalings = [2.0, 0.3, 1.0, 0.7][: len(group)]
    rows = [n for n, _ in group]
    A, B = ops.pack_factors(lora_A, lora_B, scalings=scalings, out_features=rows, dtype=dtype)
    ranks = sum(-(-rank // 8) * 8 for _, rank in group)
    expected_A = torch.zeros(ranks, WIDTH, dtype=dtype, device=device)
    expected_B = torch.zeros(sum(rows), ranks, dtype=dtype, device=device)
    row = column = 0
    for (n, rank), one_A, one_B, scaling in zip(group, lora_A, lora_B, scalings, strict=True):
        if rank:
            expected_A[column : column + rank] = one_A.to(dtype)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            product = one_B.to(wide) * torch.tensor(scaling, dtype=wide, device=device)
            expected_B[row : row + n, column : column + rank] = product.to(dtype)
        row += n
        column += -(-rank // 8) * 8
    for actual, expected in ((A, expected_A), (B, expected_B)):
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", GROUPS)
def test_factors_are_joined(kernel_device, nan_filled_empty, ops, group: str, dtype: torch.dtype) -> None:
    check(ops, GROUPS[group], [torch.float32], dtype, kernel_device)


@OPS
@pytest.mark.parametrize("group", ["one, padded", "three of different ranks"])
def test_factors_of_mixed_dtypes_are_joined(kernel_device, nan_filled_empty, ops, group: str) -> None:
    check(ops, GROUPS[group], [torch.float16, torch.bfloat16, torch.float32], torch.float32, kernel_device)
    check(ops, GROUPS[group], [torch.bfloat16, torch.float32], torch.float16, kernel_device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
def test_eager_takes_every_dtype(group: str, dtype: torch.dtype) -> None:
    check(lora_factors_eager, GROUPS[group], [dtype], dtype, "cpu")
    check(lora_factors_eager, GROUPS[group], [torch.float32], dtype, "cpu")


@OPS
def test_factors_need_not_be_contiguous(kernel_device, nan_filled_empty, ops) -> None:
    lora_A = torch.randn(WIDTH, 5, device=kernel_device).t()
    lora_B = torch.randn(33, 10, device=kernel_device)[:, ::2]
    A, B = ops.pack_factors([lora_A], [lora_B], scalings=[0.5], out_features=[33], dtype=torch.float32)
    assert torch.equal(A[:5], lora_A)
    assert torch.equal(B[:, :5], lora_B * 0.5)
    assert not A[5:].any()
    assert not B[:, 5:].any()


@OPS
def test_only_what_needs_no_change_is_returned_as_it_is(kernel_device, ops) -> None:
    def is_copied(rank: int = 8, scaling: float = 1.0, dtype: torch.dtype = torch.float32) -> tuple[bool, bool]:
        lora_A, lora_B = torch.randn(rank, WIDTH, device=kernel_device), torch.randn(9, rank, device=kernel_device)
        A, B = ops.pack_factors([lora_A], [lora_B], scalings=[scaling], out_features=[9], dtype=dtype)
        return A is not lora_A, B is not lora_B

    assert is_copied() == (False, False)
    assert is_copied(scaling=2.0) == (False, True)
    assert is_copied(rank=5) == (True, True)
    assert is_copied(dtype=torch.float16) == (True, True)


@pytest.mark.gpu
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [[(4096, 16), (1024, 16), (1024, 16)], [(14336, 64), (14336, 64)], [(4096, 16)]])
def test_gpu_kernel_at_real_sizes(monkeypatch, shape, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    monkeypatch.setattr(f"{__name__}.WIDTH", 4096)
    check(lora_factors, shape, [factor_dtype], dtype, "cuda")
