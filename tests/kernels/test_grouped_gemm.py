"""Products of rows sorted by expert, against a loop over experts in float64."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from slothcore.kernels import grouped_gemm, grouped_gemm_eager, nf4, nf4_eager, nf4_experts_eager
from slothcore.kernels.grouped_gemm import SCRATCH_BYTES, ProductTile, expands_first, outer_tile, product_tile
from slothcore.kernels.nf4_experts import Nf4Experts
from tests.numerics import assert_as_accurate_as_eager

OPS = pytest.mark.parametrize("ops", [grouped_gemm, grouped_gemm_eager], ids=["kernel", "eager"])
# Rows of each expert: none, one, a tile, a tile and one; all at one end; all at the other; one row in all.
COUNTS = {
    "mixed": (0, 1, 16, 17, 0, 5),
    "all to the first": (40, 0, 0),
    "all to the last": (0, 0, 0, 0, 33),
    "one row": (0, 1),
    "one expert": (7,),
    "two bands of row tiles": (60, 0, 70, 3, 40),
}
# out_features, in_features; NF4 takes the loop only where in_features is divisible by 64.
DENSE_SHAPES = [(33, 70), (16, 20)]
NF4_SHAPES = [(70, 192), (40, 64), (24, 40)]

Weight = Tensor | Nf4Experts


def offsets_of(counts: Sequence[int], device: str) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)


def quantized(weight: Tensor) -> Nf4Experts:
    ops = nf4 if weight.is_cuda else nf4_eager
    return Nf4Experts.stack([ops.nf4_quantize(w) for w in weight])


def decoded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight as the product sees it: rounding to `dtype` is part of the definition."""
    return weight if isinstance(weight, Tensor) else nf4_experts_eager.nf4_experts_dequantize(weight, dtype=dtype)


def random(*shape: int, dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * std).to(dtype)


def naive(left: Tensor, weight: Tensor, offsets: Tensor, *, transpose: bool) -> Tensor:
    """Each expert's rows times its weight, [N, K] or its transpose, in float64 and one expert at a time."""
    parts = []
    for expert, (first, end) in enumerate(itertools.pairwise(offsets.tolist())):
        w = weight[expert].double()
        parts.append(left[first:end].double() @ (w.T if transpose else w))
    return torch.cat(parts)


def check_products(counts: Sequence[int], shape, rank: int, dtype, device: str, *, is_nf4: bool, ops=grouped_gemm):
    """Forward, backward with and without a tensor to add to, with the LoRA term if there is a rank."""
    n, k = shape
    rows, experts, offsets = sum(counts), len(counts), offsets_of(counts, device)
    new = {"dtype": dtype, "device": device}
    dense = random(experts, n, k, std=k**-0.5, **new)
    weight: Weight = quantized(dense) if is_nf4 else dense
    x, dy, base = random(rows, k, **new), random(rows, n, **new), random(rows, k, **new)
    forward, backward = {}, {}
    if rank:
        forward = {"lora_x": random(rows, rank, **new), "lora_B": random(experts, n, rank, **new)}
        backward = {"lora_dy": random(rows, rank, **new), "lora_A": random(experts, rank, k, **new)}

    exact_y = naive(x, decoded(weight, dtype), offsets, transpose=True)
    exact_dx = naive(dy, decoded(weight, dtype), offsets, transpose=False)
    if rank:
        exact_y += naive(forward["lora_x"], forward["lora_B"], offsets, transpose=True)
        exact_dx += naive(backward["lora_dy"], backward["lora_A"], offsets, transpose=False)
    results = []
    for module in (ops, grouped_gemm_eager):
        y = module.grouped_linear(x, weight, offsets, **forward)
        dx = module.grouped_input_grad(dy, weight, offsets, **backward)
        added = module.grouped_input_grad(dy, weight, offsets, **backward, add_to=base.clone())
        results.append((y, dx, added))
    exact = (exact_y, exact_dx, exact_dx + base.double())
    for what, ours, eager, truth in zip(("y", "dx", "added dx"), *results, exact, strict=True):
        assert ours.dtype == dtype
        assert_as_accurate_as_eager(ours, eager, truth, what=what)
    assert torch.equal(ops.grouped_linear(x, weight, offsets, **forward), results[0][0]), "not repeatable"


