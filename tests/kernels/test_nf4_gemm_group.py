"""Products with groups of NF4 weights by specialised warps, against dequantise-then-multiply."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slothcore.kernels import lora_gemm_eager, nf4_eager, nf4_few_eager, nf4_gemm_group
from slothcore.kernels.gpu import has_gluon
from slothcore.kernels.launch import ceil_div
from slothcore.kernels.nf4_few_eager import Terms
from slothcore.kernels.nf4_gemm_group import PIECES, cut_and_share, parts_together, pays
from slothcore.kernels.nf4_tensor import Nf4Tensor
from tests.kernels.few_rows import exact_linear
from tests.numerics import assert_as_accurate_as_eager, widened

# Rows, out_features of each weight, in_features, rank: partial tiles of tokens and outputs, tiles cut between two and
# between many programs, several tiles a program, a LoRA term of two steps or none.
SHAPES = {
    "one row, one unit": (1, (256,), 256, 16),
    "two weights": (257, (256, 512), 768, 24),
    "three weights, two LoRA steps": (513, (512, 256, 256), 1024, 72),
    "no LoRA": (256, (256, 256), 512, 0),
    "a tile cut into many": (300, (256,), 14336, 16),
    "tiles cut in two": (512, (4096,), 4096, 16),
    "tiles cut in four": (256, (4096,), 4096, 16),
    "few rows, tiles cut in four": (40, (4096,), 4096, 72),
    "few rows, several weights": (64, (4096, 1024, 1024), 2048, 48),
    "parts of tiles and whole ones": (512, (14336, 4096), 2048, 16),
    "several tiles a program": (2049, (4096, 1024, 1024), 2048, 48),
}


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9 or not has_gluon():
        pytest.skip("the kernel is for Hopper, and for a Triton with Gluon")


def operands(
    rows: int,
    out_features: tuple[int, ...],
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    *,
    double_quant: bool = True,
) -> tuple[dict[str, Tensor], list[Nf4Tensor]]:
    """x, dy, the factors and their products; and the weights, on the GPU."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    outputs = sum(out_features)
    weights = [nf4_eager.nf4_quantize(normal(n, in_features) * 0.05, double_quant=double_quant) for n in out_features]
    tensors = {"x": normal(rows, in_features), "dy": normal(rows, outputs), "bias": normal(outputs)}
    if rank:
        tensors |= {"lora_x": normal(rows, rank), "lora_B": normal(outputs, rank), "lora_A": normal(rank, in_features)}
    return tensors, weights


def check(t: dict[str, Tensor], weights: list[Nf4Tensor], *, bias: bool) -> None:
    """Both directions; y goes into columns of a wider tensor, whose other columns must keep their NaN."""
    dense = nf4_eager.nf4_dequantize_group(weights, dtype=t["x"].dtype)
    b = t["bias"] if bias else None
    wide = t["dy"].new_full((len(t["x"]), dense.shape[0] + 16), float("nan"))
    y = nf4_gemm_group.nf4_linear_group(
        t["x"], weights, lora_x=t.get("lora_x"), lora_B=t.get("lora_B"), bias=b, out=wide[:, 8:-8]
    )
    assert y.data_ptr() == wide[:, 8:].data_ptr()
    assert wide[:, :8].isnan().all()
    assert wide[:, -8:].isnan().all()
    dx = nf4_gemm_group.nf4_input_grad_group(t["dy"], weights, lora_dy=t.get("lora_x"), lora_A=t.get("lora_A"))
    results = []
    for x, dy, w, u, B, A, c in (
        (t["x"], t["dy"], dense, t.get("lora_x"), t.get("lora_B"), t.get("lora_A"), b),
        widened(t["x"], t["dy"], dense, t.get("lora_x"), t.get("lora_B"), t.get("lora_A"), b),
    ):
        results.append(
            (
                lora_gemm_eager.linear_add(x, w, lora_x=u, lora_B=B, bias=c),
                lora_gemm_eager.linear_input_grad(dy, w, lora_dy=u, lora_A=A),
            )
        )
    (eager_y, eager_dx), (exact_y, exact_dx) = results
    assert_as_accurate_as_eager(y, eager_y, exact_y, what="y")
    assert_as_accurate_as_eager(dx, eager_dx, exact_dx, what="dx")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernel_as_accurate_as_eager(nan_filled_empty, hopper, shape, dtype) -> None:
    rows, out_features, in_features, rank = shape
    t, weights = operands(rows, out_features, in_features, rank, dtype, double_quant=rank != 72)
    check(t, weights, bias=rank != 16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(16, 0, 64), (0, 0, 0), (8, 24, 40)], ids=str)
