"""Attention over pages: rows of unequal length, pages in any order, rings, windows, soft caps, and texts in parts."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from slothcore.kernels import paged_attention, paged_attention_eager
from tests.numerics import assert_as_accurate_as_eager

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BOTH = pytest.mark.parametrize("ops", [paged_attention, paged_attention_eager], ids=["fused", "eager"])


@dataclass(frozen=True)
class Case:
    """Texts in pages, and the last token of each as a query."""

    query: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Tensor
    rows: Tensor
    positions: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("query", "keys", "values")})

    def run(self, ops: Any, **options: Any) -> Tensor:
        tables = self.block_tables, self.rows, self.positions
        return ops.paged_attention(self.query, self.keys, self.values, *tables, scale=self.scale, **options)

    @property
    def scale(self) -> float:
        return self.query.shape[2] ** -0.5

    def of(self, queries: list[int]) -> "Case":
        """Some of the queries alone, with all pages."""
        part = {name: getattr(self, name)[queries] for name in ("query", "rows", "positions")}
        return replace(self, **part)


def make_case(
    lengths: list[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    page_size: int = 16,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """A row for each of `lengths`, 0 for an idle one; NaN wherever no token is.

    width: pages of a row, which forms a ring if it is longer; default: as many as the longest needs, and one.
    """
    draw = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    width = -(-max(lengths) // page_size) + 1 if width is None else width
    block_tables = (torch.randperm(rows * width + 3, generator=draw)[: rows * width]).int().view(rows, width)
    keys = torch.full((rows * width + 3, page_size, kv_heads, head_dim), float("nan"))
    values = keys.clone()
    for row, length in enumerate(lengths):
        for at in range(max(0, length - width * page_size), length):
            place = block_tables[row, at // page_size % width], at % page_size
            keys[place] = torch.randn(kv_heads, head_dim, generator=draw)
            values[place] = torch.randn(kv_heads, head_dim, generator=draw)
    query = torch.randn(rows, heads, head_dim, generator=draw)
    positions = torch.tensor(lengths) - 1
    order = torch.arange(rows, dtype=torch.int32)
    parts = [x.to(device) for x in (query, keys, values, block_tables, order, positions)]
    return Case(*parts).to(dtype)


def by_definition(case: Case, *, window: int | None = None, softcap: float | None = None) -> Tensor:
    """One query, head and key after another, in float64."""
    out = torch.zeros_like(case.query, dtype=torch.float64)
    group = case.query.shape[1] // case.keys.shape[2]
    page_size, width = case.keys.shape[1], case.block_tables.shape[1]
    for i, (row, position) in enumerate(zip(case.rows.tolist(), case.positions.tolist(), strict=True)):
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(case.query.shape[1]):
            places = [
                (case.block_tables[row, j // page_size % width], j % page_size) for j in range(first, position + 1)
            ]
            if not places:
                continue
            key, value = (
                torch.stack([x[page, place, head // group] for page, place in places]).double()
                for x in (case.keys, case.values)
            )
            scores = key @ case.query[i, head].double() * case.scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, head] = scores.softmax(0) @ value
    return out


OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"window": 5}, {"softcap": 0.7}, {"window": 30, "softcap": 2.0}], ids=str
)


@OPTIONS
@BOTH
def test_formula(ops, options: dict[str, Any], kernel_device: str, nan_filled_empty: None) -> None:
    case = make_case([7, 0, 1, 40, 16, 17, 33], device=kernel_device)
    result = case.run(ops, **options)
    torch.testing.assert_close(result.double(), by_definition(case, **options), rtol=1e-5, atol=1e-5)
    assert not result[1].any()


def test_a_query_may_be_a_piece_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind its last token, where longer texts beside it have some, lies anything."""
    monkeypatch.setattr(paged_attention_eager, "SCORES_AT_ONCE", 1)
    case = make_case([7, 0, 1, 40])
    torch.testing.assert_close(case.run(paged_attention_eager).double(), by_definition(case), rtol=1e-5, atol=1e-5)


@BOTH
def test_rings_hold_the_window(ops, kernel_device: str) -> None:
    """Pages for 48 tokens, of which 40 are seen; texts that went round them not at all, once and often."""
    case = make_case([3, 48, 49, 85, 100, 0, 301], width=3, device=kernel_device)
    expected = by_definition(case, window=40)
    torch.testing.assert_close(case.run(ops, window=40).double(), expected, rtol=1e-5, atol=1e-5)