@OPS
@pytest.mark.parametrize("rank", [0, 3, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", DENSE_SHAPES)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_dense_products(kernel_device, nan_filled_empty, counts, shape, dtype, rank, ops) -> None:
    check_products(counts, shape, rank, dtype, kernel_device, is_nf4=False, ops=ops)


@OPS
@pytest.mark.parametrize("expanded", [False, True], ids=["in the loop", "expanded first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", NF4_SHAPES)
@pytest.mark.parametrize("counts", [COUNTS["mixed"], COUNTS["two bands of row tiles"]])
def test_nf4_products(kernel_device, nan_filled_empty, monkeypatch, counts, shape, dtype, expanded, ops) -> None:
    if expanded:
        monkeypatch.setattr(grouped_gemm, "NF4_IN_LOOP_ROWS", 0)
    assert expands_first(sum(counts), (len(counts), *shape), 2) == (expanded or shape[1] % 64 != 0)
    check_products(counts, shape, 3, dtype, kernel_device, is_nf4=True, ops=ops)


def test_kernel_decodes_the_exact_weight(kernel_device, nan_filled_empty) -> None:
    """Rows of the identity pick single weights: equal to the dequantised ones to the last bit, in both directions."""
    experts, n, k = 3, 64, 128
    weight = quantized(torch.randn(experts, n, k, device=kernel_device))
    for dtype in (torch.float32, torch.float16):
        dense = decoded(weight, dtype)
        eye = torch.eye(k, dtype=dtype, device=kernel_device).repeat(experts, 1)
        y = grouped_gemm.grouped_linear(eye, weight, offsets_of([k] * experts, kernel_device))
        assert torch.equal(y.view(experts, k, n), dense.mT)
        eye = torch.eye(n, dtype=dtype, device=kernel_device).repeat(experts, 1)
        dx = grouped_gemm.grouped_input_grad(eye, weight, offsets_of([n] * experts, kernel_device))
        assert torch.equal(dx.view(experts, n, k), dense)


@pytest.mark.parametrize("is_nf4", [False, True])
@pytest.mark.parametrize("tile", [(32, 128, 128), (16, 64, 128), (32, 256, 64), (64, 128, 64)])
def test_other_tiles_change_nothing(kernel_device, nan_filled_empty, tile, is_nf4) -> None:
    """Tiles of GPUs, wider than the interpreter's: several blocks of NF4 either way, cut off by both edges."""
    counts, n, k = (0, 33, 5), 100, 192
    offsets, new = offsets_of(counts, kernel_device), {"dtype": torch.float32, "device": kernel_device}
    dense = random(3, n, k, std=k**-0.5, **new)
    weight = quantized(dense) if is_nf4 else dense
    x, dy = random(38, k, **new), random(38, n, **new)
    options = {"_tile": ProductTile(*tile, warps=4, stages=1)}
    for product, left in ((grouped_gemm.grouped_linear, x), (grouped_gemm.grouped_input_grad, dy)):
        assert (product(left, weight, offsets, **options) - product(left, weight, offsets)).abs().max() < 1e-5


@OPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(3, 70), (40, 16)])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_outer_products(kernel_device, nan_filled_empty, counts, shape, dtype, ops) -> None:
    rows, offsets = sum(counts), offsets_of(counts, kernel_device)
    left = random(rows, 2, shape[0], dtype=dtype, device=kernel_device)[:, 1]
    right = random(rows, 2, shape[1], dtype=dtype, device=kernel_device)[:, 0]
    spans = itertools.pairwise(offsets.tolist())
    exact = torch.stack([0.3 * left[a:b].double().T @ right[a:b].double() for a, b in spans])
    for out_dtype in {torch.float32, dtype}:
        options = {"dtype": out_dtype, "scaling": 0.3}
        outer = ops.grouped_outer(left, right, offsets, **options)
        eager = grouped_gemm_eager.grouped_outer(left, right, offsets, **options)
        assert outer.dtype == out_dtype
        assert_as_accurate_as_eager(outer, eager, exact)
    for expert, count in enumerate(counts):
        assert count > 0 or (outer[expert] == 0).all()


@OPS
def test_infinity_stays_with_its_expert(kernel_device, ops) -> None:
    counts = (3, 2, 4)
    offsets = offsets_of(counts, kernel_device)
    x, dy = torch.ones(9, 20, device=kernel_device), torch.ones(9, 5, device=kernel_device)
    x[3], dy[4] = float("inf"), float("nan")
    weight = torch.ones(3, 5, 20, device=kernel_device)
    finite = [0, 1, 2, 5, 6, 7, 8]
    assert ops.grouped_linear(x, weight, offsets)[finite].isfinite().all()
    assert ops.grouped_input_grad(dy, weight, offsets)[finite].isfinite().all()
    assert ops.grouped_outer(dy, x, offsets, dtype=torch.float32)[[0, 2]].isfinite().all()


@OPS
@pytest.mark.parametrize("is_nf4", [False, True])
def test_strided_operands_and_outputs(kernel_device, nan_filled_empty, ops, is_nf4) -> None:
    counts, n, k = (3, 0, 6), 40, 64
    offsets = offsets_of(counts, kernel_device)
    new = {"dtype": torch.float32, "device": kernel_device}
    dense = random(3, n, k, **new)
    weight = quantized(dense) if is_nf4 else dense
    x, lora_x, lora_B = random(9, k, **new), random(9, 4, **new), random(3, n, 4, **new)
    expected = ops.grouped_linear(x, weight, offsets, lora_x=lora_x, lora_B=lora_B)
    wide = torch.full((9, 100), float("nan"), device=kernel_device)
    out = wide[:, 30:70]
    spread_x, spread_u = torch.stack([x, x], 1)[:, 1], torch.stack([lora_x, lora_x], -1)[..., 0]
    flipped_B = lora_B.mT.contiguous().mT
    assert ops.grouped_linear(spread_x, weight, offsets, lora_x=spread_u, lora_B=flipped_B, out=out) is out
    assert (out - expected).abs().max() < 1e-5
    assert wide[:, :30].isnan().all()
    assert wide[:, 70:].isnan().all()


@OPS
def test_no_rows_give_no_rows(kernel_device, ops) -> None:
    offsets = torch.zeros(3, dtype=torch.int32, device=kernel_device)
    x, weight = torch.ones(0, 20, device=kernel_device), torch.ones(2, 5, 20, device=kernel_device)
    assert ops.grouped_linear(x, weight, offsets).shape == (0, 5)
    outer = ops.grouped_outer(x, x, offsets, dtype=torch.float32)
    assert torch.equal(outer, torch.zeros(2, 20, 20, device=kernel_device))


@OPS
def test_bad_input_is_refused(ops) -> None:
    offsets, x, weight = offsets_of((3, 2), "cpu"), torch.ones(5, 20), torch.ones(2, 7, 20)
    with pytest.raises(ValueError, match=r"rows must be torch.float32 of shape \(5, 20\).*\(5, 7\)"):
        ops.grouped_linear(torch.ones(5, 7), weight, offsets)
    with pytest.raises(ValueError, match=r"rows must be torch.float32 of shape \(5, 7\).*\(5, 20\)"):
        ops.grouped_input_grad(x, weight, offsets)
    with pytest.raises(ValueError, match=r"offsets must be torch.int32 of shape \(3,\).*int64"):
        ops.grouped_linear(x, weight, offsets.long())
    with pytest.raises(ValueError, match=r"weight must be torch.float16"):
        ops.grouped_linear(x.half(), weight, offsets)
    with pytest.raises(ValueError, match="both its operands"):
        ops.grouped_linear(x, weight, offsets, lora_x=torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"LoRA factor must be.*\(2, 7, 2\).*\(2, 2, 7\)"):
        ops.grouped_linear(x, weight, offsets, lora_x=torch.ones(5, 2), lora_B=torch.ones(2, 2, 7))
    with pytest.raises(ValueError, match=r"output must be.*\(5, 7\).*\(7, 5\)"):
        ops.grouped_linear(x, weight, offsets, out=torch.ones(7, 5))
    with pytest.raises(ValueError, match="dense rows"):
        ops.grouped_linear(x, weight, offsets, out=torch.ones(7, 5).T)
    with pytest.raises(ValueError, match=r"right rows must be.*\(5, 7\).*\(4, 7\)"):
        ops.grouped_outer(x, torch.ones(4, 7), offsets, dtype=torch.float32)


def test_the_way_of_nf4_follows_rows_and_bytes() -> None:
    mixtral, qwen = (8, 14336, 4096), (128, 768, 2048)
    assert not expands_first(64 * 2, mixtral, 2)
    assert expands_first(8192 * 2, mixtral, 2)
    assert not expands_first(2048 * 8, qwen, 2)
    assert expands_first(8192 * 8, qwen, 2)
    assert not expands_first(2**20, (8, 32768, 8192), 2), "a scratch beyond the budget"
    assert expands_first(2, (2, 24, 40), 2), "blocks that cross rows cannot be decoded in the loop"


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 0), (8, 6), (9, 0)])
def test_tiles_fit_every_gpu(capability) -> None:
    """Shared memory of the pipeline stays below what a program may have, and tiles are what the kernels can take."""
    limit = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (9, 0): 227, None: 2**20}[capability] * 1024
    for rows, columns, itemsize, is_nf4 in itertools.product((1, 16, 128, 256), (8, 16, 768, 4096), (2, 4), (0, 1)):
        tile = product_tile(rows, columns, itemsize, bool(is_nf4), capability)
        assert not is_nf4 or (tile.columns % 64 == 0 and tile.inner % 64 == 0)
        bytes_of_weight = tile.columns * tile.inner * itemsize
        staged = tile.rows * tile.inner * itemsize + (bytes_of_weight // (2 * itemsize) if is_nf4 else bytes_of_weight)
        assert tile.stages * staged + is_nf4 * bytes_of_weight <= limit
        assert all(side >= 16 and side & (side - 1) == 0 for side in tile[:3])
    for left, right, itemsize in itertools.product((8, 768, 14336), (16, 4096), (2, 4)):
        outer = outer_tile(left, right, itemsize, capability)
        assert outer.stages * outer.rows * (outer.left + outer.right) * itemsize <= limit
    assert SCRATCH_BYTES == 2**30


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ((5, 0, 71), (14336, 4096)),
        ((70, 0, 1), (4096, 14336)),
        ((3, 0, 8, 1, 0, 40, 9, 3) * 2, (768, 2048)),
        ((50, 60, 70), (768, 2048)),
        ((100, 130, 90), (2048, 768)),
        ((300, 0, 513, 1), (2048, 768)),
        ((500, 500), (700, 1024)),
    ],
)
def test_gpu_products(nan_filled_empty, counts, shape, is_nf4, dtype) -> None:
    check_products(counts, shape, 16, dtype, "cuda", is_nf4=is_nf4)