def test_factors_may_lie_apart(nan_filled_empty, hopper, ranks, dtype) -> None:
    """Factors in float32, each with a scaling, as decoding has them; a weight without LoRA, and the most ranks."""
    t, weights = operands(40, (1024, 256, 200), 4096, 0, dtype)
    lora_B = [
        torch.randn(w.shape[0], r, device="cuda") * 0.1 if r else None for w, r in zip(weights, ranks, strict=True)
    ]
    u = torch.randn(40, sum(ranks), device="cuda").to(dtype) if any(ranks) else None
    terms = Terms(u, lora_B, [0.5, 1.0, 3.0], [None] * 3)
    y = nf4_gemm_group.nf4_linear_few(t["x"], weights, terms)
    assert_as_accurate_as_eager(y, nf4_few_eager.linear(t["x"], weights, terms), exact_linear(t["x"], weights, terms))


@pytest.mark.gpu
def test_last_weight_need_not_fill_its_tiles(nan_filled_empty, hopper) -> None:
    """Forward in its outputs, backward in the columns, of which a tile has 128."""
    t, (first, last) = operands(300, (256, 200), 256, 16, torch.bfloat16)
    dense = nf4_eager.nf4_dequantize_group([first, last], dtype=torch.bfloat16)
    y = nf4_gemm_group.nf4_linear_group(t["x"], [first, last])
    assert_as_accurate_as_eager(y, t["x"] @ dense.T, t["x"].double() @ dense.double().T)
    t, weights = operands(300, (256,), 320, 16, torch.bfloat16)
    dense = nf4_eager.nf4_dequantize(weights[0], dtype=torch.bfloat16)
    dx = nf4_gemm_group.nf4_input_grad_group(t["dy"], weights)
    assert_as_accurate_as_eager(dx, t["dy"] @ dense, t["dy"].double() @ dense.double())


@pytest.mark.gpu
def test_kernel_decodes_the_exact_weights(nan_filled_empty, hopper) -> None:
    """Rows of the identity pick single weights, so both directions must give the dequantised weights, bit for bit."""
    for dtype in (torch.bfloat16, torch.float16):
        weights = [nf4_eager.nf4_quantize(torch.randn(n, 512, device="cuda")) for n in (512, 256)]
        dense = nf4_eager.nf4_dequantize_group(weights, dtype=dtype)
        x, dy = (torch.eye(n, device="cuda", dtype=dtype) for n in (512, 768))
        assert torch.equal(nf4_gemm_group.nf4_linear_group(x, weights), dense.T)
        assert torch.equal(nf4_gemm_group.nf4_input_grad_group(dy, weights), dense)


@pytest.mark.gpu
def test_kernel_reads_strided_rows_and_gives_the_same_bits_twice(nan_filled_empty, hopper) -> None:
    """Twice in a row also means that the flags of cut tiles are as they were."""
    t, weights = operands(300, (256, 128), 4096, 16, torch.bfloat16)
    wide = torch.full((300, 4224), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:, 64:4160] = t["x"]
    expected = nf4_gemm_group.nf4_linear_group(t["x"], weights, lora_x=t["lora_x"], lora_B=t["lora_B"])
    for _ in range(3):
        again = nf4_gemm_group.nf4_linear_group(wide[:, 64:4160], weights, lora_x=t["lora_x"], lora_B=t["lora_B"])
        assert torch.equal(again, expected)


