"""dA and dB of few tokens in one launch: every combination of what is wanted, odd sizes, ranks that need padding."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slothcore.kernels import lora_grads_few, lora_grads_few_eager
from slothcore.kernels.lora_factors_eager import padded_rank
from slothcore.kernels.lora_grads_eager import ColumnScale
from slothcore.kernels.lora_grads_few import FEW_TOKENS, StripTile, takes_one_launch
from tests.numerics import assert_as_accurate_as_eager, widened

# A program walks over several tiles of rows, and has a partial strip of columns.
SMALL_TILE = StripTile(rows=16, columns=32, warps=4, stages=2)

# (out_features, ranks)
GROUPS = {
    "one": ((40,), (16,)),
    "one, padded": ((33,), (5,)),
    "two": ((40, 24), (16, 16)),
    "three of different ranks": ((7, 65, 1), (3, 16, 9)),
    "three, the first missing": ((40, 24, 24), (0, 16, 4)),
    "three, the second missing": ((40, 24, 24), (16, 0, 4)),
    "three, only the last": ((5, 6, 7), (0, 0, 1)),
}


def padded(values: Tensor, ranks: Sequence[int]) -> Tensor:
    """[T, R] whose columns of padding are zero, as the factors' are."""
    column = 0
    for rank in ranks:
        values[:, column + rank : column + padded_rank(rank)] = 0
        column += padded_rank(rank)
    return values


def check(
    group: tuple[Sequence[int], Sequence[int]], tokens: int, width: int, dtype: torch.dtype, device: str, **options
) -> None:
    """Beside the eager twin, from x and from a norm's input, with dA and dB or one of them; twice the same bits."""
    out_features, ranks = group
    total = sum(map(padded_rank, ranks))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    # Rows lie further apart than they are long, as those of a slice.
    h, dy = random(tokens, width + 16)[:, :width], random(tokens, sum(out_features) + 8)[:, : sum(out_features)]
    u, v = padded(random(tokens, total), ranks), padded(random(tokens, total), ranks)
    rstd = torch.rand(tokens, device=device) + 0.5
    layout = {"out_features": out_features, "ranks": ranks, "scalings": (2.0, 0.3, 1.0)[: len(ranks)]}
    norm = {"rstd": rstd, "scale": ColumnScale(random(width), 1.0)}
    wide_norm = {"rstd": rstd.double(), "scale": ColumnScale(norm["scale"].weight.double(), 1.0)}
    for of_x, of_dy in (((h, v), (dy, u)), ((None, None), (dy, u)), ((h, v), (None, None))):
        for of_norm, of_wide_norm in (({}, {}), (norm, wide_norm)):
            ours = lora_grads_few.factor_grads(*of_x, *of_dy, **layout, **of_norm, **options)
            again = lora_grads_few.factor_grads(*of_x, *of_dy, **layout, **of_norm, **options)
            eager = lora_grads_few_eager.factor_grads(*of_x, *of_dy, **layout, **of_norm)
            exact = lora_grads_few_eager.factor_grads(*widened(*of_x, *of_dy), **layout, **of_wide_norm)
            for kind, wanted in enumerate((of_x[0], of_dy[0])):
                for i, rank in enumerate(ranks):
                    ours_i, again_i, eager_i, exact_i = (g[kind][i] for g in (ours, again, eager, exact))
                    if wanted is None or rank == 0:
                        assert ours_i is None
                        assert eager_i is None
                        continue
                    assert ours_i.dtype == torch.float32
                    assert ours_i.is_contiguous()
                    assert torch.equal(ours_i, again_i)
                    assert_as_accurate_as_eager(ours_i, eager_i, exact_i, what=f"{'AB'[kind]} of projection {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 70), (33, 64)])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager(group: str, tokens: int, width: int, dtype: torch.dtype, kernel_device: str) -> None:
    check(GROUPS[group], tokens, width, dtype, kernel_device, _tile=SMALL_TILE)


def test_float16_does_not_overflow_where_r_is_large(kernel_device: str) -> None:
    """r v would be 6e4 * 8; r h is 1."""
    h, v = torch.full((4, 16), 2.0**-16).half(), torch.full((4, 8), 8.0).half()
    norm = {"rstd": torch.full((4,), 2.0**16, device=kernel_device), "scale": None}
    layout = {"out_features": (8,), "ranks": (8,), "scalings": (1.0,)}
    for ops in (lora_grads_few, lora_grads_few_eager):
        (dA,), _ = ops.factor_grads(h.to(kernel_device), v.to(kernel_device), None, None, **norm, **layout)
        assert torch.equal(dA, torch.full_like(dA, 32.0))


def test_one_launch_is_for_few_16_bit_tokens_and_small_ranks() -> None:
    def taken(tokens: int = 512, dtype: torch.dtype = torch.bfloat16, ranks: Sequence[int] = (16, 16, 16)) -> bool:
        return takes_one_launch(torch.empty(tokens, 64, dtype=dtype), torch.empty(tokens, 96, dtype=dtype), ranks=ranks)

    assert taken()
    assert taken(tokens=1)
    assert taken(tokens=FEW_TOKENS, dtype=torch.float16, ranks=(128,))
    assert not taken(tokens=0)
    assert not taken(tokens=FEW_TOKENS + 1)
    assert not taken(dtype=torch.float32)
    assert not taken(ranks=(64, 64, 1)), "136 ranks with their padding"
    assert not taken(ranks=(0, 0)), "no LoRA"
    assert not taken(ranks=(8, 8, 8, 8))
    x = torch.empty(512, 64, dtype=torch.bfloat16)
    assert takes_one_launch(x, None, ranks=(16,))
    assert takes_one_launch(None, x, ranks=(16,))
    assert takes_one_launch(x[:1].expand(512, -1), x, ranks=(16,))
    assert not takes_one_launch(None, None, ranks=(16,)), "nothing is wanted"
    assert not takes_one_launch(x, x[:, :1].expand(-1, 64), ranks=(16,)), "the gradient of a sum"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 512, FEW_TOKENS])
@pytest.mark.parametrize(
    "group",
    [((4096, 1024, 1024), (16, 16, 16)), ((14336, 14336), (16, 64)), ((4096,), (128,)), ((1000, 24, 8), (8, 0, 9))],
    ids=str,
)
@pytest.mark.usefixtures("nan_filled_empty")
def test_matches_eager_at_real_sizes(
    group: tuple[Sequence[int], Sequence[int]], tokens: int, dtype: torch.dtype
) -> None:
    check(group, tokens, 4096, dtype, "cuda")