@pytest.mark.gpu
@pytest.mark.parametrize("is_nf4", [False, True], ids=["dense", "nf4"])
def test_gpu_products_in_float32(nan_filled_empty, is_nf4) -> None:
    check_products((30, 0, 1, 40), (700, 1024), 16, torch.float32, "cuda", is_nf4=is_nf4)


@pytest.mark.gpu
def test_gpu_nf4_with_many_rows(nan_filled_empty) -> None:
    counts = (700, 0, 400)
    assert expands_first(sum(counts), (3, 768, 2048), 2)
    check_products(counts, (768, 2048), 16, torch.bfloat16, "cuda", is_nf4=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 4096), (2048, 16), (768, 2048)])
def test_gpu_outer_products(nan_filled_empty, shape, dtype) -> None:
    counts = (300, 0, 1, 70, 513)
    offsets = offsets_of(counts, "cuda")
    left, right = (random(sum(counts), width, dtype=dtype, device="cuda") for width in shape)
    exact = grouped_gemm_eager.grouped_outer(left.double(), right.double(), offsets, dtype=torch.float64)
    for out_dtype in {torch.float32, dtype}:
        outer = grouped_gemm.grouped_outer(left, right, offsets, dtype=out_dtype)
        eager = grouped_gemm_eager.grouped_outer(left, right, offsets, dtype=out_dtype)
        assert_as_accurate_as_eager(outer, eager, exact)
        assert torch.equal(outer, grouped_gemm.grouped_outer(left, right, offsets, dtype=out_dtype))