@pytest.mark.gpu
def test_kernel_in_a_graph(hopper) -> None:
    """Captured on a stream that the kernel has not seen, and replayed: the same bits, and flags that are clear."""
    t, weights = operands(512, (1024,), 4096, 16, torch.bfloat16)

    def product() -> Tensor:
        return nf4_gemm_group.nf4_linear_group(t["x"], weights, lora_x=t["lora_x"], lora_B=t["lora_B"])

    expected = product()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        captured = product()
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, expected)
    t["x"].neg_()
    graph.replay()
    assert torch.equal(captured, product())


@pytest.mark.gpu
def test_what_the_kernel_cannot_take_is_decoded_first(hopper) -> None:
    t, weights = operands(512, (4096, 1024, 1024), 4096, 16, torch.bfloat16)
    factors = (t["lora_x"], t["lora_B"])

    def taken(x: Tensor, weights: list[Nf4Tensor], factors=factors, *, backward: bool = False) -> bool:
        return nf4_gemm_group.can_take(x, weights, factors, backward=backward)

    assert taken(t["x"], weights)
    assert taken(t["dy"], weights, (t["lora_x"], t["lora_A"]), backward=True)
    assert not taken(t["x"].float(), weights)
    assert not taken(t["x"].T.contiguous().T, weights), "the copy engine reads rows"
    assert not taken(t["x"], [*weights, weights[0]]), "four weights"
    flat = nf4_eager.nf4_quantize(torch.randn(1024, 4096, device="cuda"), double_quant=False)
    assert not taken(t["x"], [weights[0], flat]), "one of the two is not nested"
    odd = nf4_eager.nf4_quantize(torch.randn(1000, 4096, device="cuda"))
    assert taken(t["x"], [weights[0], odd])
    assert not taken(t["x"], [odd, weights[0]]), "a tile would have rows of both"
    assert not taken(t["dy"], [weights[0], odd], backward=True), "the last summands would be half a unit"
    assert not taken(t["x"][:, :320], [nf4_eager.nf4_quantize(torch.randn(1024, 320, device="cuda"))])
    for part in ("packed", "absmax"):
        old = getattr(weights[0], part)
        shifted = torch.empty(old.numel() + 1, dtype=torch.uint8, device="cuda")[1:].copy_(old)
        assert not taken(t["x"], [replace(weights[0], **{part: shifted})]), part


@pytest.mark.parametrize(
    ("tiles", "units", "cut", "share"),
    [
        (64, 16, 64, 8),  # 512 rows of 4096 x 4096: every tile in halves
        (64, 112, 64, 56),  # 55 would do, but begin everywhere
        (96, 16, 96, 12),  # whole tiles would leave a quarter of the GPU idle
        (96, 112, 96, 84),  # not 82: programs that begin at 56 places would read dy from memory 56 times
        (64, 43, 64, 21),  # no better way to cut 43
        (32, 16, 32, 4),
        (144, 16, 12, 4),  # 132 whole ones and 12 in quarters, not in eighths that are long added up
        (224, 16, 92, 12),
        (448, 16, 52, 8),
        (256, 112, 0, 112),  # next to nothing saved
        (132, 16, 0, 16),
        (3000, 2, 0, 2),
    ],
)
def test_steps_are_dealt_out_evenly(tiles, units, cut, share) -> None:
    assert cut_and_share(tiles, units, multiprocessors=132) == (cut, share)