@DTYPES
@OPTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"),
    [(4, 4, 64, 16), (8, 1, 80, 32), (14, 2, 96, 64), (6, 2, 128, 16), (20, 1, 16, 64), (2, 1, 256, 16)],
)
def test_matches_eager(
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    kernel_device: str,
    nan_filled_empty: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Short parts, so that texts have one, several and many; a ragged last block and page each."""
    if dtype == torch.bfloat16 and kernel_device == "cpu":
        pytest.skip("Triton's interpreter multiplies bfloat16 wrongly")
    monkeypatch.setattr(paged_attention, "KEYS_OF_A_PART", 32)
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": page_size}
    case = make_case([1, 0, 30, 70, 115], dtype=dtype, device=kernel_device, **shape)
    fused = case.run(paged_attention, **options)
    eager = case.run(paged_attention_eager, **options)
    exact = case.to(torch.float64).run(paged_attention_eager, **options)
    assert_as_accurate_as_eager(fused, eager, exact)


@BOTH
@OPTIONS
def test_tokens_of_one_row_are_what_each_is_alone(
    ops, options: dict[str, Any], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many queries in parts of their own, and so many that eager takes them piece by piece."""
    monkeypatch.setattr(paged_attention, "KEYS_OF_A_PART", 16)
    monkeypatch.setattr(paged_attention_eager, "SCORES_AT_ONCE", 3 * 4 * 90)
    case = make_case([20, 90, 11], device=kernel_device)
    count = 37
    case = replace(
        case,
        query=torch.randn(count, *case.query.shape[1:], device=kernel_device),
        rows=torch.full((count,), 1, dtype=torch.int32, device=kernel_device),
        positions=torch.arange(90 - count, 90, device=kernel_device),
    )
    together = case.run(ops, one_row=True, **options)
    torch.testing.assert_close(together.double(), by_definition(case, **options), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.run(ops, **options), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_bits_depend_neither_on_the_batch_nor_on_pages(
    window: int | None, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "KEYS_OF_A_PART", 32)
    lengths = [7, 300, 33, 1, 129]
    case = make_case(lengths, device=kernel_device, dtype=torch.float16)
    together = case.run(paged_attention, window=window)
    for i in range(len(lengths)):
        assert torch.equal(case.of([i]).run(paged_attention, window=window), together[i : i + 1])
    # Other pages, twice as many for a row, and rows in another order.
    pages = len(case.keys)
    order = torch.randperm(pages, device=kernel_device)
    tables = torch.argsort(order)[case.block_tables.long()].int()
    moved = replace(
        case,
        keys=case.keys[order],
        values=case.values[order],
        block_tables=torch.cat([tables, torch.zeros_like(tables)], 1),
    ).of([4, 2, 0, 1, 3])
    assert torch.equal(moved.run(paged_attention, window=window), together[[4, 2, 0, 1, 3]])


@BOTH
def test_strided_inputs(ops, kernel_device: str) -> None:
    """The queries of a fused projection, and pages that hold one head after the other."""
    case = make_case([40, 9], device=kernel_device)
    expected = case.run(ops)
    qkv = torch.randn(2, 8, 16, device=kernel_device)
    qkv[:, :4] = case.query
    by_head = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.keys, case.values)]
    case = replace(case, query=qkv[:, :4], keys=by_head[0], values=by_head[1])
    assert not case.keys.is_contiguous()
    assert torch.equal(case.run(ops), expected)


def test_no_queries(kernel_device: str) -> None:
    case = make_case([3], device=kernel_device).of([])
    for ops in (paged_attention, paged_attention_eager):
        assert case.run(ops).shape == (0, 4, 16)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)])
def test_tiles_fit_shared_memory(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    tile = paged_attention.paged_tile(head_dim, dtype, capability)
    stages = tile.num_stages if capability >= (8, 0) else 1
    blocks = 2 * stages * tile.block_k * head_dim * dtype.itemsize
    assert blocks <= 0.98 * 1024 * paged_attention.shared_memory_kib(capability)
    assert tile.block_k >= 16


@pytest.mark.gpu
@DTYPES
@OPTIONS
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 32, 64), (32, 32, 80), (28, 4, 96), (32, 8, 128), (8, 1, 256)]
)
def test_matches_eager_at_real_sizes(
    heads: int, kv_heads: int, head_dim: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": 64}
    case = make_case([1, 0, 64, 129, 1000, 2500], dtype=dtype, device="cuda", **shape)
    fused = case.run(paged_attention, **options)
    eager = case.run(paged_attention_eager, **options)
    exact = case.to(torch.float64).run(paged_attention_eager, **options)
    assert_as_accurate_as_eager(fused, eager, exact)
    for i in range(6):
        assert torch.equal(case.of([i]).run(paged_attention, **options), fused[i : i + 1])


@pytest.mark.gpu
@DTYPES
@OPTIONS
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tokens_of_one_row_at_real_sizes(head_dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    case = make_case([900], heads=8, kv_heads=2, head_dim=head_dim, page_size=64, dtype=dtype, device="cuda")
    count = 333
    case = replace(
        case,
        query=torch.randn(count, 8, head_dim, device="cuda").to(dtype),
        rows=torch.zeros(count, dtype=torch.int32, device="cuda"),
        positions=torch.arange(900 - count, 900, device="cuda"),
    )
    results = [
        inputs.run(ops, one_row=True, **options)
        for inputs, ops in (
            (case, paged_attention),
            (case, paged_attention_eager),
            (case.to(torch.float64), paged_attention_eager),
        )
    ]
    assert_as_accurate_as_eager(*results)


@pytest.mark.gpu
def test_a_captured_launch_follows_lengths_and_pages() -> None:
    """The same graph, after rows have grown, become idle and moved to other pages."""
    case = make_case([100, 700, 3], heads=32, kv_heads=8, head_dim=128, page_size=64, width=32, device="cuda").to(
        torch.bfloat16
    )
    case.run(paged_attention)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(paged_attention)
    other = make_case(
        [0, 1500, 64], heads=32, kv_heads=8, head_dim=128, page_size=64, width=32, device="cuda", seed=1
    ).to(torch.bfloat16)
    for name in ("query", "keys", "values", "block_tables", "positions"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    assert torch.equal(out, other.run(paged_attention))
