"""Sorting pairs by expert, and moving rows there and back."""

import pytest
import torch
from torch import Tensor

from slothcore.kernels import expert_routing, expert_routing_eager
from tests.numerics import assert_as_accurate_as_eager

OPS = pytest.mark.parametrize("ops", [expert_routing, expert_routing_eager], ids=["kernel", "eager"])
SHAPES = [(1, 1, 3), (1, 4, 4), (7, 2, 5), (33, 3, 130), (5, 8, 300)]


def choices(tokens: int, k: int, experts: int, device: str) -> Tensor:
    """Distinct experts for each token, as a router's top-k gives them."""
    return torch.rand(tokens, experts, device=device).topk(k, dim=1).indices


@OPS
@pytest.mark.parametrize(("tokens", "k", "experts"), SHAPES)
def test_sorting_follows_its_definition(kernel_device, ops, tokens, k, experts) -> None:
    ids = choices(tokens, k, experts, kernel_device)
    order, offsets, position = ops.sort_by_expert(ids, experts)
    flat = ids.flatten().tolist()
    expected = sorted(range(tokens * k), key=lambda pair: (flat[pair], pair))
    assert order.tolist() == expected
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]
    assert position[order].tolist() == list(range(tokens * k))


@OPS
def test_one_expert_may_have_all_rows(kernel_device, ops) -> None:
    routing = ops.sort_by_expert(torch.full((6, 1), 2, device=kernel_device), 4)
    assert routing.offsets.tolist() == [0, 0, 0, 6, 6]
    assert routing.order.tolist() == list(range(6))


@OPS
def test_no_tokens_give_no_rows(kernel_device, ops) -> None:
    order, offsets, position = ops.sort_by_expert(torch.zeros(0, 2, dtype=torch.int64, device=kernel_device), 4)
    assert offsets.tolist() == [0] * 5
    rows = ops.gather_rows(torch.zeros(0, 8, device=kernel_device), order)
    assert rows.shape == (0, 8)
    assert ops.combine_rows(rows, position, 0).shape == (0, 8)


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 70, 2100])
@pytest.mark.parametrize(("tokens", "k", "experts"), SHAPES[1:4])
def test_rows_move_there_and_back(kernel_device, nan_filled_empty, ops, tokens, k, experts, width, dtype) -> None:
    order, _, position = ops.sort_by_expert(choices(tokens, k, experts, kernel_device), experts)
    wide = torch.randn(tokens, 3, width, device=kernel_device).to(dtype)
    for x in (wide[:, 1].contiguous(), wide[:, 1], wide[:, 1].T.contiguous().T):
        rows = ops.gather_rows(x, order)
        assert torch.equal(rows, x[order // k])
    spread = torch.randn(tokens * k, 2, width, device=kernel_device).to(dtype)[:, 0]
    exact = torch.zeros(tokens, width, dtype=torch.float64, device=kernel_device)
    exact.index_add_(0, order // k, spread.double())
    y = ops.combine_rows(spread, position, tokens)
    eager = expert_routing_eager.combine_rows(spread, position, tokens)
    assert y.dtype == dtype
    assert_as_accurate_as_eager(y, eager, exact)


def test_eager_sums_in_float64() -> None:
    order, _, position = expert_routing_eager.sort_by_expert(choices(7, 2, 5, "cpu"), 5)
    rows = torch.randn(14, 6, dtype=torch.float64)
    exact = torch.zeros(7, 6, dtype=torch.float64).index_add_(0, order // 2, rows)
    assert (expert_routing_eager.combine_rows(rows, position, 7) - exact).abs().max() < 1e-15


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "experts", "width"), [(2, 8, 4096), (8, 128, 2048)])
def test_gpu_rows_move_there_and_back(nan_filled_empty, k, experts, width, dtype) -> None:
    tokens = 1000
    ids = choices(tokens, k, experts, "cuda")
    order, offsets, position = expert_routing.sort_by_expert(ids, experts)
    on_host = expert_routing_eager.sort_by_expert(ids.cpu(), experts)
    for ours, host in zip((order, offsets, position), on_host, strict=True):
        assert torch.equal(ours.cpu(), host)
    x = torch.randn(tokens, width, device="cuda", dtype=dtype)
    rows = expert_routing.gather_rows(x, order)
    assert torch.equal(rows, expert_routing_eager.gather_rows(x, order))
    exact = expert_routing_eager.combine_rows(rows.double(), position, tokens)
    eager = expert_routing_eager.combine_rows(rows, position, tokens)
    y = expert_routing.combine_rows(rows, position, tokens)
    assert_as_accurate_as_eager(y, eager, exact)
    assert torch.equal(y, expert_routing.combine_rows(rows, position, tokens))