def test_every_unit_is_summed_once_and_every_sum_is_collected_once() -> None:
    """The kernel's arithmetic of segments, by Python."""
    for tiles in (1, 3, 31, 64, 96, 131, 132, 133, 224, 263, 448):
        for units in (1, 2, 3, 14, 16, 56, 112):
            cut, share = cut_and_share(tiles, units, multiprocessors=132)
            programs = ceil_div(cut * units, share) if cut == tiles else min(tiles, 132)
            together = parts_together(units, share) if cut else 1
            summed: list[tuple[int, int]] = []
            left, collected, pieces = [], [], []
            for program in range(programs):
                begin = min(program * share, cut * units)
                end = min(begin + share, cut * units)
                segments = [
                    (tile, max(begin - tile * units, 0), min(end - tile * units, units))
                    for tile in range(begin // units, ceil_div(end, units))
                ]
                segments += [(tile, 0, units) for tile in range(cut + program, tiles, programs)]
                for number, (tile, first, last) in enumerate(segments):
                    assert first < last
                    summed += [(tile, unit) for unit in range(first, last)]
                    if together > 1 and last - first < units:
                        assert len(segments) == 1 or number == 0, "all parts of a tile are summed at once"
                        own = first * together // units
                        pieces += [
                            (tile, piece) for piece in range(own * PIECES // together, (own + 1) * PIECES // together)
                        ]
                        left += [program] * (together - 1)
                        collected += [program - own + other for other in range(together) if other != own]
                    elif first > 0:
                        assert number == 0, "what others wait for comes first, so that nobody waits in a circle"
                        left.append(program)
                    elif last < units:
                        collected += range(program + 1, ceil_div((tile + 1) * units, share))
            assert sorted(summed) == [(tile, unit) for tile in range(tiles) for unit in range(units)]
            assert sorted(collected) == left
            assert not pieces or sorted(pieces) == [(tile, piece) for tile in range(cut) for piece in range(PIECES)]


def test_rule_takes_rows_by_direction_and_by_what_the_cache_holds() -> None:
    for rows, summands, forward, backward in (
        (32, 4096, False, False),
        (33, 4096, True, False),
        (63, 4096, True, False),
        (65, 4096, False, True),
        (128, 4096, False, True),
        (129, 4096, True, True),
        (1024, 28672, True, True),
        (1025, 28672, False, False),
        (2048, 4096, True, True),
        (2048, 14336, False, False),
        (2049, 256, False, False),
    ):
        assert pays(rows, summands, backward=False) == forward, (rows, summands)
        assert pays(rows, summands, backward=True) == backward, (rows, summands)


def test_few_rows_are_taken_where_nothing_needs_joining(monkeypatch) -> None:
    monkeypatch.setattr(nf4_gemm_group, "LEAST_WEIGHTS", 256 * 256)
    monkeypatch.setattr(nf4_gemm_group, "MOST_WEIGHTS_OF_FEW", 512 * 256)
    monkeypatch.setattr(nf4_gemm_group, "can_take", lambda *operands, backward: True)
    weight, small = (nf4_eager.nf4_quantize(torch.ones(n, 256)) for n in (256, 128))

    def taken(rows: int, weights: list[Nf4Tensor], *, rank: int = 16, bias: Tensor | None = None) -> bool:
        terms = Terms(torch.ones(rows, rank), [torch.ones(256, rank)], [2.0], [bias])
        return nf4_gemm_group.takes_few(torch.ones(rows, 256), weights, terms)

    assert taken(33, [weight])
    assert taken(64, [weight, weight])
    assert not taken(32, [weight])
    assert not taken(65, [weight])
    assert not taken(200, [weight]), "more rows have factors that are joined"
    assert not taken(64, [small])
    assert not taken(64, [weight, weight, small])
    assert not taken(64, [weight], rank=65)
    assert not taken(64, [weight], bias=torch.ones(256))


def test_on_a_cpu_weights_are_decoded_first() -> None:
    weight = nf4_eager.nf4_quantize(torch.randn(128, 256))
    assert not nf4_gemm_group.can_take(torch.randn(512, 256).bfloat16(), [weight], (None, None), backward=False)
